"""The processes of one run: how they find each other, who does what only one may do, and how they stop together.

Liveness is jax's: its coordination service ends every process some `HEARTBEAT_SECONDS` after one of them fell silent. What it
cannot say, `Peers` says through small files in the run folder, which all hosts share anyway: that process 0 is done with what the
others wait for, or that a process failed, why, and with which exit code. Such a wait may take hours, so it must not be a
collective (those time out), and a file needs nothing that jax keeps private.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from conan_jax.errors import EXIT_RESUMABLE, ConanError, ConfigError, PeerError
from conan_jax.files import unusable_place, write_json

VARIABLES = ("CONAN_COORDINATOR", "CONAN_NUM_PROCESSES", "CONAN_PROCESS_ID")
INITIALISATION_SECONDS = 300  # pods of one job start minutes apart
HEARTBEAT_SECONDS = 60
SHUTDOWN_SECONDS = 30
_GRACE_SECONDS = 10.0  # between a failure elsewhere and the end of a process that does not see it by itself
_SHARED_SECONDS = 90.0  # what a network file system may take to show a new folder
_POLL_SECONDS = 0.5
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

T = TypeVar("T")


def initialise(timeout_seconds: int = INITIALISATION_SECONDS) -> None:
    """Join the processes of this run; call it before jax makes its first array. A second call does nothing.

    Who they are comes from the first of these that is there:

    * `CONAN_COORDINATOR` (host:port of process 0), `CONAN_NUM_PROCESSES`, `CONAN_PROCESS_ID` (from 0): all three or none.
    * what jax detects by itself: Open MPI (`OMPI_MCA_orte_hnp_uri`, `OMPI_COMM_WORLD_*`); SLURM inside `srun` (`SLURM_JOB_ID`,
      `SLURM_STEP_NODELIST`, `SLURM_NTASKS`, `SLURM_PROCID`, `SLURM_LOCALID`; a task then sees the one GPU of its `SLURM_LOCALID`
      unless `JAX_LOCAL_DEVICE_IDS` lists more); TPU on GKE (`TPU_WORKER_HOSTNAMES` or `TPU_PROCESS_ADDRESSES`, `TPU_WORKER_ID`, and
      `MEGASCALE_*` between slices); TPU VM (the metadata server); an indexed Job or JobSet on Kubernetes (`KUBERNETES_SERVICE_HOST`
      and `JOB_COMPLETION_INDEX`; only with the `kubernetes` package and the right to read pods).
    * otherwise one process, which coordinates itself on a free loopback port.

    jax's own capture of SIGTERM is switched off: our handlers stay in charge. On CPU the collectives of several processes are gloo's.
    Where a backend exists already, as in a notebook or a test, a single process goes on without.

    Raises:
        ConfigError: some of the three variables are missing or no numbers, or a cluster says something that cannot be.
        PeerError: no coordinator answers at that address (exit code 42). When one that jax detected does not answer, jax itself
            ends the process instead, by SIGABRT.
    """
    if jax.distributed.is_initialized():
        return
    given = _from_variables()
    jax.config.update("jax_enable_preemption_service", False)
    limits = {"initialization_timeout": timeout_seconds, "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
              "shutdown_timeout_seconds": SHUTDOWN_SECONDS}
    if given is not None:
        address, count, index = given
        if count > 1:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        if index > 0:
            _await_coordinator(address, timeout_seconds)
        _initialise(address, count, index, limits)
    elif not _detected(limits):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        try:
            _initialise(f"127.0.0.1:{port}", 1, 0, limits)
        except RuntimeError as error:
            if "before any JAX calls" not in str(error):
                raise


def _initialise(address: str, count: int, index: int, limits: dict[str, int]) -> None:
    host, port = address.rsplit(":", 1)
    bind = f"127.0.0.1:{port}" if host in _LOOPBACK else None  # by default the coordinator listens on every interface
    if bind is not None:
        jax.config.update("jax_check_proxy_envs", False)  # a proxy is not asked for a loopback address
    jax.distributed.initialize(address, count, index, cluster_detection_method="deactivate", coordinator_bind_address=bind, **limits)


def _from_variables() -> tuple[str, int, int] | None:
    values = {name: os.environ.get(name, "").strip() for name in VARIABLES}
    missing = [name for name, value in values.items() if not value]
    if len(missing) == len(VARIABLES):
        return None
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not set, while {' and '.join(n for n in VARIABLES if n not in missing)} "
                          "is: set all three, or none to have the cluster detected")
    address, count, index = values.values()
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"CONAN_COORDINATOR is {address!r}; it must be host:port of process 0, as in 10.0.0.1:8476")
    if not count.isdecimal() or not index.isdecimal() or not int(index) < int(count):
        raise ConfigError(f"CONAN_PROCESS_ID is {index!r} and CONAN_NUM_PROCESSES {count!r}; they must be numbers, 0 <= ID < NUM")
    return address, int(count), int(index)


def _await_coordinator(address: str, seconds: float) -> None:
    """Until process 0 listens: jax would end the process by SIGABRT where it does not."""
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerError(f"no coordinator answers at {address} (CONAN_COORDINATOR) within {seconds:.0f} s: {error}. "
                                "Is process 0 running, and may this host reach that port?") from error
            time.sleep(_POLL_SECONDS)


def _detected(limits: dict[str, int]) -> bool:
    """Initialise from what jax detects; False where it detects nothing."""
    inside = ("OMPI_MCA_orte_hnp_uri", "SLURM_PROCID", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "JOB_COMPLETION_INDEX")
    if "KUBERNETES_SERVICE_HOST" in os.environ and not any(name in os.environ for name in inside):
        return False  # a pod that belongs to no indexed Job is alone; jax would ask the cluster and fail
    before = jax.config.jax_cpu_collectives_implementation
    if any(name in os.environ for name in inside):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**limits)
    except ValueError as error:
        jax.config.update("jax_cpu_collectives_implementation", before)
        if "coordinator_address" in str(error):
            return False
        raise ConfigError(f"the cluster was detected, but not whole: {error}") from error
    except RuntimeError as error:
        if "before any JAX calls" not in str(error):
            raise PeerError(f"the cluster was detected, but its processes did not meet: {error}") from error
        return False
    return True


def is_main() -> bool:
    """Whether this is process 0, which alone writes, prints and evaluates."""
    return jax.process_index() == 0


class Peers:
    """The processes of one run in one folder, from their meeting to their end. A context; alone, everything in it is immediate.

    When the block fails the others learn it: those that wait for process 0 fail alike with the same exit code, and a process that
    is elsewhere, say in a collective that will never finish, is ended some seconds later, so that none stays behind.

    Raises:
        ConfigError: the folder is not on a file system that all hosts share.
    """

    def __init__(self, folder: Path) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        name = zlib.crc32(socket.gethostname().encode())
        mine = np.array([name, *np.frombuffer(secrets.token_bytes(8), np.uint32)], np.uint32)
        everyone = multihost_utils.process_allgather(mine) if self.count > 1 else mine[None]
        self.hosts = len(np.unique(everyone[:, 0]))
        self._folder = folder / f".peers-{everyone[0, 1:].tobytes().hex()}"  # no file of an earlier start is mistaken for one of this
        self._ended = threading.Event()

    def __enter__(self) -> Peers:
        global _current
        if self.count > 1:
            _current = self
            if self.index == 0:
                self._folder.mkdir(parents=True)
            self._await(self._folder, _SHARED_SECONDS)
            threading.Thread(target=self._watch, daemon=True, name="peers").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.count == 1:
            return
        if error is not None:
            self._say_failed(error)
            return
        self.alone("end", lambda: None)
        self._ended.set()
        jax.distributed.shutdown()  # waits for all of them
        if self.index == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __str__(self) -> str:
        devices = jax.devices()
        return (f"{_number(self.count, 'process', 'processes')} on {_number(self.hosts, 'host', 'hosts')}, "
                f"{_number(len(devices), 'device', 'devices')} ({devices[0].device_kind})")

    def alone(self, name: str, work: Callable[[], T]) -> T | None:
        """`work()` on process 0, its result there and None elsewhere; returns when it is done, however long that takes.

        `name` is used once a run. Raises what `work` raises on process 0, and `PeerError` with the same exit code elsewhere.
        """
        done = self._folder / name
        if self.index == 0:
            result = work()
            if self.count > 1:
                done.touch()
            return result
        self._await(done, None)
        return None

    def forget_earlier(self) -> None:
        """Remove what starts that failed left behind. Only for process 0 of the run that holds the folder."""
        for folder in self._folder.parent.glob(".peers-*"):
            if folder != self._folder:
                shutil.rmtree(folder, ignore_errors=True)

    def failure(self) -> PeerError | None:
        """What another process failed with, if one did."""
        try:
            said = json.loads((self._folder / "failed").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if said["process"] == self.index:
            return None
        return PeerError(f"process {said['process']} on {said['host']}: {said['message']}", said["exit_code"])

    def leave(self, code: int) -> NoReturn:
        """End this process at once with `code`. Process 0 goes last: with it goes the service that would abort the others."""
        with contextlib.suppress(OSError):
            (self._folder / f"left-{self.index}").touch()
        if self.index == 0:
            deadline = time.monotonic() + 2 * _GRACE_SECONDS
            while time.monotonic() < deadline and not all((self._folder / f"left-{i}").exists() for i in range(1, self.count)):
                time.sleep(0.1)
            shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # where they go may be full
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def _await(self, path: Path, seconds: float | None) -> None:
        deadline = time.monotonic() + (seconds or float("inf"))
        while not path.exists():
            failure = self.failure()
            if failure is not None:
                raise failure
            if time.monotonic() > deadline:
                raise ConfigError(f"process {self.index} on {socket.gethostname()} does not see in {path.parent.absolute()} what process 0 "
                                  "wrote there; output_dir must lie on a file system that all hosts share")
            time.sleep(_POLL_SECONDS)

    def _say_failed(self, error: BaseException) -> None:
        error = unusable_place(error) or error
        code = error.exit_code if isinstance(error, ConanError) else 1 if isinstance(error, Exception) else EXIT_RESUMABLE
        message = (str(error) if isinstance(error, ConanError) else "asked to stop" if code == EXIT_RESUMABLE
                   else f"{type(error).__name__} {error}".strip())
        if not (self._folder / "failed").exists():
            said = {"process": self.index, "host": socket.gethostname(), "exit_code": code, "message": message}
            with contextlib.suppress(OSError):  # a full disk may be what failed; `error` is raised in any case
                write_json(self._folder / "failed", said)

    def _watch(self) -> None:
        """End this process when another one failed and the main thread does not notice within the time of grace."""
        while not self._ended.wait(_POLL_SECONDS):
            failure = self.failure()
            if failure is not None and not self._ended.wait(_GRACE_SECONDS):
                print(f"conan: {failure}", file=sys.stderr)
                self.leave(failure.exit_code)


_current: Peers | None = None


def leave(code: int) -> None:
    """End a process of several at once, without jax's farewell, which waits for those that are gone; alone, do nothing."""
    if _current is not None and not _current._ended.is_set():
        _current.leave(code)


def _number(n: int, one: str, many: str) -> str:
    return f"{n:,} {one if n == 1 else many}"


class Agreement:
    """Whether any process was asked to stop, with the same answer for the same step on all of them.

    Each step's flags are reduced on the devices beside the training step and read when the next step begins; by then the loop has
    waited for the step before anyway, so agreeing costs no further synchronisation. Alone, a flag acts at once.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._alone = jax.process_count() == 1
        self._waiting: jax.Array | None = None
        if not self._alone:
            split, whole = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), NamedSharding(mesh, PartitionSpec())
            here = len(mesh.local_devices)
            self._flags = [jax.make_array_from_process_local_data(split, np.full(here, flag, np.int32)) for flag in (0, 1)]
            self._any = jax.jit(lambda flags: flags.max(), out_shardings=whole)

    def ask(self, wanted: bool) -> bool:
        """Tell this step's flag; the answer is that of the step before."""
        if self._alone:
            return wanted
        before, self._waiting = self._waiting, self._any(self._flags[wanted])
        return before is not None and bool(before)

    def settle(self, wanted: bool) -> bool:
        """Tell a last flag and wait for the answer."""
        return self.ask(wanted) | (self._waiting is not None and bool(self._waiting))
