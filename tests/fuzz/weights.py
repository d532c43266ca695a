"""Weights and configs of checkpoints that are damaged, or made to do harm."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import safetensors.numpy

from mrjax import config
from mrjax.interop import fastmri
from tests.fuzz.mutations import cut, flip, splice


def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw a state_dict of fastMRI's U-Net or VarNet."""
    name = str(rng.choice(["unet", "varnet"]))
    fields = {"channels": 2, "levels": 2, "cascades": 2, "sens_channels": 2, "sens_levels": 1}
    table = fastmri._parameters(name, fields)
    return {key: rng.normal(size=shape).astype(np.float32) for key, (_, _, shape) in table.items()}


def atom(value: object) -> bytes:
    """Pickle a value without the pickle's first and last instruction."""
    return pickle.dumps(value, 2)[2:-1]


def storage(key: object, dtype: str = "FloatStorage") -> bytes:
    return b"(" + atom("storage") + f"ctorch\n{dtype}\n".encode() + atom(key) + atom("cpu") + atom(1) + b"tQ"


def tensor(storage: bytes, *arguments: object) -> bytes:
    """The instructions that rebuild a tensor from a storage, offset, shape and strides."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"".join(map(atom, arguments)) + b"\x89)tR"


def write_pt(path: Path, pickled: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def state_dict(tensors: dict[str, bytes]) -> bytes:
    items = b"".join(atom(name) + value for name, value in tensors.items())
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u."


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


def write_weights(rng: np.random.Generator, folder: Path) -> Path:
    """Write a sound state_dict in one of the formats."""
    arrays, suffix = weights(rng), str(rng.choice(["pt", "ckpt", "npz", "safetensors"]))
    path = folder / f"a.{suffix}"
    if suffix == "npz":
        (np.savez if rng.random() < 0.5 else np.savez_compressed)(path, **arrays)
    elif suffix == "safetensors":
        safetensors.numpy.save_file(arrays, path)
    else:
        keys = {name: tensor(storage(name), 0, x.shape, contiguous(x.shape)) for name, x in arrays.items()}
        write_pt(path, state_dict(keys), {name: x.tobytes() for name, x in arrays.items()})
    return path


def weights_flipped_bytes(rng: np.random.Generator, folder: Path) -> Path:
    return flip(rng, write_weights(rng, folder))


def weights_truncated(rng: np.random.Generator, folder: Path) -> Path:
    return cut(rng, write_weights(rng, folder))


def weights_spliced(rng: np.random.Generator, folder: Path) -> Path:
    return splice(rng, write_weights(rng, folder))


def weights_of_other_values(rng: np.random.Generator, folder: Path) -> Path:
    """Arrays of other types and shapes than a network's, and numbers that are not finite."""
    arrays = weights(rng)
    for name in rng.choice(list(arrays), 3, replace=False):
        x = arrays[name]
        others = [x * np.nan, x * np.inf, x.astype("f8") * 1e300, x.astype("c8"), x.astype("S3"), x[0], x[..., None]]
        others += [
            np.float32(1),
            np.zeros(0),
            np.zeros((0, *x.shape[1:])),
            x.astype([("a", "f4")]),
            x.astype(bool),
            x.T,
        ]
        others += [x.astype(object), np.zeros((2,) * 20), x.astype("m8[s]"), x.astype(">f8"), x.astype("U5")]
        arrays[name] = others[rng.integers(len(others))]
    np.savez(folder / "a.npz", **{("$\x1b" + name if rng.random() < 0.05 else name): x for name, x in arrays.items()})
    return folder / "a.npz"


def pt_strides_and_nested_tensors(rng: np.random.Generator, folder: Path) -> Path:
    """Views that leave their storage, overlap, overflow, or are of no storage at all."""
    arrays, data = weights(rng), {}
    numbers = [-1, 0, 1, 2, 9, 2**31, 2**59, 2**61, 2**62, 2**63, 2**64, -(2**62), 2**70000, 1.5, "a", None, (1,), True]
    mutated = rng.choice(list(arrays), int(rng.integers(1, 3)), replace=False)
    for name, x in arrays.items():
        source, arguments = storage(name), [0, list(x.shape), list(contiguous(x.shape))]
        if name in mutated:
            form = rng.integers(6)
            if form < 2:
                part = arguments[1 + form]
                part[rng.integers(len(part))] = numbers[rng.integers(len(numbers))]
            elif form == 2:
                arguments[0] = numbers[rng.integers(len(numbers))]
            elif form == 3:
                arguments[rng.integers(3)] = [numbers[rng.integers(len(numbers))]] * int(2 ** rng.integers(0, 12))
            elif form == 4:
                source = tensor(source, 0, (4,), (int(rng.integers(3)),))
            else:
                source = storage(str(rng.choice(["../0", "\x1b", name])), str(rng.choice(["X", "ByteStorage"])))
        data[name] = tensor(source, *(tuple(part) if isinstance(part, list) else part for part in arguments))
    kept = {name: x.tobytes() for name, x in arrays.items() if rng.random() < 0.995}
    return write_pt(folder / "a.pt", state_dict(data), kept)


def pt_hostile_pickles(rng: np.random.Generator, folder: Path) -> Path:
    """Code to run, instructions at random, memory and time without end, an object that is told other methods."""
    mark = f"touch {folder / 'harm'}"
    doubled = b")" + b"q\x00h\x00\x86" * int(rng.integers(20, 3000))
    forms = [
        b"\x80\x02cos\nsystem\n" + atom(mark) + b"\x85R.",
        b"\x80\x02}" + atom("state_dict") + b"cbuiltins\nexec\n" + atom("raise SystemExit(3)") + b"\x85Rs.",
        b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",
        b"\x80\x02" + doubled + b".",
        b"\x80\x02}" + doubled + b"K\x01s.",
        state_dict(
            {"a": tensor(b"(" + atom("storage") + b"ctorch\nFloatStorage\n" + doubled + b"NNtQ", 0, (1,), (1,))}
        ),
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
        b"\x80\x02ccollections\nOrderedDict\n)R}" + atom("items") + b"K\x05sb.",
        b"\x80\x02" + b"(" * int(rng.integers(1, 10**5)) + b"t" * int(rng.integers(1, 10**5)) + b".",
        b"\x80\x02" + b"]" * int(rng.integers(1, 4 * 10**6)) + b".",
        b"\x80\x02" + b"\x86" * 9 + b".",
        b"\x80\x02I" + b"9" * int(rng.integers(1, 10**6)) + b"\n.",
        bytes(rng.choice(list(b"()]}a.bceghijloqrstu0126789RQNKMJX\x80\x81\x85\x86\x87\x88\x89\x8a\x8b"), 400).tolist())
        + b".",
        state_dict({"a": b"ctorch._utils\n_rebuild_tensor_v2\n}" + atom("__defaults__") + b")s\x86b"}),
    ]
    return write_pt(folder / "a.pt", forms[rng.integers(len(forms))], {"0": bytes(64)})


def weights_compressed_bombs(rng: np.random.Generator, folder: Path) -> Path:
    """Archives that unpack to a thousand times their size, and say so or not; other methods of compression."""
    suffix, size = str(rng.choice(["pt", "npz"])), int(2 ** rng.integers(20, 30))
    method = int(rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    if method != zipfile.ZIP_DEFLATED:
        size = min(size, 2**24)  # slow to make
    path = folder / f"a.{suffix}"
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (size // 4,)})
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        name = "archive/data/0" if suffix == "pt" else f"{fastmri._FIRST}.npy"
        with archive.open(name, "w") as stream:
            stream.write(head.getvalue() if suffix == "npz" else b"")
            for _ in range(size // 2**20):
                stream.write(bytes(2**20))
        if suffix == "pt":
            copies = {f"{i}{fastmri._FIRST}": tensor(storage("0"), 0, (size // 4,), (1,)) for i in range(100)}
            archive.writestr("archive/data.pkl", state_dict(copies))
    if rng.random() < 0.5:  # the directory understates
        data = path.read_bytes()
        path.write_bytes(
            data.replace(struct.pack("<I", size + (len(head.getvalue()) if suffix == "npz" else 0)), b"\x40\0\0\0")
        )
    return path


def npz_headers(rng: np.random.Generator, folder: Path) -> Path:
    """Headers of arrays that claim shapes and types at will."""
    shapes = ["()", "(2**60,)", "(99999999999,)", "(-1,)", "(1,)*99", "(1e9,)", "(" * 99, "None", "(3, 4)", "(True,)"]
    types = ["'<f4'", "'O'", "'V99999999'", "'<f99'", "[('a', 'O')]", "'S0'", "None", "'<c8'", "'f4,' * 9", "'M8'"]
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        for name in (fastmri._FIRST, "b"):
            shape, kind = (str(rng.choice(forms)) if rng.random() < 0.6 else forms[0] for forms in (shapes, types))
            header = (
                f"{{'descr': {kind}, 'fortran_order': {rng.choice(['True', 'False', '3'])}, 'shape': {shape}}}".encode()
            )
            header += b" " * int(rng.choice([1, 9, 50_000])) + b"\n"
            version = bytes([int(rng.choice([1, 1, 2, 3, 9])), 0])
            length = struct.pack("<H" if version[0] == 1 else "<I", len(header) if rng.random() < 0.8 else 60_000)
            archive.writestr(
                f"{name}.npy", b"\x93NUMPY" + version + length + header + rng.bytes(int(rng.integers(100)))
            )
    return folder / "a.npz"


def safetensors_headers(rng: np.random.Generator, folder: Path) -> Path:
    """Headers that claim offsets, shapes, types and lengths at will."""
    numbers = [0, 1, 4, 64, -1, 2**31, 2**62, 2**64 - 1, 2**70, 1.5, "1", None, []]

    def draw() -> object:
        return numbers[rng.integers(len(numbers))]

    header: dict[str, object] = {}
    for name in (fastmri._FIRST, "b", "\x1b[2J"):
        kind = str(rng.choice(["F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "X", "C64"]))
        shape = [draw() for _ in range(rng.integers(4))] if rng.random() < 0.5 else [16]
        header[name] = {
            "dtype": kind,
            "shape": shape,
            "data_offsets": [0, 64] if rng.random() < 0.5 else [draw(), draw()],
        }
    text = json.dumps(header).encode()
    forms = [text, text, text, b"[" * 10**5, b'{"a":' * 10**5, rng.bytes(300), b'{"__metadata__": 3}', b"{}"]
    text = forms[rng.integers(len(forms))]
    length = len(text) if rng.random() < 0.8 else int(rng.choice([0, 99_999_999, 2**62]))
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", length) + text + bytes(64))
    return folder / "a.safetensors"


def config_of_a_checkpoint(rng: np.random.Generator, folder: Path) -> Path:
    """JSON of a config with fields and values at random; no code in it may run."""
    values = config.defaults().to_dict()
    odd = [
        None,
        [],
        {},
        "x",
        -1,
        1e400,
        2**70,
        [[1]],
        {"a": 1},
        "__import__('os').abort()",
        True,
        "@raise",
        [None],
        "\x1b",
    ]
    for _ in range(rng.integers(1, 5)):
        place, name = values, str(rng.choice(list(values)))
        while isinstance(place.get(name), dict) and place[name] and rng.random() < 0.8:
            place = place[name]
            name = str(rng.choice(list(place)))
        place[str(rng.choice([name, name, name, "other", "a.b"]))] = odd[rng.integers(len(odd))]
    text = json.dumps(values)
    forms = [text] * 6 + [text[: rng.integers(len(text))], "[" * 10**5, "[]", "3", '{"model": 3}', "null", "\udcff"]
    (folder / "config.json").write_bytes(forms[rng.integers(len(forms))].encode(errors="surrogateescape"))
    return folder / "config.json"


MUTATIONS = (
    weights_flipped_bytes,
    weights_truncated,
    weights_spliced,
    weights_of_other_values,
    pt_strides_and_nested_tensors,
    pt_hostile_pickles,
    weights_compressed_bombs,
    npz_headers,
    safetensors_headers,
    config_of_a_checkpoint,
)
