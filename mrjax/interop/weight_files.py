"""Files of named arrays: PyTorch's .pt, .pth and .ckpt, .safetensors and .npz. Nothing in a file is ever executed.

A PyTorch file is a zip archive of raw arrays and a pickle that names them. The unpickler here only knows how to rebuild
a tensor: other objects, as in checkpoints of Lightning, become empty ones. Only writing such a file needs PyTorch.
"""

import collections
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from mrjax.data.files import replacing
from mrjax.errors import UserError, expect

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".npz")
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


def read(path: str) -> dict[str, np.ndarray]:
    """Read the arrays of a file, or of the `state_dict` in it, by name; raises `UserError` if there are none."""
    file = Path(path)
    expect(file.is_file(), f"{path}: no such file", f"a state_dict in one of {', '.join(SUFFIXES)}")
    try:
        values = _load(file)
    except UserError:
        raise
    except Exception as error:  # a damaged file, or one made to do harm, may break its reader anywhere
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}), expected a state_dict") from error
    values = values if isinstance(values, dict) else {}
    values = values["state_dict"] if isinstance(values.get("state_dict"), dict) else values
    arrays = {name: x for name, x in values.items() if isinstance(name, str) and isinstance(x, np.ndarray)}
    expect(arrays, f"{path}: holds no named arrays", "a state_dict as torch.save(model.state_dict()) writes")
    return arrays


def write(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name in the format of the path's ending; `UserError` if that is unknown, or lacks PyTorch."""
    file = Path(path)
    expect(file.suffix in SUFFIXES, f"--output is {path}", f"a name that ends in one of {', '.join(SUFFIXES)}")
    contiguous = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    with replacing(file) as part:
        if file.suffix == ".npz":
            np.savez(part, **contiguous)  # type: ignore[arg-type]
        elif file.suffix == ".safetensors":
            safetensors.numpy.save_file(contiguous, part)
        else:
            try:
                import torch
            except ImportError as error:
                needs = f"--output ends in {file.suffix}, which needs PyTorch: install torch, or use .npz"
                raise UserError(needs) from error
            torch.save({name: torch.from_numpy(x) for name, x in contiguous.items()}, part)


def _load(file: Path) -> Any:
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    if file.suffix == ".safetensors":
        return safetensors.numpy.load_file(file)
    expect(zipfile.is_zipfile(file), f"{file}: is no zip archive", "a file that PyTorch 1.6 or newer has written")
    with zipfile.ZipFile(file) as archive:
        pickled = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        if pickled is None:
            raise UserError(f"{file}: has no data.pkl in it, expected a file that torch.save has written")
        with archive.open(pickled) as stream:
            return _TensorUnpickler(stream, archive, pickled.removesuffix("data.pkl")).load()


class _TensorUnpickler(pickle.Unpickler):
    """Builds dicts, lists, numbers, strings and tensors (as NumPy arrays); imports and calls nothing else."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(stream)
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _PYTORCH_DTYPES:
            return name
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        return known.get((module, name), _EmptyObject)

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, _ = pid
        return np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), _PYTORCH_DTYPES[dtype])


class _EmptyObject:
    """Stands for an object of any other class; takes whatever the pickle does to it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    __setstate__ = __setitem__ = append = __init__

    def __call__(self, *args: Any, **kwargs: Any) -> "_EmptyObject":
        return self


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
    """View elements of a flat storage, never beyond it; offset and strides count elements."""
    flat = isinstance(storage, np.ndarray) and storage.ndim == 1 and storage.flags.c_contiguous
    if not (flat and all(type(number) is int and number >= 0 for number in (offset, *shape, *strides))):
        raise ValueError("a tensor is not a flat storage viewed by whole numbers")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.size:
        raise ValueError("a tensor lies outside its storage")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)
