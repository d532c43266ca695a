"""Files of named arrays: PyTorch's .pt, .pth and .ckpt, .safetensors and .npz. Nothing in a file is ever executed.

A PyTorch file is a zip archive with the raw arrays and a pickle that names them. That pickle is read here by an
unpickler that knows how a tensor is put together and nothing else: every other object in it, as checkpoints of
Lightning hold, becomes an empty one. PyTorch is only needed to write such a file.
"""

import collections
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mrjax.errors import UserError

_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".npz")
_PYTORCH_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_SAFETENSORS_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64},
    **{"I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_},
}


def read(path: str) -> dict[str, np.ndarray]:
    """The arrays of a file, or of the `state_dict` in it, by name.

    Raises:
      UserError: the file is missing, damaged, of another kind, or holds no named arrays.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file, expected a state_dict in one of {', '.join(_SUFFIXES)}")
    reader = {".safetensors": _read_safetensors, ".npz": _read_npz}.get(file.suffix, _read_pytorch)
    try:
        values = reader(file)
    except UserError:
        raise
    except Exception as error:  # a damaged file, or one made to do harm, may break its reader anywhere
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}), expected a state_dict") from error
    if isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        values = values["state_dict"]
    arrays = {}
    if isinstance(values, dict):
        arrays = {name: x for name, x in values.items() if isinstance(name, str) and isinstance(x, np.ndarray)}
    if not arrays:
        raise UserError(
            f"{path}: holds no named arrays, expected a state_dict as torch.save(model.state_dict()) writes"
        )
    return arrays


def write(path: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays by name, in the format that the path ends in; beside its place first, then renamed into it.

    Raises:
      UserError: of an unknown ending, or one that needs PyTorch, which is missing.
    """
    file = Path(path)
    if file.suffix not in _SUFFIXES:
        raise UserError(f"--output is {path}, expected a name that ends in one of {', '.join(_SUFFIXES)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.stem}.{os.getpid()}.part{file.suffix}")
    try:
        if file.suffix == ".npz":
            np.savez(part, **arrays)  # type: ignore[arg-type]
        elif file.suffix == ".safetensors":
            _write_safetensors(part, arrays)
        else:
            _write_pytorch(part, arrays, path)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _write_pytorch(file: Path, arrays: dict[str, np.ndarray], output: str) -> None:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"--output is {output}, which takes PyTorch to write: install torch, or end it in .npz"
        ) from error
    torch.save(collections.OrderedDict((name, torch.from_numpy(x)) for name, x in arrays.items()), file)


def _read_npz(file: Path) -> Any:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_safetensors(file: Path) -> Any:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    arrays = {}
    for name, about in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            flat = np.frombuffer(data[start + first : start + last], _SAFETENSORS_DTYPES[about["dtype"]])
            arrays[name] = flat.reshape(about["shape"])
    return arrays


def _write_safetensors(file: Path, arrays: dict[str, np.ndarray]) -> None:
    header, at = {}, 0
    names = {np.dtype(dtype): name for name, dtype in _SAFETENSORS_DTYPES.items()}
    for name, x in arrays.items():
        header[name] = {"dtype": names[x.dtype], "shape": x.shape, "data_offsets": (at, at + x.nbytes)}
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    parts = (len(text).to_bytes(8, "little"), text, *(np.ascontiguousarray(x).tobytes() for x in arrays.values()))
    file.write_bytes(b"".join(parts))


def _read_pytorch(file: Path) -> Any:
    if not zipfile.is_zipfile(file):
        raise UserError(f"{file}: is no zip archive, expected a file that PyTorch 1.6 or newer has written")
    with zipfile.ZipFile(file) as archive:
        description = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        if description is None:
            raise UserError(f"{file}: has no data.pkl in it, expected a file that torch.save has written")
        with archive.open(description) as pickled:
            return _TensorsOnly(pickled, archive, description.removesuffix("data.pkl")).load()


class _TensorsOnly(pickle.Unpickler):
    """Builds dicts, lists, numbers, strings and tensors (as NumPy arrays); imports and calls nothing else."""

    def __init__(self, pickled: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(pickled)
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return {"_rebuild_tensor_v2": _tensor, "_rebuild_parameter": _parameter}[name]
        if module == "torch" and name in _PYTORCH_DTYPES:
            return name
        return _Nothing

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, _ = pid
        return np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), _PYTORCH_DTYPES[dtype])


class _Nothing:
    """Stands for an object of any other class, whatever is done to it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Nothing":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, value: Any) -> None:
        """Takes nothing in."""

    def __call__(self, *args: Any, **kwargs: Any) -> "_Nothing":
        return self


def _tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> np.ndarray:
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides)) < 0 or (0 not in shape and last >= storage.size):
        raise ValueError("a tensor lies outside its storage")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False).copy()


def _parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data
