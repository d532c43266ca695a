"""Datasets: examples by number, each a dict of arrays of one spec."""

import abc
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from mrjax.data import resize
from mrjax.data.buffers import Batch, Spec
from mrjax.errors import expect
from mrjax.io import readers
from mrjax.io.volume import DATA_NAMES, Volume


class Dataset(abc.ABC):
    """Random access to examples of a `spec`, from any thread; pickled to worker processes."""

    spec: Spec

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abc.abstractmethod
    def read_into(self, number: int, example: Batch) -> None:
        """Read an example into arrays of `spec`, each C-contiguous."""


class SliceDataset(Dataset):
    """The slices of volumes of one layout, brought to one size; `positions` are (volume, slice).

    `size` is (height, width), and `image_shape` ([coils,] height, width). An example holds:
      kspace: (coils, height, width) complex64, zero-padded to the most coils of the volumes; and
      repetitions: (repetitions, coils, height, width) complex64, this slice of the other repetitions, if any volume has
        some, zero-padded likewise; and
      mask: (1 or height, width) bool, the samples to keep, if all volumes are fully sampled and store it; or
      input, target: (height, width) float32, magnitudes; no target if a volume has none
      volume, slice: int32, numbers
      name: uint32, a hash of the volume's name
      maximum: float32, the volume's maximum in the file's units, 0 if unknown

    With `adjacent_slices` = n above 0, kspace or input has a first axis of 2n + 1: the slice, the n before it and the n
    after it; beyond either end the last slice is repeated. `rule` is that of `resize.resize_kspace`. Raises `UserError`
    if a stored mask is not as large as the slices, and `rule` is 'image'.
    """

    def __init__(
        self,
        volumes: Sequence[Volume] | Mapping[int, Volume],
        size: tuple[int, int],
        rule: str = "kspace",
        *,
        adjacent_slices: int = 0,
    ):
        self._volumes = dict(volumes if isinstance(volumes, Mapping) else enumerate(volumes))
        self._size = (size[0], size[1])
        self._rule = rule
        self._offsets = [0, *range(-adjacent_slices, 0), *range(1, adjacent_slices + 1)]
        self._names = {number: zlib.crc32(volume.name.encode()) for number, volume in self._volumes.items()}
        self.positions = [(number, i) for number, volume in self._volumes.items() for i in volume.full_slices]
        described = list(self._volumes.values())
        paths = [path for volume in described for path in (volume.path, *volume.repetitions)]
        self._readers = {path: readers.reader_for(path) for path in paths}
        stack = (len(self._offsets),) if adjacent_slices else ()
        coils = max(volume.coils for volume in described)
        labels = {"volume": np.int32, "slice": np.int32, "name": np.uint32, "maximum": np.float32}
        spec: dict[str, tuple[tuple[int, ...], type]] = {name: ((), dtype) for name, dtype in labels.items()}
        self.image_shape: tuple[int, ...] = self._size
        if described[0].layout == "kspace":
            self.image_shape = (coils, *self._size)
            spec["kspace"] = ((*stack, *self.image_shape), np.complex64)
        else:
            spec["input"] = ((*stack, *self._size), np.float32)
            if all(volume.target for volume in described):
                spec["target"] = (self._size, np.float32)
        if count := max(len(volume.repetitions) for volume in described):
            spec["repetitions"] = ((count, coils, *self._size), np.complex64)
        masks = [v.stored_mask for v in described if v.stored_mask is not None and not v.undersampled]
        if len(masks) == len(described):
            rows = 1 if all(mask.shape[1] == 1 for mask in masks) else self._size[0]
            spec["mask"] = ((rows, self._size[1]), np.bool_)
            wanted = f"config.data.image_size, which is {self._size}, to be as large, or config.data.resize = 'kspace'"
            for volume, mask in zip(described, masks, strict=True):
                fits = rule == "kspace" or mask.shape[1:] in ((1, size[1]), self._size)
                expect(fits, f"{volume.path}: `mask` has shape {mask.shape[1:]}", wanted)
        self.spec = {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in spec.items()}

    def __len__(self) -> int:
        return len(self.positions)

    def read_into(self, number: int, example: Batch) -> None:
        """Read a slice, without a copy in between if the file holds it in the wanted form."""
        volume_number, i = self.positions[number]
        volume = self._volumes[volume_number]
        stack = example[DATA_NAMES[volume.layout]].reshape(len(self._offsets), *self.image_shape)
        for offset, out in zip(self._offsets, stack, strict=True):
            nearest = min(max(i + offset, 0), volume.slices - 1)
            if volume.layout == "kspace":
                self._read_kspace(volume, volume.path, nearest, out)
            else:
                self._read_image(volume.path, volume.data, nearest, out)
        if "target" in self.spec:
            self._read_image(volume.path, str(volume.target), i, example["target"])
        if "mask" in self.spec:
            self._read_mask(volume, i, example["mask"])
        if "repetitions" in self.spec:
            example["repetitions"][len(volume.repetitions) :] = 0
            for path, out in zip(volume.repetitions, example["repetitions"], strict=False):
                self._read_kspace(volume, path, i, out)
        example["volume"][...], example["slice"][...] = volume_number, i
        example["name"][...], example["maximum"][...] = self._names[volume_number], volume.maximum or 0

    def _read_kspace(self, volume: Volume, path: str, i: int, out: np.ndarray) -> None:
        out, padding = out[: volume.coils], out[volume.coils :]
        padding[...] = 0
        kspace = self._readers[path].read_slice(path, volume.data, i, out)
        mask = volume.mask_of_slice(i)
        if volume.undersampled and mask is not None:
            kspace = np.where(mask, kspace, 0)
        if kspace is not out:
            kspace = kspace.astype(np.complex64, copy=False).reshape(-1, *kspace.shape[-2:])
            out[...] = resize.resize_kspace(kspace, self._size, self._rule)

    def _read_mask(self, volume: Volume, i: int, out: np.ndarray) -> None:
        mask = volume.mask_of_slice(i)
        assert mask is not None
        rows = 1 if len(mask) == 1 else self._size[0]
        out[...] = resize.crop_or_pad(mask, (rows, self._size[1]))

    def _read_image(self, path: str, name: str, i: int, out: np.ndarray) -> None:
        image = self._readers[path].read_slice(path, name, i, out)
        if image is not out:
            magnitude = (np.abs(image) if image.dtype.kind == "c" else image).astype(np.float32)
            out[...] = resize.resize_image(magnitude, self._size)


class ExampleIndices(Dataset):
    """The numbers of a dataset's examples, `example`, and of the dataset, `bucket`, for a `DeviceCache`; both int32."""

    def __init__(self, length: int, bucket: int = 0):
        self._length = length
        self._bucket = bucket
        self.spec = {name: ((), np.dtype(np.int32)) for name in ("example", "bucket")}

    def __len__(self) -> int:
        return self._length

    def read_into(self, number: int, example: Batch) -> None:
        """Write the number and the bucket."""
        example["example"][...], example["bucket"][...] = number, self._bucket
