"""`conan merge`: the average of several checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console


def merge(
    places: Annotated[list[str], typer.Argument(metavar="RUN...", help="RUN, RUN/STAGE or RUN/STAGE@STEP, two or more.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The run folder to write; it appears only when complete.")],
    weights: Annotated[Optional[str], typer.Option("--weights", metavar="W,W,...",
        help="One weight for each source, sum 1. Default: equal.")] = None,
    method: Annotated[str, typer.Option("--method",
        help="linear, or slerp (spherical interpolation of each tensor of two sources).")] = "linear",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with the folder, step and weight of each source.")] = False,
) -> None:
    """Average the weights of checkpoints of one model: of several runs, or several steps of one stage.

    The result is a run folder. Encode with it, evaluate and export it, or start a recipe from it with --init-from.

    Examples:

        conan merge runs/a runs/b --out runs/ab

        conan merge runs/a/supervised@800 runs/a/supervised@900 runs/a/supervised@1000 --out runs/soup

        conan merge runs/base runs/tuned --out runs/half --method slerp --weights 0.5,0.5 --json
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from conan_jax.errors import ConfigError
    from conan_jax.export.merge import merge as average

    try:
        shares = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {weights}: write numbers with commas between them, for instance 0.5,0.5") from None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading checkpoints", total=len(places))
        made = average(places, out, weights=shares, method=method, progress=lambda done, _: bar.update(task, completed=done))
    if as_json:
        described = {key: value for key, value in asdict(made).items() if key != "run"}
        sources = [dict(zip(("folder", "step", "weight"), source, strict=True)) for source in made.sources]
        typer.echo(json.dumps({"run": str(out), "method": method, **described, "sources": sources}))
        return
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{out}: " + " + ".join(f"{share:g} x {folder} (step {step})" for folder, step, share in made.sources))
    if made.straight:
        console.print(f"{len(made.straight)} of {made.tensors} tensors are parallel or zero and were averaged linearly: "
                      f"{', '.join(made.straight[:3])}{' ...' if len(made.straight) > 3 else ''}")
