"""Several processes as one run: they start together, stop at the same step, and none outlives another's loss.

Where several processes are found, in this order:
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID   launch/processes.sh, launch/kubernetes.yaml
  a SLURM step of several tasks                                  launch/slurm.sbatch
  a Cloud TPU host                                               launch/tpu_pod.sh
Elsewhere a process runs alone, and everything here does nothing.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, cast

import jax
from jax._src import distributed as runtime  # the key-value store and the list of the living have no public name
from jax.experimental import multihost_utils

from mrjax.errors import UserError

logger = logging.getLogger("mrjax")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SILENCE = 30  # seconds without a sign of life after which a process counts as lost
DAY = 24 * 3600 * 1000  # milliseconds
AGAIN = "the same command, started again, goes on from the last checkpoint"
_ending = threading.Lock()  # whoever holds it ends this process


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Joins the other processes of a run, where there are any, before a device is touched; leaves with them.

    Inside, an error in one process, or its loss, ends all of them: each says which one it was, none hangs. Other
    processes than the first log nothing below warnings, with their number.

    Raises:
      UserError: the variables that describe the processes are incomplete.
    """
    if not _join():
        yield
        return
    watch = _Watch()
    try:
        yield
    except (UserError, OSError) as error:
        watch.stop(2, " ".join(str(error).split()))
    except BaseException as error:
        # From here, the loss of another process looks like a collective that broke off: `_Watch` knows the cause.
        time.sleep(0 if isinstance(error, KeyboardInterrupt | SystemExit) else SILENCE + 10)
        traceback.print_exc()
        watch.stop(1, f"{type(error).__name__}: {str(error)[:500]}")
    watch.leave()


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Lets process 0 go through the block alone, the others after it, so that they find what it made."""
    client = cast(Any, runtime.global_state.client)
    if client and jax.process_index():
        client.wait_at_barrier("mrjax/first", DAY)
    yield
    if client and not jax.process_index():
        client.wait_at_barrier("mrjax/first", DAY)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[int], bool]]:
    """A function of the step just done: whether SIGTERM or Ctrl-C asked to stop, to any process, after this step.

    All processes are told so at the same step, which is asked of no device and no network while nothing has come. The
    function must be called after every step. A second signal ends a process at once.
    """
    several = runtime.global_state.client is not None
    event = threading.Event()
    # Between processes SIGTERM belongs to JAX, which spreads it and agrees on the step.
    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def stop(number: int, frame: Any) -> None:
        event.set()
        signal.signal(number, before[signal.Signals(number)])
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    for number in before:
        signal.signal(number, stop)
    try:
        yield multihost_utils.reached_preemption_sync_point if several else lambda step: event.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require_one_process(command: str) -> None:
    """Raises a `UserError`, on the first process, if a command that runs as one process was started as several."""
    number, count = described()
    if count > 1:
        if number:
            sys.exit(2)
        raise UserError(
            f"{command} runs as one process, found {count} (by the variables of SLURM or {VARIABLES[1]}); "
            "start it without srun, or with srun --ntasks=1"
        )


def described() -> tuple[int, int]:
    """This process's number and their count, as the environment's variables say."""
    env = os.environ
    given = [name for name in VARIABLES if name in env]
    if len(given) == len(VARIABLES):
        number, count = env["JAX_PROCESS_ID"], env["JAX_NUM_PROCESSES"]
        if number.isdigit() and count.isdigit() and int(number) < int(count):
            return int(number), int(count)
        raise UserError(
            f"JAX_PROCESS_ID is {number!r} and JAX_NUM_PROCESSES {count!r}, expected a number below a count"
        )
    if "SLURM_STEP_NUM_TASKS" in env:  # set by srun: the shell of an allocation has SLURM_NTASKS, but is one process
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
    if given:
        raise UserError(f"{given[0]} is set, expected {', '.join(VARIABLES)} together")
    return 0, 1


def _join() -> bool:
    """Connects this process to the others; False if it is alone."""
    number, count = described()
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    on_tpu = "tpu" in (platforms or "")  # JAX sets this on a TPU host that has libtpu
    if count == 1 and not on_tpu:
        return False
    explicit: dict[str, Any] = {}
    if all(name in os.environ for name in VARIABLES):
        explicit = {"num_processes": count, "process_id": number, "cluster_detection_method": "deactivate"}
    # A lost process is to be named by `_Watch`: without this, JAX aborts the others first.
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=SILENCE, **explicit)
    except ValueError:
        if count > 1:
            raise
        return False  # a TPU host that is no part of a pod, such as a notebook's
    return True


class _Watch:
    """Watches over the other processes in threads of its own, through JAX's coordination service in process 0."""

    def __init__(self) -> None:
        self._client = cast(Any, runtime.global_state.client)
        self._number, self._count = jax.process_index(), jax.process_count()
        self._client.key_value_set(f"mrjax/host/{self._number}", socket.gethostname(), allow_overwrite=True)
        self._client.wait_at_barrier("mrjax/start", DAY)
        self._hosts = {int(key.rsplit("/")[-1]): host for key, host in self._client.key_value_dir_get("mrjax/host/")}
        if self._number:
            logger.setLevel(logging.WARNING)
            for handler in logger.handlers:
                handler.setFormatter(logging.Formatter(f"process {self._number} of {self._count}: %(message)s"))
        self._witness = self._call_witness() if self._number else None
        self._client.wait_at_barrier("mrjax/watched", DAY)  # no process is lost before all have a witness
        for watch in (self._hear, self._count_the_living):
            threading.Thread(target=watch, daemon=True).start()

    def stop(self, status: int, why: str) -> NoReturn:
        """Ends all processes because of an error in this one, which is said once if all of them have found it."""
        self._take_over()
        try:
            self._client.key_value_set("mrjax/stopped", f"{status} {self._number} {why}")
            _say(why)
        except jax.errors.JaxRuntimeError:
            if self._client.blocking_key_value_get("mrjax/stopped", 1000).split(" ", 2)[2] != why:
                _say(f"process {self._number} of {self._count}: {why}")
        self._end(status)

    def leave(self) -> None:
        """Waits for the others at the end of the run; process 0, which they are connected to, goes last."""
        self._client.wait_at_barrier("mrjax/done", DAY)
        self._take_over()
        self._client.wait_at_barrier("mrjax/leave", DAY)  # nobody watches any more, so that leaving is no loss
        everyone = list(range(self._count))
        while self._number == 0 and len(self._client.get_live_nodes(everyone)) > 1:
            time.sleep(0.1)
        jax.distributed.shutdown()
        self._dismiss_witness()

    def _hear(self) -> None:
        """Ends this process when another one says that it stops; or when process 0 is lost, as the witness says."""
        try:
            status, number, why = self._client.blocking_key_value_get("mrjax/stopped", DAY * 365).split(" ", 2)
        except jax.errors.JaxRuntimeError:
            self._take_over()  # which never returns if this process is leaving
            os._exit(1)
        self._take_over()
        _say(f"process {number} of {self._count} (on {self._hosts[int(number)]}) stopped: {why}")
        self._end(int(status))

    def _count_the_living(self) -> None:
        everyone = list(range(self._count))
        first: dict[int, int] = {}
        while not _ending.locked():
            try:
                living = self._client.get_live_nodes(everyone)
            except jax.errors.JaxRuntimeError:
                return  # process 0 is lost, or this one is leaving
            first = first or living
            # One that its launcher started again has the number of the lost one, but is another.
            if lost := [number for number in everyone if number not in living or living[number] != first.get(number)]:
                self._lost(lost)
            time.sleep(1)

    def _call_witness(self) -> subprocess.Popen[bytes]:
        """A shell that speaks when this process has ended and could not: JAX aborts it at once if process 0 is lost."""
        sentence = (
            f"mrjax: process {self._number} of {self._count} (on {self._hosts[self._number]}) ended without a word: "
            f"it was killed, or process 0 (on {self._hosts[0]}), which connects them, was lost; {AGAIN}"
        )
        command = ["sh", "-c", 'read -r word || echo "$0" >&2', sentence]
        return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def _dismiss_witness(self) -> None:
        if self._witness:
            self._witness.communicate(b"all is said\n")

    def _lost(self, numbers: list[int]) -> NoReturn:
        self._take_over()
        names = ", ".join(f"process {number} of {self._count} (on {self._hosts[number]})" for number in numbers)
        _say(f"{names} was lost, so this one ends; {AGAIN}")
        self._end(1)

    def _take_over(self) -> None:
        """Makes this thread the one that ends the process; any other that wants to waits for ever."""
        _ending.acquire()

    def _end(self, status: int) -> NoReturn:
        """Leaves without the usual clean-up, which would wait for the others; process 0 last, for its service."""
        self._dismiss_witness()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.wait_at_barrier("mrjax/ending", 5_000)
        if self._number == 0:
            time.sleep(1)
        sys.stdout.flush()
        os._exit(status)


def _say(sentence: str) -> None:
    # Whole and at once: the process may be about to end, and others write to the same terminal.
    os.write(2, f"mrjax: {sentence}\n".encode())
