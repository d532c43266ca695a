"""Run several processes as one: connect them, stop them after the same step, end all if one is lost.

The processes of a run are those of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, the tasks of a SLURM
step, or the hosts of a Cloud TPU slice (launch/). Elsewhere a process runs alone, and everything here does nothing.
"""

import contextlib
import functools
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed as runtime  # its client, for barriers that take no device, has no public name
from jax.experimental import multihost_utils

from mrjax.errors import UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HEARTBEAT_TIMEOUT = 25  # seconds; a process that fails waits once as long, and within a minute all must have ended
T = TypeVar("T")
ONE_DAY = 24 * 3600 * 1000  # milliseconds
_ONE_REQUEST = 2.0  # seconds in which signals are one request: SLURM sends one to each process, a parent another


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Connect this process to the others of its run, if any, before it uses a device; disconnect at the end.

    An error inside the block ends this process: with status 2 if it is the user's, otherwise with 1. JAX's coordination
    service then aborts the others within a minute, and its message names the lost one ("task") by its number. Processes
    other than the first log warnings and errors only, with their number.
    """
    if not _connect():
        yield
        return
    process_id, name = runtime.global_state.process_id, ""
    if process_id:
        name = f"process {process_id} of {runtime.global_state.num_processes}: "
        logger = logging.getLogger("mrjax")
        logger.setLevel(logging.WARNING)
        for handler in logger.handlers:
            handler.setFormatter(logging.Formatter(f"{name}%(message)s"))
    try:
        count_on_this_machine()  # kept from now on: later one process may ask alone
        yield
    except (UserError, OSError) as error:
        print(f"mrjax: {name}{UserError(str(error))}", file=sys.stderr)
        _exit(2, timeout=5)
    except BaseException as error:
        traceback.print_exc()
        # The loss of another process looks like a failed collective here: the service needs this long to name it.
        _exit(1, timeout=HEARTBEAT_TIMEOUT + 3 if isinstance(error, Exception) else 5)
    jax.distributed.shutdown()


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Let process 0 run the block alone and the others after it, so that they find what it wrote."""
    client: Any = runtime.global_state.client
    if client and jax.process_index():
        client.wait_at_barrier("mrjax/first", ONE_DAY)
    yield
    if client and not jax.process_index():
        client.wait_at_barrier("mrjax/first", ONE_DAY)


@functools.cache
def count_on_this_machine() -> int:
    """Count the processes of the run that share this machine, by its host name."""
    client: Any = runtime.global_state.client
    if client is None:
        return 1
    machine = f"mrjax/machines/{socket.gethostname()}/"
    client.key_value_set(f"{machine}{runtime.global_state.process_id}", "")
    client.wait_at_barrier("mrjax/machines", ONE_DAY)
    return len(client.key_value_dir_get(machine))


class StopRequested(Exception):
    """A signal asked the run to stop, in the middle of something that is done again after the next start."""


def until_stopped(batches: Iterator[T], should_stop: Callable[[], bool]) -> Iterator[T]:
    """Yield batches; raise `StopRequested` before the first one at which `should_stop` says so."""
    for batch in batches:
        if should_stop():
            raise StopRequested
        yield batch


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether to stop now, as SIGTERM or Ctrl-C asked any process.

    All processes must call it equally often, after every step and between the batches of a validation: it then returns
    the same in all, and communicates only after a signal. Another signal, two seconds later, ends a process at once.
    """
    several = jax.distributed.is_initialized()
    asked, calls, first = threading.Event(), itertools.count(1), 0.0
    # Among several processes JAX handles SIGTERM: it tells the others, and they agree on a call.
    signals = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        first = first or time.monotonic()
        if time.monotonic() - first > _ONE_REQUEST:
            signal.signal(number, previous[signal.Signals(number)])
            os.kill(os.getpid(), number)
        elif several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            asked.set()

    def should_stop() -> bool:
        if several and not asked.is_set() and multihost_utils.reached_preemption_sync_point(next(calls)):
            asked.set()
        return asked.is_set()

    previous = {number: signal.signal(number, handle) for number in signals}
    try:
        yield should_stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def require_one_process(command: str) -> None:
    """Raise a `UserError`, in the first process only, if a command for one process was started as several."""
    process_id, num_processes = find_processes()
    if process_id:
        sys.exit(2)
    if num_processes > 1:
        raise UserError(
            f"{command} runs as one process, found {num_processes} (by the variables of SLURM or {VARIABLES[1]}); "
            "start it without srun, or with srun --ntasks=1"
        )


def find_processes() -> tuple[int, int]:
    """Return this process's number and the number of processes, as the launcher's environment variables say.

    Raises `UserError` if the variables are incomplete, or contradict each other.
    """
    values = [os.environ.get(name, "") for name in VARIABLES]
    if all(values):
        _, num_processes, process_id = values
        if process_id.isdigit() and num_processes.isdigit() and int(process_id) < int(num_processes):
            return int(process_id), int(num_processes)
        raise UserError(
            f"JAX_PROCESS_ID is {process_id!r} and JAX_NUM_PROCESSES {num_processes!r}, expected a number below a count"
        )
    if count := os.environ.get("SLURM_STEP_NUM_TASKS"):  # srun sets it; SLURM_NTASKS is set in the job's shell as well
        return int(os.environ["SLURM_PROCID"]), int(count)
    if any(values):
        raise UserError(f"only some of {', '.join(VARIABLES)} are set, expected all")
    return 0, 1


def _connect() -> bool:
    """Connect to the coordination service, which process 0 runs; return False if this process is alone."""
    process_id, num_processes = find_processes()
    several = num_processes > 1
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    if not several and "tpu" not in (platforms or ""):  # JAX sets it on a TPU host that has libtpu
        return False
    try:
        jax.distributed.initialize(
            num_processes=num_processes if several else None,  # None: JAX asks the TPU's metadata
            process_id=process_id if several else None,
            cluster_detection_method="deactivate" if VARIABLES[2] in os.environ else None,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except ValueError:
        if several:
            raise
    return jax.distributed.is_initialized()  # False on a TPU host that belongs to no pod, such as a notebook's


def _exit(status: int, timeout: int) -> NoReturn:
    """End this process without Python's clean-up, in which JAX would wait minutes for the others to end as well.

    Processes that fail alike within `timeout` seconds disconnect first, so that none is aborted for another.
    """
    sys.stdout.flush()
    client: Any = runtime.global_state.client
    try:
        client.wait_at_barrier("mrjax/failed", timeout * 1000)
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError:
        time.sleep(1)  # the service says which process is lost just after the barrier has failed
    os._exit(status)
