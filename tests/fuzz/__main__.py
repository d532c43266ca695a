"""Treat damaged and hostile files as the commands do, each by its number, and write a table of what came of them.

python -m tests.fuzz [--count=3000] [--first=0] [--verbose] [--output=docs/fuzz.md]    exit status 1 if a file does harm
"""

import argparse
import collections
import contextlib
import io
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mrjax import check, config
from mrjax.data import checks, plausibility
from mrjax.errors import UserError
from mrjax.interop import fastmri, weight_files
from mrjax.io import readers
from mrjax.io.images import ImageReader
from tests.fuzz import dicom, mutations, nifti, numpy_arrays, raw, scans, weights

SECONDS = 5
BATCH = 100  # files that a process makes, and one that treats them
ROOM = 2**28  # bytes beside twice the file's size
SENTENCE, READ = "a sentence", "read"
KINDS = (scans, weights, nifti, dicom, raw, numpy_arrays)
MUTATIONS = tuple(mutation for kind in KINDS for mutation in kind.MUTATIONS)
HARM = ("traceback", "crash", "hang", "memory", "leak")

HEADER = """# Hostile files

Written by `python -m tests.fuzz --count={count} --output=docs/fuzz.md`, which makes damaged and hostile files, each
from its number, and checks, reads and imports them. A file passes if it is refused with an error message of one
sentence ("a sentence"), or read completely with finite numbers ("read"). It fails with a traceback, a crash, more than
5 s of processor time or 50 s of waiting ("hang"), more memory than 256 MB and twice the file, or if data or code from
outside the file's folder is used ("leak").

Not prevented: if the length of a text attribute is damaged, HDF5 may take gigabytes and seconds before it reports an
error; it offers no limit for this.

"""


class Result(NamedTuple):
    """What came of a file."""

    number: int
    kind: str
    outcome: str
    detail: str = ""
    megabytes: float = 0
    seconds: float = 0


def treat(path: Path, output: Path) -> tuple[str, str]:
    """Do with a file what the commands do; return the outcome, and the sentence or what was wrong."""
    try:
        if path.suffix == ".json":
            config.check(config.load(json.loads(path.read_text(errors="replace"))))
        elif path.suffix in weight_files.SUFFIXES and path.stem != "scan":  # an .npz may hold either
            network = fastmri.from_fastmri(weight_files.read(str(path)))
            assert network.params
        else:
            return treat_scan(str(path), output)
    except (UserError, json.JSONDecodeError, RecursionError) as error:
        return (SENTENCE, str(error)) if str(error).isprintable() else ("traceback", f"not printable: {error!r}")
    return READ, ""


def treat_scan(path: str, output: Path) -> tuple[str, str]:
    """Check a scan, and read every slice and write a result as `mrjax.reconstruct` does."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        check.main(["check", path])
    if not all(map(str.isprintable, text.getvalue().splitlines())):
        return "traceback", f"not printable: {text.getvalue()!r}"
    if any("\nFAULT" in f"\n{line}" for line in text.getvalue().splitlines()):
        return SENTENCE, text.getvalue().splitlines()[-2]
    volume, _ = checks.check(readers.describe(path))
    if volume.undersampled:
        plausibility.find_doubt_of_acceleration(volume, [4])
    for name in filter(None, (volume.data, volume.target)):
        for i in range(volume.slices):
            data = readers.reader_for(path).read_slice(path, name, i)
            if not np.isfinite(data).all():
                return "traceback", f"{name} is not finite, and no fault"
            if np.any(data == mutations.SECRET):
                return "leak", name
    reader = readers.reader_for(path)
    readers.READERS["hdf5"].write(output, {"reconstruction": np.ones((1, 4, 4), np.float32)}, {}, volume)
    if isinstance(reader, ImageReader):
        reader.read_slice(path, "kspace", 0)
        if math.prod(volume.shape) < 2**22:  # the results themselves would take the memory
            place = output.with_suffix(reader.image_suffix)
            reader.write(place, {"reconstruction": np.ones(volume.shape, np.float32)}, {}, volume)
    return READ, ""


def memory(name: str) -> int:
    """Return VmRSS, VmHWM (its peak) or VmSize of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def treat_all(files: list[tuple[int, str, Path]], output: Path) -> Iterator[Result]:
    """Treat files, in a process of their own: it ends with the first that crashes or hangs."""
    limit = memory("VmSize") + 2**33
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, kind, path in files:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = memory("VmRSS"), time.process_time()
        # Their signals end the process, wherever it is: seconds of its own, so that a busy machine makes no difference,
        # and for a process that waits.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(10 * SECONDS)
        try:
            outcome, detail = treat(path, output)
        except BaseException as error:
            frame = error.__traceback__
            while frame and frame.tb_next:
                frame = frame.tb_next
            where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else ""
            outcome, detail = "traceback", f"{type(error).__name__} at {where}: {error}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        used, seconds = memory("VmHWM") - before, time.process_time() - start
        if used > 2 * path.stat().st_size + ROOM:
            outcome = "memory"
        yield Result(number, kind, outcome, ascii(detail)[:500], used / 2**20, seconds)


def in_process(results: Iterator[Result]) -> Iterator[Result]:
    """Yield what another process yields, and last `Result(-1, "", signal's name)` if it was killed."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.close(read)
            with open(write, "w") as stream:
                for result in results:
                    print(json.dumps(result), file=stream, flush=True)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(write)
    with open(read) as stream:
        for line in stream:
            yield Result(*json.loads(line))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        yield Result(
            -1, "", "hang" if -status in (signal.SIGALRM, signal.SIGPROF) else "crash", f"exit status {status}"
        )


def make_all(numbers: range, folder: Path) -> Iterator[Result]:
    """Make files, the same of a number each time, each in a folder of its own; their paths are the details, in hex."""
    for number in numbers:
        mutate, place = MUTATIONS[number % len(MUTATIONS)], folder / f"{number}"
        place.mkdir()
        with np.errstate(all="ignore"):
            path = mutate(np.random.default_rng(number), place)
        yield Result(number, mutate.__name__.replace("_", " "), "made", os.fsencode(path).hex())


def run(numbers: range, folder: Path) -> Iterator[Result]:
    """Make files and treat them."""
    made = list(in_process(make_all(numbers, folder)))
    assert len(made) == len(numbers), made[-1]
    files = [(one.number, one.kind, Path(os.fsdecode(bytes.fromhex(one.detail)))) for one in made]
    while files:
        for result in in_process(treat_all(files, folder / "result.t5")):
            number, kind, path = files.pop(0) if files else (-1, "none", folder)
            if (path.parent / "harm").exists():
                result = result._replace(outcome="leak", detail="code of the file has run")
            yield result._replace(number=number, kind=kind)


def table(results: list[Result]) -> str:
    """Format a line for each kind of mutation."""
    head = ("mutation", "files", SENTENCE, READ, *HARM, "most memory, MB", "longest, s")
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    kinds = [*sorted({result.kind for result in results}), "all"]
    for kind in kinds:
        of_kind = [result for result in results if kind in (result.kind, "all")]
        counts = collections.Counter(result.outcome for result in of_kind)
        peak, longest = max(r.megabytes for r in of_kind), max(r.seconds for r in of_kind)
        numbers = (len(of_kind), *(counts[name] for name in (SENTENCE, READ, *HARM)), f"{peak:.0f}", f"{longest:.1f}")
        lines.append(f"| {kind} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def main() -> int:
    """Treat the files, print the table and what did harm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    results: list[Result] = []
    last = arguments.first + arguments.count
    for first in range(arguments.first, last, BATCH):
        with tempfile.TemporaryDirectory() as name:
            mutations.make_outside(Path(name))
            for result in run(range(first, min(first + BATCH, last)), Path(name)):
                results.append(result)
                if result.outcome in HARM or arguments.verbose:
                    print(*result, flush=True)
    text = table(results)
    print(text)
    if arguments.output:
        arguments.output.write_text(HEADER.format(count=len(results)) + text + "\n")
    return int(any(result.outcome in HARM for result in results))


if __name__ == "__main__":
    sys.exit(main())
