"""Training one stage, whatever it is: mesh, state, start, step, log, save."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from conan_jax import config, sharding
from conan_jax.errors import Preempted, TrainingError
from conan_jax.stages.base import Stage
from conan_jax.train import checkpoint, metrics, optimizer, state
from conan_jax.train.introduction import introduction
from conan_jax.train.step import make_train_step

MAX_SKIPPED_IN_ROW = 5


@dataclass(frozen=True)
class StageResult:
    """How a stage ended: its folder, last step, seconds (those of earlier processes included), last record of metrics.

    `trained_steps` counts the updates of this process; 0 when the stage was complete already.
    """

    folder: Path
    step: int
    seconds: float
    metrics: dict[str, Any]
    trained_steps: int


def train_stage(
    run: config.Run, stage_config: config.Stage, *, stage: Stage, embedder: Any, pipeline: Any, tokenizer_sha256: str, folder: Path,
    previous_folder: Path | None = None, console: Console | None = None, stop: Callable[[], bool] | None = None,
    devices: list[jax.Device] | None = None,
) -> StageResult:
    """Train one stage to its last step, from wherever `checkpoint.find_start` says.

    Args:
        pipeline: `num_examples`, `batch(step)` and `iterate(start)`, the batches from step `start` on (NumPy, this host's slice).
        stop: polled before every step; true saves and raises `Preempted`. By default SIGTERM and SIGINT do.

    Raises:
        Preempted: asked to stop; the state is saved at the step reached.
        TrainingError: five updates in a row were not finite. Checkpoints stay as they are.
        CheckpointError: a checkpoint does not belong to this run, or cannot be written or read.
    """
    console = console or Console()
    start = checkpoint.find_start(folder, previous_folder, run.model, tokenizer_sha256)
    if start.kind == "resume" and start.step >= stage_config.steps:
        console.print(f"stage {stage_config.name}: complete at step {start.step:,}", highlight=False, markup=False)
        record = metrics.last_record(folder / "metrics.jsonl") or {}
        return StageResult(folder, start.step, record.get("seconds") or 0.0, record, trained_steps=0)

    mesh = sharding.make_mesh(run.mesh, devices)
    axes = embedder.axes()
    schedule = optimizer.learning_rate_at(stage_config.optimizer, stage_config.steps)
    updates = optimizer.make_optimizer(stage_config.optimizer, stage_config.steps, axes)
    fresh = partial(state.fresh_state, stage=stage, optimizer=updates, num_examples=pipeline.num_examples)

    with sharding.activate(mesh), contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(_stop_on_signal())
        abstract = state.abstract_state(embedder, stage, updates, pipeline.num_examples, mesh)
        _, body = state.count_parameters(abstract.params, axes)
        flops = metrics.flops_per_token(run.model, stage_config, body)

        for line in introduction(stage_config, stage, start, abstract, axes, mesh):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        metadata = checkpoint.make_metadata(run, stage_config, tokenizer_sha256)
        checkpoints = stack.enter_context(contextlib.closing(checkpoint.Checkpoints(folder, stage_config.keep_checkpoints, metadata)))
        current = checkpoint.load_start(start, abstract, scratch=lambda: state.scratch_params(embedder, abstract, run.seed),
                                        begin=lambda params: state.begin(params, abstract, fresh))
        train_step = make_train_step(stage, updates, schedule, run.seed, abstract)

        first = start.step if start.kind == "resume" else 0
        recorder = stack.enter_context(contextlib.closing(metrics.Recorder(folder, stage_config, first, console, flops, _peak_flops(mesh))))
        late = _OneStepLate(recorder, pipeline)
        batches = stack.enter_context(_closing_iterator(pipeline.iterate(first)))

        for step in range(first + 1, stage_config.steps + 1):
            if stop():
                if step > first + 1:
                    late.flush()
                    checkpoints.save(step - 1, current)
                    checkpoints.wait()
                raise Preempted(f"stage {stage_config.name!r} stopped at step {step - 1} of {stage_config.steps}; "
                                "start the same command again to go on")
            began = time.perf_counter()
            batch = next(batches)
            recorder.meter.waited(time.perf_counter() - began)
            current, step_metrics = train_step(current, sharding.global_batch(batch, mesh))
            late.put(step, step_metrics)
            if step == stage_config.steps or step % stage_config.checkpoint_every == 0:
                late.flush()  # a record is never younger than the checkpoint that a resumed run starts from
                checkpoints.save(step, current)
        checkpoints.wait()
        return StageResult(folder, stage_config.steps, recorder.meter.seconds, recorder.last, stage_config.steps - first)


class _OneStepLate:
    """Reads the metrics of a step after the next one was dispatched, so that the device never waits for the host."""

    def __init__(self, recorder: metrics.Recorder, pipeline: Any) -> None:
        self._recorder, self._pipeline = recorder, pipeline
        self._waiting: tuple[int, Any] | None = None

    def put(self, step: int, step_metrics: Any) -> None:
        self.flush()
        self._waiting = (step, step_metrics)

    def flush(self) -> None:
        if self._waiting is None:
            return
        (step, arrays), self._waiting = self._waiting, None
        values = {name: float(value) for name, value in jax.device_get(arrays).items()}
        self._recorder.record(step, values)
        if values["skipped_in_row"] >= MAX_SKIPPED_IN_ROW:
            raise TrainingError(
                f"step {step}: the loss or gradient was not finite {MAX_SKIPPED_IN_ROW} times in a row (loss {values['loss']}, "
                f"gradient norm {values['grad_norm']}); parameters and checkpoints are untouched. Look at the examples "
                f"{_example_ids(self._pipeline.batch(step - 1))}, or lower the learning rate")


def _example_ids(batch: Mapping[str, Any], task: str = "") -> str:
    """The `ids` of a batch, sub-batch by sub-batch."""
    parts = []
    for key, value in batch.items():
        if key == "ids":
            parts.append(f"{task} {np.asarray(value).tolist()}".strip())
        elif isinstance(value, Mapping):
            parts.append(_example_ids(value, f"{task}.{key}".strip(".")))
    return "; ".join(part for part in parts if part)


def _peak_flops(mesh: jax.sharding.Mesh) -> float | None:
    peak = metrics.PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
    return peak * mesh.devices.size if peak is not None else None


@contextlib.contextmanager
def _closing_iterator(batches: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Close an iterator that can be closed, so that its threads end with the stage."""
    try:
        yield batches
    finally:
        getattr(batches, "close", lambda: None)()


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT ask to stop after the current step; a second SIGINT acts at once. Only the main thread may listen."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, _: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    try:
        for number in before:
            signal.signal(number, ask)
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
