"""Everything that can be known to be wrong with a launch before a machine is paid for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from conan_jax import config, config_io
from conan_jax.errors import ConfigError
from conan_jax.launch import estimates
from conan_jax.launch.check_jobset import check_jobset
from conan_jax.launch.check_scripts import check_script
from conan_jax.launch.command import run_overrides
from conan_jax.launch.findings import Finding
from conan_jax.launch.folder import manifest_file, read, render
from conan_jax.launch.spec import LaunchSpec

GIB = 2**30


def check(folder: Path) -> list[Finding]:
    """What is wrong with the launch in `folder`: its manifest as it lies there, its recipe, and how the two fit together.

    Works offline, without jax. Raises `ConfigError` when the folder holds no launch.
    """
    spec = read(folder)
    text = manifest_file(spec, folder).read_text(encoding="utf-8")
    findings: list[Finding] = []
    run: config.Run | None = None
    stages: list[config.AnyStage] = []
    try:
        run = config_io.load_run(spec.config, run_overrides(spec))
        stages = [run.stage(spec.stage)] if spec.stage else list(run.stages)
    except ConfigError as error:
        findings.append(Finding("recipe", f"{error}; check where the recipe is found, as it will be in the job"))
    if spec.target == "gke-jobset":
        findings += check_jobset(spec, text, run)
    else:
        findings += check_script(spec, text, manifest_file(spec, folder))
    if run is not None:
        findings += _check_recipe(spec, run, stages)
        findings += _check_grace(spec, run, text)
    findings += _edited(text, render(spec)[manifest_file(spec, folder).name])
    return findings


def _edited(text: str, rendered: str) -> Iterator[Finding]:
    """Lines that are not as launch.json renders them: nothing is held against them but these rules."""
    changed = [line for line in difflib.ndiff(rendered.splitlines(), text.splitlines()) if line[:2] in ("- ", "+ ")]
    if changed:
        shown = "; ".join(line.strip() for line in changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
        yield Finding("edited", f"the manifest was changed by hand ({shown}); no rule looks at every line, so read these", serious=False)
    elif text != rendered:
        yield Finding("edited", "the manifest's line ends were changed by hand", serious=False)


def _check_recipe(spec: LaunchSpec, run: config.Run, stages: list[config.AnyStage]) -> Iterator[Finding]:
    """The mesh against the devices, the batches against both, the parameters against the memory."""
    mesh = estimates.mesh_sizes(run.mesh, spec)
    if mesh is None:
        yield Finding("mesh", f"mesh {run.mesh} does not make up {_devices(spec)}; set one of its sizes to -1 "
                              "(slices lie along data, which must be a multiple of them), or leave it to the hardware")
        return
    parts = mesh.data * mesh.fsdp
    for stage in stages:
        for key, rows in estimates.batches(stage).items():
            fit = f"use a multiple of {parts}, say --set {key}={-(-rows // parts) * parts}, or fewer chips"
            if rows % spec.processes:
                yield Finding("batch", f"{key}: {rows} rows cannot be split over {spec.processes} processes; {fit}")
            elif rows % parts:
                yield Finding("batch", f"{key}: {rows} rows do not fill {parts} devices (mesh data x fsdp) evenly, some would wait; {fit}",
                              serious=False)
    chip = spec.hardware.chip
    least = estimates.step_bytes(run, mesh)
    if chip.hbm_bytes is not None and least > chip.hbm_bytes:
        yield Finding("memory", f"parameters, moments and gradients alone take {least / GIB:.2f} GiB a device under {mesh}, and a "
                                f"{chip.name} has {chip.hbm_bytes / GIB:.2f}; give mesh.fsdp or mesh.tensor more devices")


def _check_grace(spec: LaunchSpec, run: config.Run, text: str) -> Iterator[Finding]:
    """The time between SIGTERM and the end against that of a save."""
    mesh = estimates.mesh_sizes(run.mesh, spec)
    granted = _granted_seconds(spec, text)
    if mesh is None or granted is None:
        return
    needed = estimates.save_seconds(run, spec, mesh)
    if granted < needed:
        amount = estimates.save_bytes(run, spec, mesh) / GIB
        yield Finding("grace", f"{granted} s of grace are less than the {needed:.0f} s that a save may take: {amount:.2f} GiB a host at an "
                               f"assumed {estimates.SAVE_BYTES_PER_SECOND / 1e6:.0f} MB/s, and {estimates.SAVE_SECONDS} s for the step in "
                               f"hand; use --grace {int(needed) + 1}")


def _granted_seconds(spec: LaunchSpec, text: str) -> int | None:
    """The grace that the manifest asks for; None where a machine's owner decides it."""
    pattern = {"gke-jobset": r"terminationGracePeriodSeconds: (\d+)", "slurm": r"#SBATCH --signal=TERM@(\d+)"}.get(spec.target)
    found = re.search(pattern, text) if pattern else None
    return int(found[1]) if found else None


def _devices(spec: LaunchSpec) -> str:
    slices = f"{spec.slices} x " if spec.slices > 1 else ""
    return f"the {spec.chips} devices of {slices}{spec.hardware.name}"
