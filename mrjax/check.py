"""Reads .t5 files from end to end and says what is in them and what is wrong.

python -m mrjax.check PATH...      files, folders or globs; exit status 1 if anything is wrong
"""

from mrjax import cli
from mrjax.data import checks, readers
from mrjax.data.volume import Volume
from mrjax.errors import UserError


def check(paths: list[str]) -> tuple[list[Volume], list[str]]:
    """The volumes that could be described, and a sentence for every fault."""
    volumes, faults = [], []
    for path in paths:
        try:
            volume, found = checks.check(readers.describe(path))
            found += checks.describe_empty_slices(volume)
        except UserError as error:
            faults.append(str(error))
            continue
        if volume.layout == "paired" and not volume.target:
            found.append(f"{path}: has no data set `target` beside `input`, which training and evaluation need")
        volumes.append(volume)
        faults += found
    return volumes, faults


def table(volumes: list[Volume]) -> str:
    """One line a volume: file, layout, shape, dtype, contrast, slices, true image, maximum."""
    rows = [("file", "layout", "shape", "dtype", "contrast", "slices", "true image", "maximum")]
    for v in volumes:
        shape = " x ".join(map(str, v.shape[1:]))
        target = v.target or ("computed" if v.layout == "kspace" and not v.undersampled else "none")
        maximum = "-" if v.maximum is None else f"{v.maximum:.4g}"
        rows.append((v.path, v.layout, shape, v.dtype, v.contrast, str(v.slices), target, maximum))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(argv: list[str]) -> int:
    """Prints the table, then the faults; 1 if there are any."""
    if len(argv) < 2:
        raise UserError("nothing to check, expected a file or folder: python -m mrjax.check PATH...")
    paths, faults = [], []
    for where in argv[1:]:
        try:
            paths += readers.find(where)
        except UserError as error:
            faults.append(str(error))
    volumes, found = check(paths)
    faults += found
    if volumes:
        print(table(volumes))
    for fault in faults:
        print(f"FAULT  {fault}")
    files = "1 file" if len(paths) == 1 else f"{len(paths)} files"
    print(f"{files} read, {len(faults)} fault{'' if len(faults) == 1 else 's'}")
    return 1 if faults else 0


if __name__ == "__main__":
    cli.run(main)
