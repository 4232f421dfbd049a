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

from conan_jax import config, distributed, hardware, sharding
from conan_jax.errors import CheckpointError, PeerError, Preempted, TrainingError
from conan_jax.stages.base import Stage
from conan_jax.train import checkpoint, metrics, optimizer, start_rule, state
from conan_jax.train.introduction import introduction
from conan_jax.train.step import make_train_step
from conan_jax.train.watchdog import Watchdog

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
    previous_folder: Path | None = None, init_from: str | None = None, console: Console | None = None,
    stop: Callable[[], bool] | None = None, devices: list[jax.Device] | None = None, fallback: bool = False, later_steps: float = 0.0,
) -> StageResult:
    """Train one stage to its last step, from wherever `start_rule.find_start` says. Every process of a run calls it alike.

    Args:
        pipeline: `num_examples`, `batch(step)`, `datasets_of(batch)` and `iterate(start)`, the batches from step `start` on (NumPy,
            this host's slice).
        init_from: where the weights come from when no stage before this one has any, as `start_rule.locate` takes it.
        stop: polled before every step; true saves and raises `Preempted`. By default SIGTERM and SIGINT do. Of several processes
            any may be asked: all of them stop at the same step, one later than the one where the first was asked.
        fallback: a damaged checkpoint is set aside for the newest good one before it, instead of refused.
        later_steps: the work of the stages that follow, in steps of this one, for the time left of the whole recipe.

    Raises:
        Preempted: asked to stop; the state is saved at the step reached.
        TrainingError: five updates in a row were not finite. Checkpoints stay as they are.
        CheckpointError: a checkpoint does not belong to this run, or cannot be written or read.
        PeerError: another process is gone.
    """
    console, is_main = console or Console(), distributed.is_main()
    start = start_rule.find_start(folder, previous_folder, run.model, tokenizer_sha256, fallback, init_from)
    if start.kind == "resume" and start.step >= stage_config.steps:
        console.print(f"stage {stage_config.name}: complete at step {start.step:,}", highlight=False, markup=False)
        record = metrics.last_record(folder / "metrics.jsonl") or {}
        return StageResult(folder, start.step, record.get("seconds") or 0.0, record, trained_steps=0)

    mesh = sharding.make_mesh(run.mesh, devices)
    axes = embedder.axes()
    schedule = optimizer.learning_rate_at(stage_config.optimizer, stage_config.steps)
    updates = optimizer.make_optimizer(stage_config.optimizer, stage_config.steps, axes)
    fresh = partial(state.fresh_state, stage=stage, optimizer=updates, num_examples=pipeline.num_examples)

    with sharding.activate(mesh), Watchdog(run.watchdog_seconds) as watchdog, _peers_may_end(), contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(_stop_on_signal())
        agreement = distributed.Agreement(mesh)
        abstract = state.abstract_state(embedder, stage, updates, pipeline.num_examples, mesh)
        _, body = state.count_parameters(abstract.params, axes)
        flops = metrics.flops_per_token(run.model, stage_config, body)

        for line in introduction(stage_config, stage, start, abstract, axes, mesh) if is_main else ():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        metadata = checkpoint.make_metadata(run, stage_config, tokenizer_sha256)
        checkpoints = stack.enter_context(contextlib.closing(checkpoint.Checkpoints(folder, stage_config.keep_checkpoints, metadata)))
        watchdog.beat(str(start))
        current = start_rule.load_start(start, abstract, scratch=lambda: state.scratch_params(embedder, abstract, run.seed),
                                        begin=lambda params: state.begin(params, abstract, fresh))
        train_step = make_train_step(stage, updates, schedule, run.seed, abstract)

        first = start.step if start.kind == "resume" else 0
        recorder = (metrics.Recorder(folder, stage_config, first, console, flops, _peak_flops(mesh), later_steps) if is_main
                    else metrics.Silent(flops))
        stack.enter_context(contextlib.closing(recorder))
        late = _OneStepLate(recorder, pipeline)
        batches = stack.enter_context(_closing_iterator(pipeline.iterate(first)))

        def save(step: int) -> None:
            late.flush()  # a record is never younger than the checkpoint that a resumed run starts from
            watchdog.beat(f"saving step {step}")
            checkpoints.save(step, current)

        def stopped(step: int) -> Preempted:
            watchdog.beat(f"the save of step {step}")
            checkpoints.wait()
            return Preempted(f"stage {stage_config.name!r} stopped at step {step} of {stage_config.steps}; "
                             "start the same command again to go on")

        for step in range(first + 1, stage_config.steps + 1):
            watchdog.beat(f"step {step - 1}")
            if agreement.ask(stop()):
                if step > first + 1:
                    save(step - 1)
                raise stopped(step - 1)
            began = time.perf_counter()
            batch = next(batches)
            recorder.meter.waited(time.perf_counter() - began)
            current, step_metrics = train_step(current, sharding.global_batch(batch, mesh))
            late.put(step, step_metrics, pipeline.datasets_of(batch))
            if step == stage_config.steps or step % stage_config.checkpoint_every == 0:
                save(step)
        if agreement.settle(stop()):
            raise stopped(stage_config.steps)
        watchdog.beat(f"the save of step {stage_config.steps}")
        checkpoints.wait()
        return StageResult(folder, stage_config.steps, recorder.meter.seconds, recorder.last, stage_config.steps - first)


class _OneStepLate:
    """Reads the metrics of a step after the next one was dispatched, so that the device never waits for the host."""

    def __init__(self, recorder: metrics.Recorder | metrics.Silent, pipeline: Any) -> None:
        self._recorder, self._pipeline = recorder, pipeline
        self._waiting: tuple[int, Any, Mapping[str, str]] | None = None

    def put(self, step: int, step_metrics: Any, datasets: Mapping[str, str]) -> None:
        self.flush()
        self._waiting = (step, step_metrics, datasets)

    def flush(self) -> None:
        if self._waiting is None:
            return
        (step, arrays, datasets), self._waiting = self._waiting, None
        values = {name: float(value) for name, value in jax.device_get(arrays).items()}
        self._recorder.record(step, values, datasets)
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
    chip = hardware.chip_of(mesh.devices.flat[0].device_kind)
    # A CPU's peak is a guess for preflights, no yardstick.
    return chip.peak_flops * mesh.devices.size if chip is not None and chip.platform != "cpu" else None


@contextlib.contextmanager
def _peers_may_end() -> Iterator[None]:
    """What a collective raises when a process at its other end is gone is no fault of this one: the same command goes on."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, CheckpointError) as error:
        cause = error.__cause__ if isinstance(error, CheckpointError) else error
        if jax.process_count() == 1 or not isinstance(cause, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" in str(cause):
            raise
        first_line = str(cause).strip().partition("\n")[0]
        raise PeerError(f"a collective failed, as it does when another process is gone: {first_line}. Look at the other processes' "
                        "output; start the same command again to go on") from error


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
