"""`conan launch local`: a recipe in several processes on this machine."""

from __future__ import annotations

import sys

import typer

from conan_jax.cli.config import ConfigArgument, SetOption


def local(
    config: str = ConfigArgument,
    processes: int = typer.Option(2, "--processes", min=1, help="Number of processes."),
    devices: int = typer.Option(1, "--devices-per-process", min=1, help="CPU devices of each process."),
    stage: str = typer.Option(None, "--stage", help="Train this stage only; it starts from the stage before it."),
    overrides: list[str] = SetOption,
    fresh: bool = typer.Option(False, "--fresh", help="Train again, as `conan train --fresh`."),
    fallback: bool = typer.Option(False, "--fallback", help="Rename a damaged checkpoint, as `conan train --fallback`."),
    grace_seconds: float = typer.Option(60.0, "--grace-seconds", min=0.0, help="Time for the other processes to exit when one fails."),
) -> None:
    """Train a recipe in several processes on this machine, on CPU devices: the same program, collectives and checkpoints as on a pod.

    Each line begins with the process it came from. SIGTERM and Ctrl-C stop all of them at the same step, and the same command,
    or one with another number of processes, goes on. Exit codes: 0 done, 42 stopped and resumable, 78 wrong configuration or data.

    Examples:

        conan launch local --processes 2 configs/demo.py:tiny

        conan launch local --processes 4 --devices-per-process 2 configs/demo.py --set name=rehearsal
    """
    from conan_jax import config_io
    from conan_jax.launch.local import Local

    config_io.load_run(config, overrides)  # what is wrong with it is said once, before anything starts
    command = [sys.executable, "-m", "conan_jax", "train", config]
    command += [part for override in overrides for part in ("--set", override)]
    command += (["--stage", stage] if stage else []) + (["--fresh"] if fresh else []) + (["--fallback"] if fallback else [])
    code = Local(command, processes, devices, grace_seconds).run()
    if code:
        raise typer.Exit(code)
