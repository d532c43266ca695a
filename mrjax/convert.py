"""Convert volumes of any format.

    python -m mrjax.convert INPUT... --output=FOLDER [--format=t5] [--keep_identity] [--config.data.FIELD=VALUE]

An INPUT is a file, a folder, whose subfolders are kept below the output, or a glob. Files count by their contents.
Formats are those of `io.readers.READERS` that can be written. Fields of config.data say how files store their arrays.

A .t5 holds what the source does: k-space with its mask, pairs, or images. In a format of images, k-space becomes its
root-sum-of-squares image, and pairs become two files of one name, in input/ and target/. Geometry is kept. What
identifies the patient is left out unless --keep_identity, but for the header and attributes of a .t5, which are copied.

What was not converted is listed, and makes the exit status 1. In the output this command replaces what it wrote itself
(listed in FOLDER/.converted), unless that was changed since, and nothing else.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tqdm
from absl import flags
from ml_collections import ConfigDict

from mrjax import cli
from mrjax import config as configs
from mrjax.data.splits import storage_of
from mrjax.errors import UserError, expect, printable
from mrjax.io import readers
from mrjax.io.files import identity
from mrjax.io.storage import PARALLEL_FOLDERS
from mrjax.io.volume import DATA_NAMES, TARGET_NAMES, Volume
from mrjax.mri.fourier import magnitude_host

Arrays = dict[str, np.ndarray]
RESULTS = ".converted"  # in the output, a line for each result: its path there and its `files.identity`
PAIR = PARALLEL_FOLDERS[-1]  # folders of inputs and of targets


def formats() -> dict[str, str]:
    """Return the formats that can be written, each with its name in `READERS`."""
    names = [name for name, reader in readers.READERS.items() if reader.image_suffix and name != "hdf5"]
    return {"t5": "hdf5"} | dict(zip(names, names, strict=True))


class Output:
    """The folder of the results, in which nothing but results of this command is replaced."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._inputs: set[Path] = set()
        self._sources: dict[Path, str] = {}
        self._known: dict[str, list[int]] = {}
        if (folder / RESULTS).exists():
            for line in (folder / RESULTS).read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError):  # the last line of a run that was killed
                    name, *file = json.loads(line)
                    self._known[name] = file

    def protect(self, inputs: Iterable[str]) -> None:
        """Let no result replace an input, or a folder that holds one."""
        resolved = [Path(path).resolve() for path in inputs]
        self._inputs = {place for path in resolved for place in (path, *path.parents)}

    def holds_result(self, path: str) -> bool:
        """Tell whether a path is that of a result, unchanged since it was written."""
        name = os.path.relpath(os.path.realpath(path), os.path.realpath(self._folder))
        return os.path.lexists(path) and self._known.get(name) == list(identity(os.lstat(path)))

    def claim(self, name: Path, source: str) -> Path:
        """Return the path of a result; raises `UserError` if something else is there that must not be replaced."""
        place = self._folder / name
        other = self._sources.setdefault(place, source)
        expect(other == source, f"{source}: would be written to {place}, as {other} is", "names that differ")
        found = f"{source}: would be written to {place}, which"
        expect(place.resolve() not in self._inputs, f"{found} is an input", "another --output")
        free = not os.path.lexists(place) or self.holds_result(str(place))
        expect(free, f"{found} this command did not write, or which was changed since", "another --output")
        return place

    def add(self, name: Path) -> None:
        """Note a result as written."""
        with open(self._folder / RESULTS, "a") as file:
            file.write(json.dumps([str(name), *identity(os.stat(self._folder / name))]) + "\n")


def convert_file(volume: Volume, folder: Path, output: Output, form: str, keep_identity: bool) -> list[Path]:
    """Convert a volume into a folder below the output; return the results' paths there."""
    reader = readers.READERS[formats()[form]]
    name = folder / f"{volume.name}{reader.image_suffix}"
    if form == "t5":
        results = {name: _stored_arrays(volume)}
    else:
        images = _images(volume)
        results = {_in_folder(name, side): {DATA_NAMES["image"]: image} for side, image in images.items()}
    for place, arrays in results.items():
        reader.write(output.claim(place, volume.path), arrays, {}, volume, keep_identity)
        output.add(place)
    return list(results)


def _stored_arrays(volume: Volume) -> Arrays:
    """Read all arrays of a volume, by the names of a .t5."""
    arrays = {DATA_NAMES[volume.layout]: readers.read_slices(volume.path, volume.data, volume.slices)}
    if volume.target:
        known = volume.target in TARGET_NAMES[volume.layout]
        arrays[volume.target if known else "target"] = readers.read_slices(volume.path, volume.target, volume.slices)
    if (mask := volume.stored_mask) is not None:
        # With its rows where it differs between slices: as many slices as rows would be taken for these.
        shape = mask.shape if len(mask) == 1 else (len(mask), *volume.data_shape)
        arrays["mask"] = np.broadcast_to(mask, shape).astype(np.uint8)
    return arrays


def _images(volume: Volume) -> Arrays:
    """Make the images of a volume (slices, height, width), those of a pair by the folders they belong to."""
    if volume.layout != "kspace":
        names = {"": volume.data}
        if volume.target:
            names = {PAIR[0]: volume.data, PAIR[1]: volume.target}
        images = {side: readers.read_slices(volume.path, name, volume.slices) for side, name in names.items()}
        return {side: np.abs(image) if image.dtype.kind == "c" else image for side, image in images.items()}
    reader, slices = readers.reader_for(volume.path), []
    for i in range(volume.slices):
        kspace = reader.read_slice(volume.path, volume.data, i).reshape(volume.shape[1:])
        mask = volume.mask_of_slice(i) if volume.undersampled else None
        slices.append(magnitude_host(kspace if mask is None else np.where(mask, kspace, 0)))
    return {"": np.stack(slices)}


def _in_folder(name: Path, side: str) -> Path:
    """Return the place of one of a pair: in a folder of its side, in the place of the input's folder if it has one."""
    if not side:
        return name
    *folders, last = name.parts
    if PAIR[0] not in folders:
        return Path(side) / name
    place = len(folders) - 1 - folders[::-1].index(PAIR[0])
    return Path(*folders[:place], side, *folders[place + 1 :], last)


def find(patterns: Sequence[str], output: Output) -> tuple[dict[str, Path], list[str]]:
    """Find volumes, each with its folder below the folder or glob it was found in; and a sentence for each fault.

    Results are no inputs, unless they are named.
    """
    found: dict[str, Path] = {}
    faults = []
    for pattern in patterns:
        root = pattern
        while not os.path.isdir(root or "."):
            root = os.path.dirname(root)
        try:
            for path in readers.find(pattern):
                if path == pattern or not output.holds_result(path):
                    folder = "." if path == root else os.path.relpath(os.path.dirname(path) or ".", root or ".")
                    found.setdefault(path, Path(folder))
        except UserError as error:
            faults.append(str(error))
    return found, faults


def main(argv: list[str], config: ConfigDict | None = None) -> int:
    """Convert all volumes and print a line for each; return 1 if some were not converted."""
    expect(argv[1:], "nothing to convert", "a file or folder: python -m mrjax.convert INPUT... --output=FOLDER")
    config = config or configs.defaults()
    configs.check(config)
    values = flags.FLAGS
    output, lines = Output(Path(values.output)), []
    found, faults = find(argv[1:], output)
    output.protect(found)
    for path, folder in tqdm.tqdm(found.items(), unit="volume", disable=None):
        try:
            volume = readers.describe(path, storage=storage_of(config.data))
            for place in convert_file(volume, folder, output, values.format, values.keep_identity):
                lines.append(f"{path} -> {Path(values.output) / place}")
        except UserError as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(f"{path}: cannot be converted ({error})")
        except MemoryError as error:
            faults.append(f"{path}: takes more memory than there is ({error})")
    for line in (*lines, *(f"NOT CONVERTED  {fault}" for fault in faults)):
        print(printable(line))
    print(f"written: {len(lines)}, not converted: {len(faults)}")
    return 1 if faults else 0


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "folder for the results", required=True)
    flags.DEFINE_enum("format", "t5", list(formats()), "of the results")
    flags.DEFINE_bool("keep_identity", False, "whether results keep what identifies the patient")
    cli.run(lambda argv: main(argv, flags.FLAGS.config), cli.define_fields, arguments=True, one_process=True)
