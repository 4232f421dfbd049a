"""The command that a launch runs, and how lists of arguments are written for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from conan_jax.launch.spec import LaunchSpec


def train_command(spec: LaunchSpec) -> list[str]:
    """`python -m conan_jax train ...` as a list of arguments; its run folder is on the claim when pods write to one."""
    return [spec.python, "-m", "conan_jax", "train", *recipe_arguments(spec), *(["--stage", spec.stage] if spec.stage else [])]


def recipe_arguments(spec: LaunchSpec) -> list[str]:
    """The recipe and its overrides, as every command of conan takes them."""
    arguments = [spec.config]
    for assignment in run_overrides(spec):
        arguments += ["--set", assignment]
    return arguments


def run_overrides(spec: LaunchSpec) -> tuple[str, ...]:
    """The overrides of the recipe: those given, after the one that puts the run's folder where it outlives a pod."""
    placed = any(assignment.startswith("output_dir=") for assignment in spec.overrides)
    if spec.output_claim is None or placed:
        return spec.overrides
    return (f"output_dir={spec.output_mount.rstrip('/')}/{spec.name}", *spec.overrides)


def platform_variables(spec: LaunchSpec) -> dict[str, str]:
    """What makes CPU devices out of a process; accelerators are found by jax itself."""
    if spec.hardware.chip.platform != "cpu":
        return {}
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(spec.hardware.chips_per_host)}


def bash_array(name: str, arguments: Sequence[str]) -> list[str]:
    """`name=(...)` as lines of bash, one quoted argument a line."""
    return [f"{name}=(", *(f"  {shlex.quote(argument)}" for argument in arguments), ")"]


def bash_preamble(spec: LaunchSpec) -> list[str]:
    """Into the working folder, with the variables that the job needs: what is missing is a wrong launch, not one to restart."""
    lines = []
    if spec.working_dir:
        lines.append(f"cd -- {shlex.quote(spec.working_dir)} || exit 78")
    for name in spec.environment:
        message = shlex.quote(f"{spec.name}: {name} is not set")
        lines.append(f'[ -n "${{{name}:-}}" ] || {{ echo {message} >&2; exit 78; }}')
    return lines
