"""From a stage and an accelerator to a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from conan_jax import config, sharding
from conan_jax.hardware import Accelerator
from conan_jax.model.attention import choose
from conan_jax.preflight import collectives, program, roofline, work
from conan_jax.preflight.report import Report, Traffic
from conan_jax.train.state import count_parameters


MANY_LENGTHS = 2  # row lengths, each a copy of the model in the program, from which on it is compiled with little effort
SURE = 0.6  # of the limit: above it, what little effort says is asked again


def check_stage(run: config.Run, stage_config: config.AnyStage, accelerator: Accelerator, *, slices: int = 1, hbm_bytes: int | None = None,
                num_examples: Mapping[str, int] | None = None, thorough: bool = False) -> Report:
    """As `preflight.check`."""
    chip, notes = accelerator.chip, []
    examples = dict(num_examples if num_examples is not None else one_epoch(stage_config))
    if num_examples is None:
        notes.append("no prepared data: the carry is sized for one epoch, steps x batch")
    placed = program.place(run, stage_config, examples, program.devices_of(accelerator, slices))
    limit = chip.hbm_bytes if hbm_bytes is None else hbm_bytes
    lengths = {length for _, length in work.rows_of(stage_config)}
    full = thorough or chip.platform != "tpu" or len(lengths) < MANY_LENGTHS
    compiled = program.compile_step(run, stage_config, examples, placed, full)
    if not full and limit is not None and compiled.peak > SURE * limit:
        full = True
        again = program.compile_step(run, stage_config, examples, placed)
        compiled = dataclasses.replace(again, seconds=compiled.seconds + again.seconds)
    if not full:
        notes.append(f"rows of {len(lengths)} lengths: compiled with little effort; for training it may hold up to "
                     "a third more (--thorough)")

    mesh = {axis: int(size) for axis, size in placed.mesh.shape.items()}
    parameters, body = count_parameters(placed.state.params, placed.axes)
    done = work.measure(run.model, stage_config, body, attention_of(run.model, stage_config, chip.platform), mesh["data"] * mesh["fsdp"])
    checkpoint, per_host = program.saved_bytes(placed.state)
    notes += _notes(stage_config, chip.platform, compiled.text is not None)
    facts: dict[str, Any] = {}
    if compiled.text is not None:
        found = collectives.read(compiled.text, slices)
        traffic = summarise(found.collectives, mesh)
        if found.unknown_loops:
            notes.append(f"{found.unknown_loops} loops with collectives have a length that the program does not tell: counted as 1")
        moved = roofline.moved_bytes(run.model, done, parameters, body, mesh, isinstance(stage_config, config.LMStage))
        facts = {"collectives": traffic, **_times(roofline.estimate(done, traffic, moved, accelerator, slices), done, stage_config.steps,
                                                  accelerator.chips * slices * chip.peak_flops, accelerator.chips * slices)}
        published = "" if chip.name in roofline.PUBLISHED_MFU else " (none published for this chip near this size)"
        notes.append(f"fast: all overlaps, at most {roofline.best_mfu(chip.name):.0%} MFU{published}; slow: nothing does")
    return Report(
        stage=stage_config.name, kind=stage_config.kind, accelerator=accelerator.name, slices=slices, devices=accelerator.chips * slices,
        hosts=accelerator.hosts * slices, mesh=mesh, batch=describe_batch(stage_config),
        fits=compiled.text is not None and (compiled.peak <= limit if limit is not None else None),
        peak_bytes_per_device=compiled.peak, hbm_bytes_per_device=limit, memory=_memory(placed, compiled),
        tokens_per_step=round(done.tokens), flops_per_step=done.model_flops, hardware_flops_per_step=done.hardware_flops,
        steps=stage_config.steps, checkpoint_bytes=checkpoint, checkpoint_bytes_per_host=per_host, num_examples=examples,
        compile_seconds=round(compiled.seconds, 1), thorough=full, notes=tuple(notes), refused=compiled.refused, **facts)


def one_epoch(stage_config: config.AnyStage) -> dict[str, int]:
    """Records of each task when every step takes new ones: what is assumed of data that is not there yet."""
    if isinstance(stage_config, config.SupervisedStage):
        steps = stage_config.steps // work.turns_of(stage_config)
        return {task.name: steps * task.global_batch_size for task in stage_config.tasks}
    return {"": stage_config.steps * work.rows_of(stage_config)[0][0]}


def attention_of(model: config.Model, stage_config: config.AnyStage, platform: str) -> work.Attention:
    """The implementation that the longest rows of the stage run through."""
    longest = max(length for _, length in work.rows_of(stage_config))
    return choose(platform, longest, model.attention_block_size) if model.attention == "auto" else model.attention


def describe_batch(stage_config: config.AnyStage) -> str:
    """"1,024 x 512 + 1,024 x 512": rows and tokens a row of what a step runs through the model."""
    return " + ".join(f"{rows:,} x {length:,}" for rows, length in work.rows_of(stage_config))


def summarise(found: tuple[collectives.Collective, ...], mesh: Mapping[str, int]) -> tuple[Traffic, ...]:
    """Collectives of one kind, link and group of mesh axes together, those that send most first."""
    sums: dict[tuple[str, str, str, int], list[int]] = {}
    for one in found:
        key = (one.kind, axes_of(one.group, mesh) if one.group else "slices", one.link, len(one.group))
        count, sent = sums.get(key, (0, 0))
        sums[key] = [count + one.times, sent + one.bytes * one.times]
    traffic = [Traffic(*key, count=count, bytes_per_device=sent) for key, (count, sent) in sums.items()]
    return tuple(sorted(traffic, key=lambda t: -t.bytes_per_device))


def axes_of(group: tuple[int, ...], mesh: Mapping[str, int]) -> str:
    """The mesh axes along which the members of a group differ, "data+fsdp"; positions as the flattened mesh numbers them."""
    places = np.array(np.unravel_index(np.array(group), tuple(mesh.values())))
    moved = [axis for axis, along in zip(mesh, places, strict=True) if len(set(along.tolist())) > 1]
    return "+".join(moved)


def _memory(placed: program.Placed, compiled: program.Compiled) -> dict[str, int]:
    """Bytes of one device by kind. What the compiler pads is counted where it is: "padding" of arguments, the rest with temporaries."""
    state = placed.state
    counters = (state.step, state.skipped, state.skipped_in_row)
    held = {"parameters": state.params, "optimizer_state": (state.opt_state, counters), "carry": state.carry, "batch": placed.batch}
    sizes = {kind: sharding.bytes_per_device(tree) for kind, tree in held.items()}
    given = sum(sizes.values())
    arguments = max(given, compiled.arguments or 0)
    return {**sizes, "padding": arguments - given, "activations_and_temporaries": max(0, compiled.peak - arguments)}


def _times(line: roofline.Roofline, done: work.Work, steps: int, peak: float, devices: int) -> dict[str, Any]:
    seconds = line.middle
    return {
        "roofline": line.bounds, "seconds": seconds, "seconds_range": (line.fast, line.slow), "mfu": done.model_flops / (seconds * peak),
        "mfu_range": (done.model_flops / (line.slow * peak), done.model_flops / (line.fast * peak)),
        "tokens_per_second": done.tokens / seconds, "days": steps * seconds / 86_400,
        "days_range": (steps * line.fast / 86_400, steps * line.slow / 86_400), "chip_hours": devices * steps * seconds / 3600,
    }


def _notes(stage_config: config.AnyStage, platform: str, ran: bool) -> list[str]:
    notes = ["FLOPs: matrix products of forward and backward, full attention, no recomputation, every position a token"]
    if isinstance(stage_config, config.WeakStage) and len(stage_config.buckets) > 1:
        notes.append(f"the largest of {len(stage_config.buckets)} buckets at every step; smaller ones take less")
    if work.turns_of(stage_config) > 1:
        notes.append("tasks take turns: FLOPs and tokens are their mean, collectives those of the busiest")
    if platform == "cpu":
        notes.append("a CPU has no HBM: the peak is arguments, results and temporaries as its compiler plans them; time is that of "
                     "computing alone at 1e11 FLOP/s a device")
    return notes if ran else [*notes, "the program was refused: no collectives, no time"]


