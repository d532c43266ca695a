"""Check files: read them from end to end, print a table of what they hold, and a line for each fault or doubt.

python -m mrjax.check PATH... [--config.data.FIELD=VALUE]     files, folders or globs; exit status 1 if there is a fault
"""

from absl import flags
from ml_collections import ConfigDict

from mrjax import cli
from mrjax import config as configs
from mrjax.data import checks, plausibility
from mrjax.data.splits import storage_of
from mrjax.errors import UserError, expect, printable
from mrjax.io import readers
from mrjax.io.images import ImageReader
from mrjax.io.storage import NATIVE, Storage
from mrjax.io.volume import Volume


def check(
    paths: list[str], storage: Storage = NATIVE, image_size: tuple[int, ...] = ()
) -> tuple[list[Volume], list[str], list[str]]:
    """Describe and check files: the volumes that could be described, and a sentence for each fault and each doubt.

    A doubt about several files is one sentence. `image_size` is config.data.image_size.
    """
    volumes: list[Volume] = []
    faults: list[str] = []
    doubted: dict[str, list[str]] = {}  # files by what is doubtful about them
    for path in paths:
        try:
            volume, found = checks.check(_describe(path, storage))
        except UserError as error:
            faults.append(str(error))
            continue
        except MemoryError as error:
            faults.append(f"{path}: takes more memory than there is ({error})")
            continue
        volumes.append(volume)
        faults += found
        doubts = [] if found else plausibility.find_doubts(volume, image_size)
        if empty := checks.describe_empty_slices(volume):
            (doubts if volume.full_slices else faults).append(empty)
        for doubt in doubts:
            doubted.setdefault(doubt.removeprefix(path), []).append(path)
        if volume.layout == "paired" and not volume.target:
            faults.append(f"{path}: has no data set `target` beside `input`, which training and evaluation need")
    lines = [
        f"{first}{doubt}" + f" (and {len(more)} more files)" * bool(more) for doubt, (first, *more) in doubted.items()
    ]
    return volumes, faults, lines


def _describe(path: str, storage: Storage) -> Volume:
    """Describe a file as training takes it: images without a target are those that k-space is simulated from."""
    volume = readers.describe(path, storage=storage)
    simulable = volume.layout == "image" and isinstance(readers.reader_for(path), ImageReader)
    return readers.describe(path, "kspace", storage) if simulable else volume


def format_table(volumes: list[Volume]) -> str:
    """Format a table with a line for each volume."""
    rows = [("file", "layout", "shape", "dtype", "contrast", "slices", "target", "maximum")]
    for volume in volumes:
        shape = " x ".join(map(str, volume.shape[1:]))
        layout = volume.layout + ", undersampled" * volume.undersampled + ", simulated" * volume.simulated
        target = volume.target or ("computed" if layout == "kspace" else "none")
        maximum = "-" if volume.maximum is None else f"{volume.maximum:.4g}"
        head = (printable(volume.path), layout, shape, volume.dtype, volume.contrast)
        rows.append((*head, str(volume.slices), target, maximum))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(argv: list[str], config: ConfigDict | None = None) -> int:
    """Print the table, then doubts and faults; return 1 if there are faults."""
    expect(argv[1:], "nothing to check", "a file or folder: python -m mrjax.check PATH...")
    config = config or configs.defaults()
    configs.check(config)
    paths, faults = [], []
    for pattern in argv[1:]:
        try:
            paths += readers.find(pattern)
        except UserError as error:
            faults.append(str(error))
    volumes, found, doubts = check(paths, storage_of(config.data), tuple(config.data.image_size))
    faults += found
    if volumes:
        print(format_table(volumes))
    for label, sentences in (("WARNING", doubts), ("FAULT", faults)):
        for sentence in sentences:
            print(f"{label}  {printable(sentence)}")
    files = "1 file" if len(paths) == 1 else f"{len(paths)} files"
    print(f"{files} read, {len(faults)} fault{'' if len(faults) == 1 else 's'}")
    return 1 if faults else 0


if __name__ == "__main__":
    cli.run(lambda argv: main(argv, flags.FLAGS.config), cli.define_fields, arguments=True)
