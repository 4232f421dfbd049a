"""Which settings make a step smaller, in the order in which they cost least, and how far each has to go.

Each plan keeps what the one before it set. The arithmetic is that of what a device holds for one chunk or micro-batch: it
shrinks in proportion to their size, so the size follows from how far the program is over its limit. Whether it was enough
is for the compiler to say (`prove`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

from conan_jax import config
from conan_jax.config_io import override
from conan_jax.errors import ConfigError
from conan_jax.hardware import CHIPS, TOPOLOGIES, Accelerator, accelerator
from conan_jax.preflight.report import Fix, Report
from conan_jax.preflight.work import chunks_of

ROOM = 0.8  # of the limit that a plan aims at: the compiler's plan does not shrink quite in proportion
STATE_SHARE = 0.6  # of a device's memory that the state may fill when a larger accelerator is named
MAX_PROOFS = 3


def plans(run: config.Run, stage_config: config.AnyStage, report: Report) -> list[Fix]:
    """Settings that would make a refused step smaller, each with all before it, the cheapest first.

    remat="full"; chunks of texts or micro-batches; the chunk of the vocabulary loss; parameters over all devices; fewer rows. A
    setting that is as low as it goes is left out.
    """
    if report.hbm_bytes_per_device is None:
        return []
    name, kept = stage_config.name, []
    found: list[Fix] = []

    def plan(why: str, *settings: str) -> None:
        kept.extend(settings)
        found.append(Fix(_last_wins(kept), why))

    if run.model.remat != "full":
        plan("blocks keep their input alone for the gradient", "model.remat=full")
    devices = report.mesh["data"] * report.mesh["fsdp"]
    if isinstance(stage_config, config.LMStage):
        for steps in _accumulations(stage_config, devices, _excess(report)):
            plan("activations of one micro-batch at a time", f"{name}.gradient_accumulation_steps={steps}")
        if stage_config.loss_chunk_size > 128:
            plan("logits of fewer tokens at a time", f"{name}.loss_chunk_size=128")
    elif isinstance(stage_config, config.WeakStage | config.SupervisedStage):
        for size in _chunks(stage_config, devices, _excess(report)):
            plan("activations of few texts at a time, the gradients of all", f"{name}.encode_chunk_size={size}")
    if report.mesh["data"] > 1:
        plan("parameters and optimizer state over all devices", "mesh.data=1", "mesh.fsdp=-1")
    rows = getattr(stage_config, "global_batch_size", None)
    if rows is not None and rows // devices > 1:
        fewer = rows // _power_of_two(_excess(report))
        fewer = max(devices, fewer // devices * devices)
        steps = getattr(stage_config, "gradient_accumulation_steps", 1)
        again = (f"{name}.gradient_accumulation_steps=1",) if steps > 1 or any("accumulation" in s for s in kept) else ()
        if fewer < rows:
            plan("fewer rows an update, which changes the training", f"{name}.global_batch_size={fewer}", *again)
    return found


def prove(run: config.Run, stage_config: config.AnyStage, report: Report, compile_again: Callable[[config.Run, config.AnyStage], Report],
          limit: int = MAX_PROOFS) -> tuple[Fix | None, tuple[Fix, ...]]:
    """The first plan that fits, with its peak, and those that were compiled and do not fit (at most `limit` compilations).

    Plans that differ only in the size of their chunk are one idea: the first of them is tried first, the others only after
    every other idea had its turn.
    """
    tried: list[Fix] = []
    for fix in _by_turn(plans(run, stage_config, report))[:limit]:
        smaller = override(run, fix.settings)
        try:
            again = compile_again(smaller, smaller.stage(stage_config.name))
        except ConfigError:
            continue
        proved = Fix(fix.settings, fix.why, again.peak_bytes_per_device)
        if again.fits:
            return proved, tuple(tried)
        tried.append(proved)
    return None, tuple(tried)


def larger_accelerator(report: Report) -> str | None:
    """The smallest accelerator with more memory than this one whose devices could hold parameters, optimizer state and carry between them,
    with room for activations; fully sharded state is assumed. Of the same chips if there is one, else of the same kind (TPU or GPU), the
    smallest by its peak FLOP/s; None when the table has none."""
    here = accelerator(report.accelerator)
    memory = report.slices * here.chips * (report.hbm_bytes_per_device or 0)
    able = [one for one in _rentable() if one.chips * one.chip.hbm_bytes > memory
            and report.checkpoint_bytes <= STATE_SHARE * one.chips * one.chip.hbm_bytes]

    def distance(one: Accelerator) -> tuple[bool, bool, float]:
        return one.chip != here.chip, one.chip.platform != here.chip.platform, one.chips * one.chip.peak_flops

    return min(able, key=distance).name if able else None


def _excess(report: Report) -> float:
    """How many times smaller what is not the state must become."""
    state = sum(size for kind, size in report.memory.items() if kind != "activations_and_temporaries")
    free = ROOM * (report.hbm_bytes_per_device or 0) - state
    return math.inf if free <= 0 else max(1.0, (report.peak_bytes_per_device - state) / free)


def _accumulations(stage: config.LMStage, devices: int, excess: float) -> Iterator[int]:
    """Micro-batches that would do, then the most there can be: each keeps at least one row a device."""
    now, most = stage.gradient_accumulation_steps, max(1, stage.global_batch_size // devices)
    possible = [n for n in range(now + 1, most + 1) if stage.global_batch_size % n == 0 and stage.global_batch_size // n % devices == 0]
    enough = [n for n in possible if n >= now * excess]
    yield from dict.fromkeys([*enough[:1], *possible[-1:]])


def _chunks(stage: config.WeakStage | config.SupervisedStage, devices: int, excess: float) -> Iterator[int]:
    """Texts a device that would do, as a power of two, then a quarter of that."""
    whole = max(chunks_of(dataclasses.replace(stage, encode_chunk_size=1), devices).values())
    now = min(stage.encode_chunk_size or whole, whole)
    size = 1 if math.isinf(excess) else max(1, int(now / excess))
    size = 1 << (size.bit_length() - 1)
    yield from dict.fromkeys(n for n in (size, max(1, size // 4)) if n < now)


def _power_of_two(excess: float) -> int:
    return 2**20 if math.isinf(excess) else 1 << math.ceil(math.log2(max(excess, 1.0)) or 1)


def _last_wins(settings: list[str]) -> tuple[str, ...]:
    latest: Mapping[str, str] = {setting.partition("=")[0]: setting for setting in settings}
    return tuple(latest.values())


def _by_turn(found: list[Fix]) -> list[Fix]:
    first: dict[str, Fix] = {}
    later = [fix for fix in found if first.setdefault(fix.why, fix) is not fix]
    return [*first.values(), *later]


def _rentable() -> Iterator[Accelerator]:
    for kind, slices in TOPOLOGIES.items():
        yield from (accelerator(f"{kind}:{shape}") for shape in slices.values())
    for kind, chip in CHIPS.items():
        if chip.platform == "gpu":
            yield from (accelerator(f"{kind}-{nodes * chip.chips_per_host}") for nodes in (1, 2, 4, 8, 16, 32))
