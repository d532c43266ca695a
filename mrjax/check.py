"""Check files: read them from end to end, print a table of what they hold and a line for each fault.

python -m mrjax.check PATH...      files, folders or globs; exit status 1 if there is a fault
"""

from mrjax import cli
from mrjax.data import checks, readers
from mrjax.data.volume import Volume
from mrjax.errors import UserError, expect


def check(paths: list[str]) -> tuple[list[Volume], list[str]]:
    """Describe and check files: the volumes that could be described, and a sentence for each fault."""
    volumes, faults = [], []
    for path in paths:
        try:
            volume, found = checks.check(readers.describe(path))
        except UserError as error:
            faults.append(str(error))
            continue
        volumes.append(volume)
        faults += filter(None, (*found, checks.describe_empty_slices(volume)))
        if volume.layout == "paired" and not volume.target:
            faults.append(f"{path}: has no data set `target` beside `input`, which training and evaluation need")
    return volumes, faults


def format_table(volumes: list[Volume]) -> str:
    """Format a table with a line for each volume."""
    rows = [("file", "layout", "shape", "dtype", "contrast", "slices", "target", "maximum")]
    for volume in volumes:
        shape = " x ".join(map(str, volume.shape[1:]))
        layout = f"{volume.layout}, undersampled" if volume.undersampled else volume.layout
        target = volume.target or ("computed" if layout == "kspace" else "none")
        maximum = "-" if volume.maximum is None else f"{volume.maximum:.4g}"
        head = (volume.path, layout, shape, volume.dtype, volume.contrast)
        rows.append((*head, str(volume.slices), target, maximum))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(argv: list[str]) -> int:
    """Print the table, then the faults; return 1 if there are any."""
    expect(argv[1:], "nothing to check", "a file or folder: python -m mrjax.check PATH...")
    paths, faults = [], []
    for pattern in argv[1:]:
        try:
            paths += readers.find(pattern)
        except UserError as error:
            faults.append(str(error))
    volumes, found = check(paths)
    faults += found
    if volumes:
        print(format_table(volumes))
    for fault in faults:
        print(f"FAULT  {fault}")
    files = "1 file" if len(paths) == 1 else f"{len(paths)} files"
    print(f"{files} read, {len(faults)} fault{'' if len(faults) == 1 else 's'}")
    return 1 if faults else 0


if __name__ == "__main__":
    cli.run(main, arguments=True)
