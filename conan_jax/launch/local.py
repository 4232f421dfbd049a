"""Several processes of one command on this machine, on CPU devices: what a pod does, in small."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, BinaryIO

from conan_jax.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_RESUMABLE

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_COLOURS = (36, 33, 32, 35, 34, 31)  # of the terminal, by rank
_DEVICES_FLAG = re.compile(r"--xla_force_host_platform_device_count=\S*")


def environment_of(rank: int, processes: int, devices: int, port: int, base: dict[str, str]) -> dict[str, str]:
    """The environment of process `rank`: who it is among `processes`, `devices` CPU devices, and its share of the cores.

    Without a share each process would start as many compute threads as the machine has cores (`NPROC` is what XLA reads).
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes)) if hasattr(os, "sched_getaffinity") else base.get("NPROC", "1")
    flags = _DEVICES_FLAG.sub("", base.get("XLA_FLAGS", "")).split()
    return {
        **base,
        "CONAN_COORDINATOR": f"127.0.0.1:{port}",
        "CONAN_NUM_PROCESSES": str(processes),
        "CONAN_PROCESS_ID": str(rank),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]),
        "NPROC": threads,
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Local:
    """`processes` processes of `command`, each in a session of its own.

    Their lines come out with the rank before them. SIGTERM and SIGINT are handed on to all of them as one SIGTERM, and a second
    one ends them. When one fails, the others get `grace_seconds` to end by themselves. None outlives this process, even one that
    is killed: on Linux the kernel then ends them.
    """

    def __init__(self, command: Sequence[str], processes: int, devices: int = 1, grace_seconds: float = 60.0) -> None:
        self._command, self._count, self._devices, self._grace = list(command), processes, devices, grace_seconds
        self._children: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        self._asked = 0
        self._printing = threading.Lock()

    def run(self) -> int:
        """Run them to their end. 78 when one of them says 78, else 42 when one fails, else 0. Only from the main thread."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            port = free_port()
            for rank in range(self._count):
                self._start(rank, port)
            self._watch()
        finally:
            self._kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        for reader in self._readers:
            reader.join(5.0)  # a descendant that left its group may hold the pipe open
        codes = {child.returncode for child in self._children}
        return EXIT_BAD_INPUT if EXIT_BAD_INPUT in codes else EXIT_DONE if codes == {EXIT_DONE} else EXIT_RESUMABLE

    def _start(self, rank: int, port: int) -> None:
        if self._asked:
            return
        environment = environment_of(rank, self._count, self._devices, port, dict(os.environ))
        child = subprocess.Popen(self._command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_end_with(os.getpid()))
        self._children.append(child)
        reader = threading.Thread(target=self._copy, args=(rank, child.stdout), daemon=True)
        reader.start()
        self._readers.append(reader)

    def _watch(self) -> None:
        """Until all have ended, or the time of grace after the first failure is over."""
        deadline = None
        while None in (codes := [child.poll() for child in self._children]):
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed and deadline is None:
                deadline = time.monotonic() + self._grace
                self._say(f"process {failed[0]} ended with {_name(codes[failed[0]])}; the others have {self._grace:g} s")
            if self._asked > 1 or (deadline is not None and time.monotonic() > deadline):
                self._say("ending those that are left")
                return
            time.sleep(0.05)

    def _kill(self) -> None:
        """End what is left of every process group, and wait for the processes, so that no zombie stays."""
        for child in self._children:
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()

    def _ask(self, number: int, frame: Any) -> None:
        self._asked += 1
        if self._asked == 1:
            for child in self._children:
                if child.poll() is None:
                    child.send_signal(signal.SIGTERM)

    def _copy(self, rank: int, lines: BinaryIO) -> None:
        mark = f"[{rank}]"
        if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
            mark = f"\x1b[{_COLOURS[rank % len(_COLOURS)]}m{mark}\x1b[0m"
        for line in lines:
            self._print(f"{mark} {line.decode(errors='replace').rstrip()}")

    def _say(self, text: str) -> None:
        self._print(f"launch: {text}")

    def _print(self, line: str) -> None:
        with self._printing:
            print(line, flush=True)


def _name(code: int) -> str:
    """An exit code, or the signal that ended a process."""
    try:
        return str(code) if code >= 0 else signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _end_with(parent: int) -> Any:
    """What a child does before it becomes the command: ask the kernel to end it when the parent dies, however it dies."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before we could ask
            os._exit(EXIT_RESUMABLE)

    return ask
