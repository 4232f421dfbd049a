"""A whole SLURM cluster of one node on loopback, started as children of a test and ended with it.

Everything lies in one temporary folder: configuration, munge key and socket, state, logs. Nothing of the machine's own SLURM or munge
is read or started.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def missing() -> list[str]:
    """Programs of SLURM and munge that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


@dataclass
class Cluster:
    """A running cluster. `environment` leads SLURM's commands to it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, ok: bool = True, **more) -> str:
        """The output of one of SLURM's commands."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, **more)
        assert not ok or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        return dict(part.split("=", 1) for part in self.run("scontrol", "show", "job", number, "--oneliner").split() if "=" in part)

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failing test."""
        return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in sorted(self.folder.glob("*.log")))


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def cluster(cpus: int = 2) -> Iterator[Cluster]:
    """Start munged, slurmctld and slurmd; end their jobs and exactly those.

    Jobs of the partition `urgent` preempt those of `all`, the default.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the path of a socket may have 107 characters
    daemons: list[subprocess.Popen] = []
    try:
        started = Cluster(folder, {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")})
        _write_configuration(folder, cpus)
        munged = ["munged", "--foreground", "--force", f"--key-file={folder / 'munge.key'}", f"--socket={folder / 'munge.sock'}",
                  f"--pid-file={folder / 'munged.pid'}", f"--seed-file={folder / 'munge.seed'}", f"--log-file={folder / 'munged.log'}"]
        configuration = str(folder / "slurm.conf")
        slurmctld = ["slurmctld", "-D", "-c", "-f", configuration]
        for command in (munged, slurmctld, ["slurmd", "-D", "-c", "-f", configuration, "-N", "localhost"]):
            log = open(folder / f"{command[0]}.out.log", "wb")
            daemons.append(subprocess.Popen(command, env=started.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            if command is munged:
                _wait_for(lambda: (folder / "munge.sock").exists(), "munged", started)
        _wait_for(lambda: "idle" in started.run("sinfo", "--noheader", "--format=%T", ok=False), "an idle node", started)
        try:
            yield started
        finally:  # a job outlives the daemon that started it
            for more in (("--full", "--signal=KILL"), ()):
                started.run("scancel", *more, f"--user={getpass.getuser()}", ok=False)
            _wait_for(lambda: not started.run("squeue", "--noheader", ok=False).strip(), "end of the jobs", started)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _write_configuration(folder: Path, cpus: int) -> None:
    controller, node = free_ports(2)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    user = getpass.getuser()
    lines = {
        "ClusterName": "loopback", "SlurmctldHost": "localhost(127.0.0.1)", "SlurmctldPort": controller, "SlurmdPort": node,
        "AuthType": "auth/munge", "AuthInfo": f"socket={folder / 'munge.sock'},cred_expire=5", "SlurmUser": user, "SlurmdUser": user,
        "StateSaveLocation": folder / "state", "SlurmdSpoolDir": folder / "spool", "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid", "SlurmctldLogFile": folder / "slurmctld.log", "SlurmdLogFile": folder / "slurmd.log",
        "ProctrackType": "proctrack/pgid", "TaskPlugin": "task/none", "SwitchType": "switch/none", "MpiDefault": "none",
        "AccountingStorageType": "accounting_storage/none", "JobAcctGatherType": "jobacct_gather/none", "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU", "SlurmdParameters": "config_overrides", "ReturnToService": 2, "KillWait": 5,
        "SchedulerParameters": "sched_interval=2,bf_interval=2", "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",
        "PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE",
    }
    text = "".join(f"{name}={value}\n" for name, value in lines.items())
    text += f"NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN\n"
    text += "PartitionName=all Nodes=localhost Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE\n"
    text += "PartitionName=urgent Nodes=localhost PriorityTier=9 MaxTime=INFINITE\n"
    (folder / "slurm.conf").write_text(text)


def _wait_for(condition, what: str, started: Cluster, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {seconds:.0f} s{started.logs()}"
        time.sleep(0.2)
