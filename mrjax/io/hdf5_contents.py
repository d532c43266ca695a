"""What an HDF5 file holds, and whether it can be true: a file may be damaged, or made to do harm.

HDF5 itself would open any file that a link names, and allocate whatever a header claims.
"""

import collections
import contextlib
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import h5py
from h5py import h5d, h5g, h5l, h5o, h5z

from mrjax.errors import UserError, expect
from mrjax.parallel.memory import available_memory

MAX_OBJECTS = 10_000
MAX_DEPTH = 32  # of groups in groups
MAX_SLICE_RATIO, MAX_RATIO = 4, 64  # how much a slice, and all of a data set, may be compressed
SMALL_SLICE, SMALL = 2**25, 2**28  # bytes beyond that, which every file may claim
WORKING_SLICES = 8  # memory that the checks of a slice take, in slices
MOST_GZIP = 1032  # bytes that one of gzip's unpacks to
LEAST_READ = 2**16  # bytes that are read while HDF5 looks for a slice or chunk


class Link(NamedTuple):
    """A link to a data set in another file of the same folder."""

    path: str
    name: str


def find_data_sets(file: h5py.File, path: str) -> dict[str, h5py.Dataset | Link]:
    """Find the data sets of the file `path` by their paths in it, those in groups last, without leaving its folder.

    Cells of MATLAB are left out. Raises a `UserError` for too many objects, and for links out of the folder.
    """
    found: dict[str, h5py.Dataset | Link] = {}
    soft: dict[str, str] = {}
    groups = collections.deque([("", file["/"].id)])
    seen, count = {h5o.get_info(groups[0][1]).addr}, 0
    while groups:
        prefix, group = groups.popleft()
        for link in group:
            name, kind, count = prefix + os.fsdecode(link), group.links.get_info(link).type, count + 1
            expect(count <= MAX_OBJECTS, f"{path}: holds more than {MAX_OBJECTS} objects", "a volume")
            if name.startswith("#"):  # MATLAB keeps cells there
                continue
            if kind == h5l.TYPE_SOFT:
                target = os.fsdecode(group.links.get_val(link))
                soft[name] = target.lstrip("/") if target.startswith("/") else prefix + target
            elif kind == h5l.TYPE_EXTERNAL:
                found[name] = Link(*map(os.fsdecode, group.links.get_val(link)))
            elif kind == h5l.TYPE_HARD:
                item = h5o.open(group, link)
                if isinstance(item, h5d.DatasetID):
                    found[name] = h5py.Dataset(item)
                elif isinstance(item, h5g.GroupID) and (address := h5o.get_info(item).addr) not in seen:
                    expect(name.count("/") < MAX_DEPTH, f"{path}: nests more than {MAX_DEPTH} groups", "a volume")
                    seen.add(address)
                    groups.append((f"{name}/", item))
    return found | {name: found[target] for name, target in soft.items() if target in found}


def resolve(link: Link, path: str) -> str:
    """Return the path of the file that a link in the file `path` names; `UserError` if it lies in another folder."""
    folder = Path(path).parent.resolve()
    other = (folder / link.path).resolve()
    expect(
        other.is_relative_to(folder) and other.is_file(),
        f"{path}: links to `{link.name}` of {link.path}",
        "links to files in its own folder alone",
    )
    return str(other)


def require_honest(data: h5py.Dataset, path: str, name: str, axis: int | None) -> None:
    """Raise a `UserError` for a data set that claims more than its file can hold, or that cannot be read from it alone.

    `axis` is that of the slices, None if all of the data set is read at once.
    """
    label, creation = f"{path}: `{name}`", data.id.get_create_plist()
    alone = creation.get_external_count() == 0 and creation.get_layout() != h5d.VIRTUAL
    expect(alone, f"{label} has its samples in other files", "all in one, as h5repack writes it")
    filters = [creation.get_filter(i) for i in range(creation.get_nfilters())]
    for code, _, _, filter_name in filters:
        found = f"{label} is compressed by the HDF5 filter {code} ({os.fsdecode(filter_name)}), which is not installed"
        expect(h5z.filter_avail(code), found, "gzip or no compression, as h5repack writes it")
    size, of_slice = os.path.getsize(path), [n for i, n in enumerate(data.shape) if i != axis]
    of_chunk = data.chunks or data.shape
    chunk = data.dtype.itemsize * (math.prod(of_chunk) if data.chunks else 0)
    need = max(data.dtype.itemsize * math.prod(of_slice), chunk)
    room = MAX_SLICE_RATIO * size + SMALL_SLICE
    expect(need <= room, f"{label} claims {need:,} bytes a slice or chunk in a file of {size:,}", f"at most {room:,}")
    room = available_memory() // WORKING_SLICES
    expect(need <= room, f"{label} claims {need:,} bytes a slice or chunk", f"at most {room:,}, for want of memory")
    # To read a slice, HDF5 reads all chunks that it touches, whole.
    chunks = math.prod(-(-n // part) for i, (n, part) in enumerate(zip(data.shape, of_chunk, strict=True)) if i != axis)
    read = chunks * max(chunk, LEAST_READ) if data.chunks else max(need, LEAST_READ)
    read, room = read * (1 if axis is None else data.shape[axis]), MAX_RATIO * size + SMALL
    expect(read <= room, f"{label} takes {read:,} bytes to be read from a file of {size:,}", f"at most {room:,}")
    if gzip := [place for place, (code, *_) in enumerate(filters) if code == h5z.FILTER_DEFLATE]:
        inflated = len(gzip) == 1 and _inflates_to(data, gzip[0], chunk, room // 8)
        expect(inflated, f"{label} has a chunk whose gzip stream holds more than the chunk", "as many bytes")


def _inflates_to(data: h5py.Dataset, place: int, size: int, harmless: int) -> bool:
    """Whether no chunk holds more than `size` bytes once inflated: HDF5 would inflate it without a limit.

    `place` is that of gzip among the filters. Chunks that cannot inflate to more than `harmless` bytes are not tried.
    """
    large: list[h5d.StoreInfo] = []
    data.id.chunk_iter(lambda one: large.append(one) if one.size * MOST_GZIP > harmless else None)
    for one in large:
        if one.filter_mask & 1 << place:  # not compressed
            continue
        with contextlib.suppress(zlib.error):  # which a read of the slice will report
            packed = data.id.read_direct_chunk(one.chunk_offset)[1]
            if len(zlib.decompressobj().decompress(packed, size + 1)) > size:
                return False
    return True


def find_data_set(file: h5py.File, path: str, name: str) -> h5py.Dataset:
    """Return a data set of the file `path` itself by its path in it; `UserError` if there is none."""
    found = find_data_sets(file, path).get(name.strip("/"))
    if not isinstance(found, h5py.Dataset):
        raise UserError(f"{path}: has no data set `{name}`, expected the one that another file links to")
    return found
