"""Real processes over loopback: start them, watch what they leave, look for what should be gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = Path(__file__).with_name("recipe.py")
PATIENCE = 240.0  # seconds until something must have happened, on a crowded machine


class Command:
    """`python -m ARGUMENTS`, its output in a file."""

    def __init__(self, log: Path, *arguments: object, **variables: str) -> None:
        self.log = log
        base = {k: v for k, v in os.environ.items() if not k.startswith("CONAN_") and k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
        flags = "--xla_backend_optimization_level=0"
        environment = {**base, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **variables}
        with log.open("wb") as out:
            self.process = subprocess.Popen([sys.executable, "-m", *map(str, arguments)], cwd=log.parent, stdout=out,
                                            stderr=subprocess.STDOUT, env=environment)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code; the output is shown when it does not end in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"{self.log.name} did not end within {seconds} s:\n{self.text[-4000:]}") from None

    def until(self, condition, what: str) -> None:
        """Until `condition()` holds, while the command runs."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"{self.log.name} ended before {what}:\n{self.text[-4000:]}"
            assert time.monotonic() < deadline, f"{self.log.name}: no {what} came:\n{self.text[-4000:]}"
            time.sleep(0.02)

    def children(self) -> list[int]:
        """Ids of the processes it started, by rank."""
        return [int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]

    def end(self) -> None:
        """End it and what it started, if it still runs."""
        if self.process.poll() is None:
            children = self.children()
            self.process.kill()
            self.process.wait()
            for child in children:
                if state(child):
                    os.kill(child, signal.SIGKILL)


def state(pid: int) -> str:
    """The letter the kernel gives for a process's state; "" when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether all of them vanish, zombies included."""
    deadline = time.monotonic() + seconds
    while any(state(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def losses(stage_folder: Path) -> dict[int, float]:
    """{step: loss} of its metrics.jsonl."""
    file = stage_folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}
