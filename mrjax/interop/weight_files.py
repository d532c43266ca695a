"""Files of named arrays: PyTorch's .pt, .pth and .ckpt, .safetensors and .npz. Nothing in a file is ever executed.

A PyTorch file is a zip archive of raw arrays and a pickle that names them. That pickle is not unpickled: `_read_pickle`
follows its instructions, and knows dicts and tensors; other objects, as in checkpoints of Lightning, become None. Only
writing such a file needs PyTorch.
"""

import functools
import itertools
import math
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

from mrjax.errors import UserError, expect
from mrjax.io.files import replacing

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".npz")
MAX_PICKLE = 2**22  # bytes; that of a state_dict of 10,000 tensors has 1.5 MB
MAX_INSTRUCTIONS = 5 * 10**5  # in it, which take a second; such a state_dict has 320,000
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
    arrays = {name: x for name, x in values.items() if isinstance(x, np.ndarray) and _is_real(x.dtype)}
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


def _is_real(dtype: np.dtype) -> bool:
    return dtype.kind in "biuf" or dtype == ml_dtypes.bfloat16


def _load(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        return safetensors.numpy.load_file(file)
    expect(zipfile.is_zipfile(file), f"{file}: is no zip archive", "what NumPy, or PyTorch 1.6 or newer, has written")
    with zipfile.ZipFile(file) as archive:
        entries, size = archive.infolist(), file.stat().st_size
        held = sum(entry.file_size for entry in entries)
        # Weights are noise, which does not compress. Other methods than deflate unpack without a limit.
        expect(held <= 2 * size + 2**26, f"{file}: has {size} bytes and unpacks to {held}", "at most twice as many")
        plain = all(entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries)
        expect(plain, f"{file}: is compressed by another method than deflate", "one that NumPy or PyTorch writes")
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        return _load_tensors(file, archive, held)


def _load_tensors(file: Path, archive: zipfile.ZipFile, held: int) -> dict[str, Any]:
    """Load the tensors of the state_dict in an archive of PyTorch, which together take no more than `held` bytes."""
    entry = next((entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")), None)
    if entry is None:
        raise UserError(f"{file}: has no data.pkl in it, expected a file that torch.save has written")
    expect(entry.file_size <= MAX_PICKLE, f"{file}: has a pickle of {entry.file_size} bytes", f"at most {MAX_PICKLE}")
    folder = entry.filename.removesuffix("data.pkl")

    @functools.cache  # tensors may share one
    def read_entry(name: str) -> bytes:
        with archive.open(name) as stream:
            return stream.read(archive.getinfo(name).file_size)  # without a limit, what unpacks to more would do so

    values = _read_pickle(read_entry(entry.filename))
    values = values if isinstance(values, dict) else {}
    values = values["state_dict"] if isinstance(values.get("state_dict"), dict) else values
    tensors = {name: tensor for name, tensor in values.items() if isinstance(tensor, _Tensor)}
    for tensor in tensors.values():
        tensor.require_whole_numbers()
    if sum(math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize for tensor in tensors.values()) > held:
        raise ValueError("the tensors are larger than their storages")
    return {name: tensor.view(read_entry(f"{folder}data/{tensor.storage}")) for name, tensor in tensors.items()}


class _Global(NamedTuple):
    """Stands for what a pickle would import."""

    name: str  # "module name"


class _Storage(NamedTuple):
    """A flat array in the archive."""

    dtype: Any
    name: str


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    dtype: Any
    storage: str
    offset: Any
    shape: Any
    strides: Any

    def require_whole_numbers(self) -> None:
        """Raise a `ValueError` unless offset, shape and strides can be those of a tensor."""
        if not (isinstance(self.shape, tuple) and isinstance(self.strides, tuple) and len(self.shape) <= 32):
            raise ValueError("a tensor has no shape or no strides")
        if not all(type(number) is int and 0 <= number < 2**62 for number in (self.offset, *self.shape, *self.strides)):
            raise ValueError("a tensor is not a flat storage viewed by whole numbers")

    def view(self, storage: bytes) -> np.ndarray:
        """View the elements in the storage, never beyond it."""
        size = np.dtype(self.dtype).itemsize
        # Counted by Python, whose numbers do not overflow; NumPy checks the same in 64 bits.
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        if (last + 1) * size > len(storage):
            raise ValueError("a tensor lies outside its storage")
        steps = [stride * size for stride in self.strides]
        return np.ndarray(self.shape, self.dtype, storage, self.offset * size, steps)


def _read_pickle(data: bytes) -> Any:
    """Follow a pickle to its dicts, tuples, strings, numbers and tensors; nothing is imported, and nothing called."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for op, argument, _ in itertools.islice(pickletools.genops(data), MAX_INSTRUCTIONS):
        if op.name == "STOP":
            return stack.pop()
        if op.name == "MARK":
            marks.append(len(stack))
            continue
        # What an instruction takes from the stack: so many values, and all from the last mark on.
        needed, values = op.stack_before, []
        if pickletools.markobject in needed:
            needed = needed[: needed.index(pickletools.markobject)]
            start = marks.pop()
            values, stack[start:] = stack[start:], []
        taken = [stack.pop() for _ in needed][::-1]
        match op.name:
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = taken[0]
                stack.append(taken[0])
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                if isinstance(taken[0], dict):
                    pairs = zip((values or taken[1:])[::2], (values or taken[1:])[1::2], strict=True)
                    # Only strings are hashed: a tuple of tuples of tuples may take for ever.
                    taken[0].update({key: value for key, value in pairs if isinstance(key, str)})
                stack.append(taken[0])
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append((*values, *taken))
            case "GLOBAL" | "STACK_GLOBAL":
                stack.append(_Global(argument or " ".join(taken)))
            case "BINPERSID":
                stack.append(_make_storage(*taken))
            case "REDUCE":
                stack.append(_make_object(*taken))
            case "BUILD":
                stack.append(taken[0])  # the metadata of a state_dict, and what else objects are told
            case _:  # numbers and strings are their instruction's argument
                stack += [None if op.stack_before else argument for _ in op.stack_after]
    raise ValueError(f"the pickle has more than {MAX_INSTRUCTIONS} instructions")


def _make_storage(identity: Any) -> _Storage | None:
    match identity:
        case (_, _Global(name), str(key), _, _) if name.removeprefix("torch ") in _PYTORCH_DTYPES:
            return _Storage(_PYTORCH_DTYPES[name.removeprefix("torch ")], key)
    return None


def _make_object(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Global("collections OrderedDict"), _:
            return {}
        case _Global("torch._utils _rebuild_parameter"), (tensor, *_):
            return tensor
        case _Global("torch._utils _rebuild_tensor_v2"), (storage, offset, shape, strides, *_):
            if not isinstance(storage, _Storage):
                raise ValueError("a tensor is no view of a flat storage")
            return _Tensor(*storage, offset, shape, strides)
    return None
