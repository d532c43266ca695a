"""Files of named arrays: read without PyTorch, without running their code, and within their storages."""

import io
import os
import pickle
import sys
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mrjax.errors import UserError
from mrjax.interop import weight_files


def test_safetensors_keep_bfloat16_and_arrays_that_are_not_contiguous(tmp_path: Path) -> None:
    file, values = str(tmp_path / "weights.safetensors"), np.arange(6, dtype=np.float32).reshape(2, 3)
    weight_files.write(file, {"half": values.astype(ml_dtypes.bfloat16), "turned": values.T})
    read = weight_files.read(file)
    assert read["half"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read["half"].astype(np.float32), values)
    np.testing.assert_array_equal(read["turned"], values.T)


class _Harm:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "harm"
    for ending, content in (("pt", {"weights": _Harm(mark)}), ("npz", np.array([_Harm(mark)], object))):
        file = tmp_path / f"harmful.{ending}"
        if ending == "pt":
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("archive/data.pkl", pickle.dumps(content))
        else:
            np.savez(file, weights=content)
        with pytest.raises(UserError, match=r"harmful"):
            weight_files.read(str(file))
        assert not mark.exists()


class _Tensor:
    """Pickled as PyTorch pickles a tensor: storage (None: eight float32 numbers), offset, shape, strides."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple:
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return ("storage", sys.modules["torch"].FloatStorage, "0", "cpu", 8) if value is None else None


@pytest.fixture
def write_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[_Tensor], str]:
    """Write a .pt file that holds a crafted tensor, without PyTorch."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})
    utils._rebuild_tensor_v2 = type("_rebuild_tensor_v2", (), {"__module__": "torch._utils"})

    def write(tensor: _Tensor) -> str:
        stream = io.BytesIO()
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "torch", torch)
            patched.setitem(sys.modules, "torch._utils", utils)
            _Pickler(stream).dump({"weights": tensor})
        with zipfile.ZipFile(tmp_path / "crafted.pt", "w") as archive:
            archive.writestr("archive/data.pkl", stream.getvalue())
            archive.writestr("archive/data/0", np.arange(8, dtype=np.float32).tobytes())
        return str(tmp_path / "crafted.pt")

    return write


def test_a_view_within_its_storage_is_read_without_pytorch(write_tensor: Callable[[_Tensor], str]) -> None:
    read = weight_files.read(write_tensor(_Tensor(None, 1, (2, 3), (1, 2), False, {})))
    np.testing.assert_array_equal(read["weights"], [[1, 3, 5], [2, 4, 6]])
    expanded = weight_files.read(write_tensor(_Tensor(None, 7, (4,), (0,), False, {})))
    np.testing.assert_array_equal(expanded["weights"], [7, 7, 7, 7])


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(_Tensor(None, 0, (9,), (1,)), id="too long"),
        pytest.param(_Tensor(None, 8, (1,), (1,)), id="offset at the end"),
        pytest.param(_Tensor(None, 7, (2,), (-1,)), id="negative stride"),
        pytest.param(_Tensor(None, -1, (1,), (1,)), id="negative offset"),
        pytest.param(_Tensor(None, 0, (2, 2), (1,)), id="a stride missing"),
        pytest.param(_Tensor(None, 0, (2,), (2**62,)), id="stride that overflows"),
        pytest.param(_Tensor(None, 0, (1.5,), (1,)), id="no whole number"),
        pytest.param(_Tensor(_Tensor(None, 0, (2, 4), (4, 1)), 1, (7,), (1,)), id="storage of two dimensions"),
        pytest.param(_Tensor(_Tensor(None, 0, (4,), (2,)), 0, (4,), (1,)), id="storage with gaps"),
        pytest.param(_Tensor(_Tensor(None, 7, (8,), (0,)), 0, (8,), (1,)), id="storage of one number expanded"),
        pytest.param(_Tensor("text", 0, (1,), (1,)), id="no storage"),
    ],
)
def test_a_tensor_cannot_reach_beyond_its_storage(tensor: _Tensor, write_tensor: Callable[[_Tensor], str]) -> None:
    with pytest.raises(UserError, match=r"crafted\.pt: cannot be read \(ValueError"):
        weight_files.read(write_tensor(tensor))


def write_pickle(path: Path, pickled: bytes) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return str(path)


DOUBLED = (
    b")" + b"q\x00h\x00\x86" * 60
)  # a tuple that holds the one before it twice, and so on: its hash takes for ever


@pytest.mark.parametrize(
    "pickled",
    [
        pytest.param(b"}r\xff\xff\xff\xffs.", id="a memo of 32 GB"),
        pytest.param(b"}" + DOUBLED + b"K\x01s.", id="a key without end"),
        pytest.param(b"\x8e" + b"\xff" * 7 + b"\x0fa.", id="a string of 2^60 bytes"),
        pytest.param(b"ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x05sb.", id="another method"),
        pytest.param(b"]" * 2_000_000 + b".", id="too many instructions"),
        pytest.param(b"]" * 5_000_000 + b".", id="too long"),
        pytest.param(b"tR.", id="more taken than there is"),
    ],
)
def test_a_pickle_takes_neither_time_nor_memory_without_end(tmp_path: Path, pickled: bytes) -> None:
    with pytest.raises(UserError, match=r"crafted\.pt: "):
        weight_files.read(write_pickle(tmp_path / "crafted.pt", b"\x80\x02" + pickled))


@pytest.mark.parametrize("ending", ["pt", "npz"])
@pytest.mark.parametrize(("method", "size"), [(zipfile.ZIP_DEFLATED, 2**27), (zipfile.ZIP_LZMA, 2**20)])
@pytest.mark.parametrize("honest", [True, False])
def test_archives_that_unpack_to_far_more_are_refused(
    ending: str, method: int, size: int, honest: bool, write_tensor: Callable[[_Tensor], str]
) -> None:
    file = Path(write_tensor(_Tensor(None, 0, (8,), (1,))))
    pickled = zipfile.ZipFile(file).read("archive/data.pkl")
    file = file.with_suffix(f".{ending}")
    with zipfile.ZipFile(file, "w", method, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl" if ending == "pt" else "a.npy", pickled)
        with archive.open("archive/data/0", "w") as stream:
            for _ in range(size // 2**20):
                stream.write(bytes(2**20))
    if not honest:  # the directory says that there are 64 bytes
        file.write_bytes(file.read_bytes().replace(size.to_bytes(4, "little"), (64).to_bytes(4, "little")))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"unpacks to|another method than deflate|cannot be read"):
        weight_files.read(str(file))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_tensors_that_share_a_storage_are_no_larger_than_the_file(write_tensor: Callable[[_Tensor], str]) -> None:
    with pytest.raises(UserError, match="the tensors are larger than their storages"):
        weight_files.read(write_tensor(_Tensor(None, 0, (2**40,), (0,), False, {})))


def test_files_that_are_no_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        weight_files.read(str(tmp_path / "none.pt"))
    (tmp_path / "text.pt").write_text("weights")
    with pytest.raises(UserError, match="no zip archive"):
        weight_files.read(str(tmp_path / "text.pt"))
    with pytest.raises(UserError, match="ends in one of"):
        weight_files.write(str(tmp_path / "weights.h5"), {})


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_rubbish(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "unet.npz"
    weight_files.write(str(file), {"a": np.ones(3, np.float32)})
    monkeypatch.setattr(np, "savez", lambda path, **arrays: (Path(path).write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        weight_files.write(str(file), {"a": np.zeros(3, np.float32)})
    assert [path.name for path in tmp_path.iterdir()] == ["unet.npz"]
    assert np.array_equal(weight_files.read(str(file))["a"], np.ones(3))
