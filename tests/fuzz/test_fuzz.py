"""Damaged and hostile files do no harm: 200 of the 3,000 whose outcome docs/fuzz.md lists."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz import dicom, nifti, numpy_arrays, raw, scans, weights
from tests.fuzz.__main__ import MUTATIONS, READ, treat

# What five files do instead of being read: nothing, crash, hang, take 512 MB, raise.
DEEDS = """
import os, sys
from pathlib import Path
from tests.fuzz import __main__ as fuzz
deeds = [lambda: None, os.abort, lambda: [0 for _ in iter(int, 1)], lambda: len(bytes([1]) * 2**29), lambda: 1 / 0]
fuzz.SECONDS, fuzz.treat = 4, lambda path, output: (deeds[int(path.parent.name)](), (fuzz.READ, ""))[1]
print(*(result.outcome for result in fuzz.run(range(5), Path(sys.argv[1]))))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True)


@pytest.mark.slow
def test_200_mutated_files_end_with_a_sentence_or_are_read() -> None:
    done = run("-m", "tests.fuzz", "--count=200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 2 + len(MUTATIONS) + 1


@pytest.mark.slow
def test_harm_is_seen(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    done = run("-c", DEEDS, str(tmp_path))
    assert done.stdout.split() == ["read", "crash", "hang", "memory", "traceback"], done.stderr


@pytest.mark.parametrize("seed", range(8))
def test_the_files_are_read_before_they_are_mutated(tmp_path: Path, seed: int) -> None:
    writers = scans.write_scan, weights.write_weights, nifti.write_nifti, dicom.write_dicom, raw.write_raw
    for write in (*writers, numpy_arrays.write_numpy):
        assert treat(write(np.random.default_rng(seed), tmp_path), tmp_path / "result.t5") == (READ, "")
