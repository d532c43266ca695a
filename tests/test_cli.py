"""What all commands do before they start."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

_COUNT_HEAPS = """
import ctypes, sys, threading
from mrjax import cli
cli.limit_malloc_arenas()
libc, barrier = ctypes.CDLL(None), threading.Barrier(8)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
def allocate():
    barrier.wait()  # all are there at the same time
    libc.malloc(ctypes.c_size_t(1000))
    barrier.wait()
threads = [threading.Thread(target=allocate) for _ in range(8)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file), libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")
@pytest.mark.parametrize(("chosen", "expected"), [({}, 1), ({"MALLOC_ARENA_MAX": "3"}, 3)])
def test_all_threads_allocate_from_one_heap_unless_the_user_says_otherwise(
    chosen: dict[str, str], expected: int, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1])} | chosen
    subprocess.run(
        [sys.executable, "-c", _COUNT_HEAPS, str(tmp_path / "info")], env=environment, check=True, timeout=60
    )
    assert (tmp_path / "info").read_text().count("<heap nr=") == expected
