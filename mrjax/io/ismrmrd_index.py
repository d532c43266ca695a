"""The index of a raw file: where its readouts are, and where they go in k-space."""

import logging
import os
from typing import NamedTuple

import h5py
import numpy as np

from mrjax.errors import UserError, expect
from mrjax.io import ismrmrd_header
from mrjax.io.files import identity
from mrjax.io.hdf5 import DAMAGES, open_file
from mrjax.io.hdf5_contents import MAX_RATIO, MAX_SLICE_RATIO, SMALL, SMALL_SLICE, WORKING_SLICES, require_honest
from mrjax.io.hdf5_heap import POINTER, GlobalHeap, read_elements, read_into
from mrjax.io.ismrmrd_header import RawHeader
from mrjax.parallel.memory import available_memory

logger = logging.getLogger(__name__)
# Bits of an acquisition's flags: the constants of ISMRMRD less 1.
NOISE, CALIBRATION, CALIBRATION_AND_IMAGING, REVERSE = 1 << 18, 1 << 19, 1 << 20, 1 << 21
NO_IMAGE = NOISE | sum(1 << bit for bit in (22, 23, 25, 26, 27, 28, 29, 30))
OTHER_IMAGE = ("separate", "external", "other")  # calibration modes
MAX_COILS = 1024  # bits of `channel_mask`
STACK = ("repetition", "set", "phase", "contrast")  # counters: each of their combinations is a stack of slices
READOUT = np.dtype(
    [
        ("slice", np.int32),  # or slab
        ("partition", np.int32),  # of the second phase encoding
        ("column", np.int32),
        ("row", np.int32),  # of the first sample in use
        ("offset", np.int64),  # in the file
        ("samples", np.int32),
        ("first", np.int32),  # sample in use, once turned round
        ("used", np.int32),  # number of samples in use
        ("reverse", np.bool_),
        ("weight", np.float32),  # 1 / number of averages
    ]
)


class RawScan(NamedTuple):
    """A file whose readouts are indexed."""

    file: tuple[int, ...]  # see `files.identity`
    header: RawHeader
    shape: tuple[int, int, int, int]  # (slices, coils, height, width) of the k-space
    partitions: int  # slices of a slab; 1 for 2-D scans
    readouts: np.ndarray  # (readouts,) READOUT, slice by slice
    measured: np.ndarray  # (1 or slices, width) bool, which columns were
    rows: np.ndarray  # (samples,) bool, which rows of the encoded matrix lie between samples of readouts
    whitening: np.ndarray | None  # (coils, coils) complex64
    affine: np.ndarray | None  # see `Volume`


def is_complete(lines: np.ndarray) -> bool:
    """Tell whether lines (size,) bool were measured without a gap, on both sides of the centre; or none at all."""
    measured = np.flatnonzero(lines)
    if len(measured) in (0, len(lines)):
        return True
    short, long = sorted((len(lines) // 2 - measured[0], measured[-1] + 1 - len(lines) // 2))
    return bool(len(measured) == measured[-1] - measured[0] + 1 and short >= 0.8 * long)  # as `data.checks`


def index(path: str) -> RawScan:
    """Index a file; raises `UserError` for what is no Cartesian scan, is damaged, or claims more than it holds."""
    with open_file(path) as file:
        try:
            unchanged = identity(os.stat(path))
            groups = ismrmrd_header.find_raw(file, path)
            found = f"{path}: holds raw data in {len(groups)} groups ({', '.join(groups)})"
            expect(len(groups) == 1, found, "one measurement a file")
            ((header, data),) = groups.values()
            return _index(path, unchanged, ismrmrd_header.read_xml(header, path), _read_acquisitions(data, path))
        except UserError:
            raise
        except DAMAGES as error:
            raise UserError(f"{path}: is damaged ({error}), expected readouts of ISMRMRD") from error


def _read_acquisitions(data: h5py.Dataset, path: str) -> np.ndarray:
    """Read the headers of all acquisitions, and where their samples are: a structured array of `head` and `data`."""
    require_honest(data, path, str(data.name), None)
    numbers = h5py.check_vlen_dtype(data.dtype["data"])
    expect(numbers == np.dtype("<f4"), f"{path}: its samples are {numbers}", "pairs of float32")
    elements, fields = read_elements(data, path), data.dtype.fields
    form = {
        "names": ["head", "data"],
        "formats": [data.dtype["head"], POINTER],
        "offsets": [fields["head"][1], fields["data"][1]],
        "itemsize": elements.shape[1],
    }
    return elements.view(np.dtype(form))[:, 0]  # type: ignore[call-overload]


@np.errstate(all="ignore")
def _index(path: str, file: tuple[int, ...], xml: bytes, acquisitions: np.ndarray) -> RawScan:
    head = acquisitions["head"]
    image, header = _select_image(head["flags"], head["encoding_space_ref"], xml, path)
    noise = head["flags"] & NOISE != 0
    coils = _require_one(head["active_channels"][image], f"{path}: its readouts", "active_channels")
    expect(1 <= coils <= MAX_COILS, f"{path}: has readouts of {coils} coils", f"1 to {MAX_COILS}")
    offsets = _locate(acquisitions, image | noise, path)
    number, first = np.unique(head["idx"]["slice"][image], return_index=True)
    geometry = head[image][first]
    order = _order_slices(geometry)
    counters = np.stack([head["idx"][name][image] for name in STACK], 1)
    stacks, stack = np.unique(counters, axis=0, return_inverse=True)
    found = f"{path}: has {len(stacks)} stacks of {len(number)} slices, but {len(stack)} readouts"
    expect(len(stacks) * len(number) <= len(stack), found, "at least one for each slice")
    step2 = head["idx"]["kspace_encode_step_2"][image]
    partitions = header.matrix[2] if np.ptp(step2) else 1
    shape = (len(stacks) * len(number) * partitions, coils, header.height, header.matrix[1])
    _require_room(path, shape, header.matrix[0])
    readouts = _place_readouts(head[image], header, partitions, path)
    rank = np.argsort(order)[np.searchsorted(number, head["idx"]["slice"][image])]
    readouts["slice"], readouts["offset"] = stack.reshape(-1) * len(number) + rank, offsets[image]
    place = (readouts["slice"].astype(np.int64) * partitions + readouts["partition"]) * shape[3] + readouts["column"]
    _, line, count = np.unique(place, return_inverse=True, return_counts=True)
    readouts["weight"] = 1 / count[line.reshape(-1)]
    row = np.arange(header.matrix[0])
    return RawScan(
        file=file,
        header=header,
        shape=shape,
        partitions=partitions,
        readouts=readouts[np.lexsort((readouts["offset"], readouts["slice"]))],
        measured=_measured_columns(readouts, shape, partitions, path),
        rows=(row >= readouts["row"].min()) & (row < (readouts["row"] + readouts["used"]).max()),
        whitening=_find_whitening(acquisitions, noise, image, offsets, header, path),
        affine=_find_affine(header, geometry[order], partitions),
    )


def _select_image(flags: np.ndarray, encodings: np.ndarray, xml: bytes, path: str) -> tuple[np.ndarray, RawHeader]:
    """Return which acquisitions are of the image, and the header of their encoding."""
    image = flags & NO_IMAGE == 0
    calibration = flags & (CALIBRATION | CALIBRATION_AND_IMAGING) == CALIBRATION
    imaging = image & ~calibration if np.any(image & ~calibration) else image
    expect(imaging.any(), f"{path}: none of its {len(flags)} readouts is of an image", "some without such flags")
    encoding = _require_one(encodings[imaging], f"{path}: its readouts of the image", "encoding_space_ref")
    header = ismrmrd_header.parse(xml, encoding, path)
    other = image & ~imaging & ((encodings != encoding) | (header.calibration in OTHER_IMAGE))
    if other.any():
        logger.warning("%s: %d calibration readouts of another image are left out", path, other.sum())
    return image & ~other, header


def _require_one(values: np.ndarray, label: str, name: str) -> int:
    found = np.unique(values)
    expect(len(found) == 1, f"{label} differ in {name}: {', '.join(map(str, found[:8]))}", "one value")
    return int(found[0])


def _require_room(path: str, shape: tuple[int, ...], samples: int) -> None:
    """Raise a `UserError` for k-space that claims much more than the file holds (see `hdf5_contents`)."""
    size, (slices, coils, _, width) = os.path.getsize(path), shape
    need = 8 * coils * width * samples
    room = min(MAX_SLICE_RATIO * size + SMALL_SLICE, available_memory() // WORKING_SLICES)
    expect(need <= room, f"{path}: claims {need:,} bytes a slice in a file of {size:,}", f"at most {room:,}")
    room = MAX_RATIO * size + SMALL
    expect(need * slices <= room, f"{path}: claims {need * slices:,} bytes in a file of {size:,}", f"at most {room:,}")


def _locate(acquisitions: np.ndarray, wanted: np.ndarray, path: str) -> np.ndarray:
    """Return the offsets of the samples of acquisitions in the file, 0 for those that are not wanted."""
    head, pointers, offsets = acquisitions["head"], acquisitions["data"], np.zeros(len(acquisitions), np.int64)
    claimed = 2 * head["number_of_samples"].astype(np.int64) * head["active_channels"]
    odd = np.flatnonzero(wanted & ((claimed != pointers["length"]) | (claimed == 0)))
    if len(odd):
        found = f"{path}: readout {odd[0]} holds {pointers['length'][odd[0]]} numbers"
        raise UserError(
            f"{found}, expected {claimed[odd[0]]}: two for each sample of each coil, and at least one sample"
        )
    size, total = os.path.getsize(path), 4 * int(claimed[wanted].sum())
    room = MAX_RATIO * size + SMALL
    expect(total <= room, f"{path}: claims {total:,} bytes of samples in a file of {size:,}", f"at most {room:,}")
    with open(path, "rb") as file:
        heap = GlobalHeap(file.fileno())
        for i in np.flatnonzero(wanted):
            length, address, number = pointers[i].tolist()
            offsets[i], stored = heap.locate(address, number)
            if stored < 4 * length:
                raise OSError(f"readout {i} ends early")
    return offsets


def _order_slices(geometry: np.ndarray) -> np.ndarray:
    """Return the order of slices along their normal, by the heads of a readout of each; as numbered if not parallel."""
    normal, position = geometry["slice_dir"].astype(np.float64), geometry["position"].astype(np.float64)
    along = position @ normal[0]
    sound = np.allclose(normal, normal[0], atol=1e-2) and np.isfinite(along).all()
    return np.argsort(along.round(3), kind="stable") if sound else np.arange(len(geometry))


def _place_readouts(head: np.ndarray, header: RawHeader, partitions: int, path: str) -> np.ndarray:
    """Place readouts in the encoded matrix: READOUT without slice, offset and weight."""
    readouts, (samples, width, _) = np.zeros(len(head), READOUT), header.matrix
    idx, label = head["idx"], f"{path}: its"
    readouts["column"] = _shift(idx["kspace_encode_step_1"], header.centres[0], width, f"{label} kspace_encode_step_1")
    if partitions > 1:
        step = idx["kspace_encode_step_2"]
        readouts["partition"] = _shift(step, header.centres[1], partitions, f"{label} kspace_encode_step_2")
    readouts["samples"] = head["number_of_samples"]
    readouts["reverse"] = reverse = head["flags"] & REVERSE != 0
    before, after = head["discard_pre"].astype(np.int32), head["discard_post"].astype(np.int32)
    readouts["first"], last = np.where(reverse, after, before), readouts["samples"] - np.where(reverse, before, after)
    readouts["used"] = last - readouts["first"]
    expect(readouts["used"].min() > 0, f"{label} readouts discard all of their samples", "some that are left")
    for centre in np.unique(head["center_sample"]):  # few: a readout's echo is where the sequence puts it
        same = head["center_sample"] == centre
        ends = np.stack([readouts["first"][same], last[same] - 1])
        readouts["row"][same] = _shift(ends, int(centre), samples, f"{label} samples")[0]
    return readouts


def _shift(indices: np.ndarray, centre: int, size: int, label: str) -> np.ndarray:
    """Shift indices so that the centre is at size // 2; not at all if they only fit so, and the centre was left 0."""
    indices = indices.astype(np.int64)
    low, high = int(indices.min()), int(indices.max())
    for shift in (size // 2 - centre, 0)[: 1 if centre else 2]:
        if low + shift >= 0 and high + shift < size:
            return indices + shift
    raise UserError(f"{label} {low} to {high} have their centre at {centre}, expected places in a matrix of {size}")


def _measured_columns(readouts: np.ndarray, shape: tuple[int, ...], partitions: int, path: str) -> np.ndarray:
    """Return which columns were measured, (1 or slices, width) bool; `UserError` if partitions are missing."""
    lines = np.zeros((shape[0] // partitions, shape[3], partitions), bool)
    lines[readouts["slice"], readouts["column"], readouts["partition"]] = True
    if partitions > 1:
        complete = all(map(is_complete, np.unique(lines.reshape(-1, partitions), axis=0)))
        label = f"{path}: lacks lines of the second phase encoding"
        expect(complete, label, "all of its partitions for each line: only the first may be undersampled")
    columns = np.repeat(lines.any(2), partitions, axis=0)
    return columns[:1] if (columns == columns[0]).all() else columns


def _find_whitening(
    acquisitions: np.ndarray, noise: np.ndarray, image: np.ndarray, offsets: np.ndarray, header: RawHeader, path: str
) -> np.ndarray | None:
    """Return the matrix (coils, coils) that makes the noise white, of sigma 1 (see `mri.noise`); None without any.

    It is the inverse Cholesky factor of the covariance of the noise readouts, scaled to the bandwidth of the image's
    (Kellman and McVeigh, Magn. Reson. Med. 54 (2005) 1439).
    """
    if not noise.any():
        return None
    head = acquisitions["head"]
    coils, label = int(head["active_channels"][image][0]), f"{path}: k-space is not prewhitened, for its noise readouts"
    if np.any(head["active_channels"][noise] != coils):
        logger.warning("%s do not have the %d coils of the image's", label, coils)
        return None
    covariance, count = np.zeros((coils, coils), np.complex128), 0
    with open(path, "rb") as file:
        for i in np.flatnonzero(noise):
            samples = np.empty((coils, int(head["number_of_samples"][i])), np.complex64)
            read_into(file.fileno(), samples, offsets[i])
            covariance += samples.astype(np.complex128) @ samples.conj().T
            count += samples.shape[1]
    try:
        factor = np.linalg.cholesky(covariance / count)
        bandwidths = head["sample_time_us"][image][0] / head["sample_time_us"][noise][0]
        scale = bandwidths * header.noise_bandwidth if 0 < bandwidths < np.inf else 1
        whitening = np.sqrt(2 * scale) * np.linalg.inv(factor)
        if np.isfinite(whitening).all():
            return whitening.astype(np.complex64)
    except np.linalg.LinAlgError:
        pass
    logger.warning("%s have a covariance that is singular or not finite", label)
    return None


def _find_affine(header: RawHeader, geometry: np.ndarray, partitions: int) -> np.ndarray | None:
    """Return the affine of a volume by the heads of a readout of each of its slices; None if there is no sound one."""
    names = ("read_dir", "phase_dir", "slice_dir", "position")
    directions, position = np.split(np.stack([geometry[name] for name in names], 1).astype(np.float64), [3], 1)
    row, column, normal = directions[0]
    orthonormal = np.allclose(directions[0] @ directions[0].T, np.eye(3), atol=1e-2)
    stacked = np.allclose(directions, directions[0], atol=1e-2) and np.isfinite(position).all()
    if not (orthonormal and stacked and min(header.field) > 0):
        return None
    first, last = position[0, 0], position[-1, 0]
    sign = -1 if header.siemens else 1
    row, column = sign * row * header.field[0] / header.matrix[0], sign * column * header.field[1] / header.matrix[1]
    origin = first - row * (header.height // 2) - column * (header.matrix[1] // 2)
    step = normal * header.field[2]
    if partitions > 1:
        step = sign * step / partitions
        origin = origin - step * (partitions // 2)
    elif np.linalg.norm(last - first) > 0:
        step = (last - first) / (len(position) - 1)
    affine = np.eye(4)
    affine[:3] = np.stack([column, row, step, origin], 1)
    affine[:2] *= -1  # ISMRMRD's coordinates point left and back, NIfTI's right and front
    return affine + 0.0  # no negative zeros
