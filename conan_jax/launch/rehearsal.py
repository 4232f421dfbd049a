"""The same processes, all on this machine: what a pod would start, on CPU devices."""

from __future__ import annotations

import shlex

from conan_jax.launch.command import bash_preamble, recipe_arguments
from conan_jax.launch.spec import LaunchSpec


def local_script(spec: LaunchSpec) -> str:
    """A script that becomes `conan launch local`, so signals and the exit code are those of the launcher."""
    command = [
        spec.python, "-m", "conan_jax", "launch", "local", "--processes", str(spec.processes),
        "--devices-per-process", str(spec.hardware.chips_per_host), *recipe_arguments(spec),
        *(["--stage", spec.stage] if spec.stage else []),
    ]
    return "\n".join(["#!/usr/bin/env bash", "set -u", *bash_preamble(spec), f"exec {shlex.join(command)}"]) + "\n"
