"""Metrics of a run: metrics.jsonl, TensorBoard events, and a progress bar or plain lines.

MFU = real tokens/s * FLOPs per token / peak of the mesh. FLOPs of forward and backward per token, matrix products only:
`6 N` (N: parameters outside the embedding table) `+ 12 layers heads head_dim L` (attention over the whole row of L tokens,
no discount for a causal mask) `+ 6 V D` when the stage predicts tokens. Recomputation and padding earn nothing.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from conan_jax import config
from conan_jax.errors import TrainingError
from conan_jax.train.smoothing import SmoothedLosses
from conan_jax.units import duration

_LINE_SECONDS = 10.0  # between two plain lines, so that a log file of a long run stays readable
_SHOWN = ("learning_rate", "alpha", "grad_norm", "tokens_per_second", "mfu", "data_wait")
_SHORT = {"learning_rate": "lr", "grad_norm": "grad", "tokens_per_second": "tok/s", "data_wait": "data"}


def flops_per_token(model: config.Model, stage: config.Stage, body_parameters: int) -> float:
    """Training FLOPs of one real token, by the convention above. L is the longest row the stage trains on."""
    longest = max(config.Run.lengths(stage), default=0)
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * longest
    vocabulary = 6 * model.vocab_size * model.hidden_size if isinstance(stage, config.LMStage) else 0
    return float(6 * body_parameters + attention + vocabulary)


class Meter:
    """Rates over the steps since the last reading; the first step of a process, which compiles, is left out."""

    def __init__(self, flops_per_token: float, peak_flops: float | None, seconds: float = 0.0) -> None:
        """`peak_flops` of all devices together, None when unknown; `seconds` already spent by earlier processes."""
        self._flops, self._peak = flops_per_token, peak_flops
        self._began = time.perf_counter() - seconds
        self._compiled = False
        self._reset()

    def _reset(self) -> None:
        self._since, self._steps, self._tokens, self._waited = time.perf_counter(), 0, 0.0, 0.0

    @property
    def seconds(self) -> float:
        """Time in this stage, that of earlier processes included."""
        return time.perf_counter() - self._began

    def waited(self, seconds: float) -> None:
        """Add time in which the loop had no batch."""
        self._waited += seconds

    def step(self, tokens: float) -> None:
        """Count one finished step with so many real tokens."""
        if not self._compiled:
            self._compiled = True
            self._reset()
            return
        self._steps += 1
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Time, and the rates since the last `read` (none before the second step); the next window begins."""
        if not self._steps:
            return {"seconds": self.seconds}
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rates = {"seconds": self.seconds, "steps_per_second": self._steps / elapsed, "tokens_per_second": self._tokens / elapsed,
                 "data_wait": min(self._waited / elapsed, 1.0)}
        if self._peak is not None:
            rates["mfu"] = rates["tokens_per_second"] * self._flops / self._peak
        self._reset()
        return rates


class JsonLines:
    """`metrics.jsonl`: one object a line, `step` strictly rising, whole lines only.

    Opened for a run that stands at `resume_step`, it drops the lines beyond it and a line that a kill tore. Every
    line is handed to the operating system at once, so `kill -9` loses at most the one being written.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.last, keep = _read_through(path, resume_step)
        if path.exists():
            os.truncate(path, keep)
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record`; a number that is not finite becomes null, for JSON has none. Raises `TrainingError` when the disk refuses."""
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        try:
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"{self._path} could not be written: {error.strerror}; make room, then start the same command again"
            ) from error
        self.last = finite

    def close(self) -> None:
        self._file.close()


def last_record(path: Path) -> dict[str, Any] | None:
    """The newest whole record of a `metrics.jsonl`; None when there is none."""
    return _read_through(path, math.inf)[0]


def _read_through(path: Path, step: float) -> tuple[dict[str, Any] | None, int]:
    """The last record up to `step`, and the bytes up to its end."""
    last, end = None, 0
    if path.exists():
        with path.open("rb") as lines:
            for line in lines:
                record = _whole_record(line)
                if record is None or record["step"] > step:
                    break
                last, end = record, end + len(line)
    return last, end


def _whole_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class _Bar:
    """A live progress bar with rate and ETA."""

    def __init__(self, console: Console, name: str, start: int, steps: int, later_steps: float) -> None:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                   TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[recipe]}{task.fields[shown]}"))
        self._progress = Progress(*columns, console=console, speed_estimate_period=60)
        self._steps, self._later = steps, later_steps
        self._task = self._progress.add_task(name, total=steps, completed=start, rate="", recipe="", shown="")
        self._progress.start()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def show(self, record: Mapping[str, float], smoothed: Mapping[str, Mapping[str, float]]) -> None:
        self._progress.update(self._task, rate=f"{record.get('steps_per_second', 0):.2f} steps/s", shown=_pretty(record, smoothed),
                              recipe=_recipe_eta(record, self._steps, self._later))

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """Plain lines for a log file: the first and the last record, and one about every ten seconds between."""

    def __init__(self, console: Console, name: str, start: int, steps: int, later_steps: float) -> None:
        self._console, self._name, self._steps, self._later, self._printed = console, name, steps, later_steps, -math.inf

    def advance(self, step: int) -> None:
        """A line says its step itself."""

    def show(self, record: Mapping[str, float], smoothed: Mapping[str, Mapping[str, float]]) -> None:
        now, step = time.perf_counter(), int(record["step"])
        if now - self._printed < _LINE_SECONDS and step < self._steps:
            return
        self._printed = now
        rate = record.get("steps_per_second")
        whole = _recipe_eta(record, self._steps, self._later)
        pace = f"{rate:.2f} steps/s  ETA {duration((self._steps - step) / rate)}  {whole}" if rate else ""
        shown = _pretty(record, smoothed)
        self._console.print(f"{self._name} {step}/{self._steps}  {pace}{shown}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing is held."""


class Recorder:
    """Takes every finished step, keeps rates, and writes a record each `log_every` steps, at the last, and at any skipped one."""

    def __init__(self, folder: Path, stage: config.Stage, start: int, console: Console, flops: float, peak_flops: float | None,
                 later_steps: float = 0.0) -> None:
        """`later_steps`: the work of the stages that follow, in steps of this one."""
        self._stage = stage
        self._lines = JsonLines(folder / "metrics.jsonl", start)
        # Events of steps that will come again are hidden by the purge mark.
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None, flush_secs=10)
        self._view = (_Bar if console.is_terminal else _Lines)(console, stage.name, start, stage.steps, later_steps)
        self._skipped = (self._lines.last or {}).get("skipped") or 0
        self._losses = SmoothedLosses((self._lines.last or {}).get("smoothed"))
        self.meter = Meter(flops, peak_flops, (self._lines.last or {}).get("seconds") or 0.0)

    @property
    def last(self) -> dict[str, Any]:
        """The newest record, that of an earlier process included; empty before the first."""
        return dict(self._lines.last or {})

    def record(self, step: int, metrics: Mapping[str, float], datasets: Mapping[str, str]) -> None:
        """`metrics` of the update that made the state's step `step`; `datasets`: {task: dataset of its batch}.

        A record keeps the metrics of its own batch. `smoothed` holds the means of the losses.
        """
        self.meter.step(metrics.get("tokens", 0.0))
        self._losses.add(metrics, datasets)
        self._view.advance(step)
        new_skip, self._skipped = metrics["skipped"] > self._skipped, metrics["skipped"]
        if step % self._stage.log_every and step != self._stage.steps and not new_skip:
            return
        record = {"step": step, **metrics, **self.meter.read()}
        smoothed = self._losses.state()
        self._lines.write({**record, "smoothed": smoothed})
        for key, value in {**record, **{f"smoothed/{key}": found["mean"] for key, found in smoothed.items()}}.items():
            if key != "step" and math.isfinite(value):
                self._events.add_scalar(key, value, step)
        self._view.show(record, smoothed)

    def close(self) -> None:
        self._view.close()
        self._events.close()
        self._lines.close()


class Silent:
    """The recorder of a process that is not process 0: it keeps the time and writes nothing."""

    last: dict[str, Any] = {}

    def __init__(self, flops: float) -> None:
        self.meter = Meter(flops, None)

    def record(self, step: int, metrics: Mapping[str, float], datasets: Mapping[str, str]) -> None:
        """Process 0 writes the same metrics."""

    def close(self) -> None:
        """Nothing is held."""


def _recipe_eta(record: Mapping[str, float], steps: int, later_steps: float) -> str:
    """The time left of the stage and of those after it, by their FLOPs; compilation and evaluation are not in it. "" for the last stage."""
    rate = record.get("steps_per_second")
    return f"recipe about {duration((steps - record['step'] + later_steps) / rate)}  " if rate and later_steps else ""


def _pretty(record: Mapping[str, float], smoothed: Mapping[str, Mapping[str, float]]) -> str:
    parts = [_losses(smoothed)] if "loss" in smoothed else []
    for key in _SHOWN:
        if key in record:
            value = record[key]
            text = f"{value:.1%}" if key in ("mfu", "data_wait") else f"{value:,.0f}" if key == "tokens_per_second" else f"{value:.4g}"
            parts.append(f"{_SHORT.get(key, key)} {text}")
    return "  ".join(parts)


def _losses(smoothed: Mapping[str, Mapping[str, float]]) -> str:
    """`loss 2.41 (smoothed over 20 updates; pairs 2.1, names 0.9)`: of the stage, of its tasks, of the datasets in a mixture."""
    parts = [f"{key.partition('/')[2]} {found['mean']:.3g}" for key, found in smoothed.items() if key.count("/") == 1]
    parts = parts if len(parts) <= 4 else []
    updates = f"smoothed over {smoothed['loss']['updates']:.0f} updates"
    return f"loss {smoothed['loss']['mean']:.4g} ({'; '.join([updates, ', '.join(parts)]) if parts else updates})"
