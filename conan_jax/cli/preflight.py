"""`conan preflight`: compile a recipe's steps for a pod that is not here, and say what they will take."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from conan_jax.cli.config import ConfigArgument, SetOption
from conan_jax.errors import EXIT_BAD_INPUT
from conan_jax.units import duration, size

if TYPE_CHECKING:
    from conan_jax import config as configs
    from conan_jax.hardware import Accelerator
    from conan_jax.preflight import Report

GIB = 2**30


def preflight(
    config: str = ConfigArgument,
    topology: str = typer.Option(..., "--topology", "-t", metavar="NAME", help="Hardware to compile for: v5e:16x16, v5p-256, cpu:256."),
    stage: str = typer.Option(None, "--stage", help="This stage only."),
    overrides: list[str] = SetOption,
    slices: int = typer.Option(1, "--slices", min=1, help="Number of slices of this topology, connected by the network of their hosts."),
    hbm_gib: float = typer.Option(None, "--hbm-gib", min=0.0, help="Memory of one device in GiB, instead of that of its chip."),
    thorough: bool = typer.Option(False, "--thorough",
        help="Compile large steps with the optimisation effort of training; takes twice the time."),
    no_fix: bool = typer.Option(False, "--no-fix",
        help="When a step does not fit, name settings that reduce memory, but do not compile them."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object for a stage, a list of them without --stage."),
) -> None:
    """Compile the training steps of a recipe for a pod, without the pod: memory, estimated time and communication.

    Every stage takes minutes at full size. When a step does not fit, the report names settings that make it fit and compiles
    the best one. Exit codes: 0 every stage fits (or no limit is known), 78 one does not, or a setting is wrong.
    TPUs need libtpu, in an environment of its own; the command says how to make one.

    Examples:

        conan preflight configs/conan_v2.py --topology v5e:16x16 --stage weak

        conan preflight configs/conan_v2.py --topology v5e:16x16 --set weak.global_batch_size=65536 --set weak.encode_chunk_size=4 --json

        conan preflight configs/conan_v2.py:tiny --topology cpu:256
    """
    from conan_jax import config_io, hardware
    from conan_jax.cli import exits
    from conan_jax.preflight.environment import prepare

    exits.end_at_once()
    run = config_io.load_run(config, overrides)
    chosen = [run.stage(stage)] if stage else list(run.stages)
    accelerator = hardware.accelerator(topology)
    limit = None if hbm_gib is None else int(hbm_gib * GIB)
    prepare(accelerator)

    console, reports = Console(stderr=as_json), []
    for one in chosen:
        with console.status(f"compiling {one.name} for {accelerator.name}"):
            reports.append(_check(run, one, accelerator, not no_fix, slices=slices, hbm_bytes=limit, thorough=thorough))
        if not as_json:
            _show(console, reports[-1])
    if as_json:
        found = [report.to_dict() for report in reports]
        typer.echo(json.dumps(found[0] if stage else found))
    if any(report.fits is False for report in reports):
        raise typer.Exit(EXIT_BAD_INPUT)


def _check(run: configs.Run, stage: configs.AnyStage, accelerator: Accelerator, fix: bool, **options: Any) -> Report:
    """The report of one stage; when it does not fit, with what would help and, if `fix`, the proof of the best of it.

    `options`: those of `preflight.check`.
    """
    from conan_jax.preflight import advice, check

    examples = prepared_examples(run, stage)

    def again(run: configs.Run, stage: configs.AnyStage) -> Report:
        return check(run, stage, accelerator, num_examples=examples, **options)

    report = again(run, stage)
    if report.fits is not False:
        return report
    helps = advice.plans(run, stage, report)
    found, tried = advice.prove(run, stage, report, again) if fix else (None, ())
    return dataclasses.replace(
        report, helps=tuple(dict.fromkeys(f"{one.settings[-1]}: {one.why}" for one in helps)), fix=found, tried=tried,
        larger_accelerator=None if found else advice.larger_accelerator(report))


def prepared_examples(run: configs.Run, stage: configs.AnyStage) -> Mapping[str, int] | None:
    """Records of each task of a stage whose datasets are all prepared; None as long as one is not."""
    from pathlib import Path

    from conan_jax.data.prepared import dataset_manifest

    tasks = {task.name: task.datasets for task in getattr(stage, "tasks", ())} or {"": stage.datasets}
    counts: dict[str, int] = {}
    for task, mixes in tasks.items():
        manifests = [dataset_manifest(Path(run.output_dir), run, mix.dataset) for mix in mixes]
        if None in manifests:
            return None
        counts[task] = sum(manifest.records for manifest in manifests)
    return counts


def _show(console: Console, report: Report) -> None:
    """A table of two columns, 80 wide."""
    where = f"{report.slices} x {report.accelerator}" if report.slices > 1 else report.accelerator
    table = Table(title=f"{report.stage} ({report.kind}) on {where}", title_justify="left", show_header=False, width=min(console.width, 80))
    table.add_column("what", no_wrap=True)
    table.add_column("quantity", overflow="fold")
    for name, text in _rows(report):
        table.add_row(name, text)
    console.print(table)
    for note in report.notes:
        console.print(f"  {note}", highlight=False, markup=False)
    for line in _advice(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _rows(report: Report) -> list[tuple[str, str]]:
    limit, hosts = report.hbm_bytes_per_device, f"{report.hosts} host{'s' * (report.hosts > 1)}"
    verdict = {True: "[green]fits[/green]", False: "[bold red]does not fit[/bold red]", None: "no limit known"}[report.fits]
    rows = [
        ("verdict", f"{verdict}: {size(report.peak_bytes_per_device)} a device" + (f" of {size(limit)}" if limit else "")),
        ("mesh", ", ".join(f"{axis} {size}" for axis, size in report.mesh.items()) + f" ({report.devices} devices, {hosts})"),
        ("rows x tokens", report.batch),
        ("a device holds", "\n".join(f"{size(held):>10}  {kind.replace('_', ' ')}" for kind, held in report.memory.items() if held)),
    ]
    if report.collectives is not None:
        sent = "\n".join(f"{size(t.bytes_per_device):>10}  {t.count:,} {t.kind} over {t.axes}" for t in report.collectives)
        rows.append(("a device sends", sent or "nothing"))
    rows.append(("FLOPs a step", f"{report.flops_per_step:.3g} ({report.hardware_flops_per_step:.3g} with recomputation)"))
    if report.seconds_range is not None:
        fast, slow = report.seconds_range
        rows += [
            ("bounds", ", ".join(f"{name} {duration(seconds)}" for name, seconds in report.roofline.items())),
            ("step", f"{duration(fast)} to {duration(slow)}, MFU {report.mfu_range[0]:.0%} to {report.mfu_range[1]:.0%}"),
            ("tokens/s", f"{report.tokens_per_second:,.0f} ({report.tokens_per_step:,} a step)"),
            ("the stage", f"{report.steps:,} steps: {_days(report.days)} ({_days(report.days_range[0])} to {_days(report.days_range[1])}), "
                          + (f"{report.chip_hours:,.1f}" if report.chip_hours >= 0.1 else "less than 0.1") + " chip-hours"),
        ]
    rows += [
        ("checkpoint", f"{size(report.checkpoint_bytes)}, {size(report.checkpoint_bytes_per_host)} by the busiest host"),
        ("examples", ", ".join(f"{name} {n:,}" if name else f"{n:,}" for name, n in report.num_examples.items())),
        ("compilation", f"{duration(report.compile_seconds)} on this machine"),
    ]
    return rows


def _advice(report: Report) -> list[str]:
    if report.fits is not False:
        return []
    lines = [f"compiler: {report.refused}"] if report.refused else []
    lines += [f"would help: {line}" for line in report.helps]
    lines += [f"tried: {_line(fix.settings)}  needs {size(fix.peak_bytes_per_device)}" for fix in report.tried]
    if report.fix:
        lines.append(f"this fits, {size(report.fix.peak_bytes_per_device)} a device (compiled):\n{_line(report.fix.settings)}")
    elif report.larger_accelerator:
        lines.append(f"the smallest accelerator that could hold the state: {report.larger_accelerator}")
    return lines


def _days(days: float) -> str:
    return duration(days * 86_400)


def _line(settings: tuple[str, ...]) -> str:
    return " ".join(f"--set {setting}" for setting in settings)
