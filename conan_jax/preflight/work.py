"""The arithmetic of one step, from the configuration and the shapes of its batch alone.

`model_flops` follows the MFU of `train.metrics`: the matrix products of forward and backward, every position of the batch counted
as a real token. A row of L tokens costs 6 N a token (N: parameters outside the embedding table), 12 layers H C L for attention over
the whole row without a discount for a causal mask, and 6 V D where the stage predicts tokens.

`hardware_flops` adds what the devices really compute beside it:
  * model.remat="full" runs each block forward once more, but for its last product, whose result no gradient needs; encoding in
    chunks (GradCache) runs the whole of it forward once more;
  * attention that keeps no scores forms them again for its gradient: one product more in the blockwise path (14 layers H C L in all),
    three more in the two TPU kernels (18), which may leave out half of all blocks under a causal mask (not counted);
  * the similarity scores of a contrastive loss, 6 x queries x candidates x width, at every Matryoshka width.
Elementwise work, the optimizer and the rows that fill up a sub-batch are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conan_jax import config
from conan_jax.errors import ConfigError

Attention = Literal["dense", "blockwise", "pallas_tpu"]

_ATTENTION_BACKWARD = {"dense": 8, "blockwise": 10, "pallas_tpu": 14}  # times H C L, a token and layer; forward is 4


@dataclass(frozen=True)
class Work:
    """One step on all devices together.

    `weight_passes`: how often the blocks' weights are gone through, once for each time that the blocks run forward and twice for their
    gradient, in every micro-batch or chunk. `token_passes`: the same of each token, summed over tokens.
    """

    tokens: float
    model_flops: float
    hardware_flops: float
    weight_passes: float
    token_passes: float


def rows_of(stage: config.AnyStage) -> list[tuple[int, int]]:
    """(rows, tokens a row) of every text batch that one step runs through the model.

    Of a `weak` stage with several buckets, the one with most tokens is taken, as `data.shapes.batch_shapes` does. Under
    `update="one_task"` these are the texts of all tasks, whose turns take as many steps.
    """
    match stage:
        case config.LMStage():
            return [(stage.global_batch_size, stage.sequence_length)]
        case config.WeakStage():
            bucket = max(stage.buckets, key=lambda b: b.query_length + b.passage_length)
            return [(stage.global_batch_size, bucket.query_length), (stage.global_batch_size, bucket.passage_length)]
        case config.SupervisedStage():
            return [rows for task in stage.tasks for rows in _rows_of_task(task, stage.hard_negatives.num_negatives)]
    options = stage.options
    try:
        return [(options["global_batch_size"], options["query_length"]), (options["global_batch_size"], options["passage_length"])]
    except KeyError as error:
        raise ConfigError(f"stage {stage.name!r}: its options lack {error}, without which its batches are not known") from error


def turns_of(stage: config.AnyStage) -> int:
    """Steps over which the texts of `rows_of` are spread: the number of tasks that take turns, else 1."""
    return len(stage.tasks) if getattr(stage, "update", "") == "one_task" else 1


def chunks_of(stage: config.AnyStage, devices: int) -> dict[int, int]:
    """Row length -> parts that its rows run through the model in, one after the other on each device.

    Micro-batches of an LM stage; of the others, chunks of all texts of one length together (`stages.encode.encode_all`).
    """
    rows_a_device: dict[int, int] = {}
    for rows, length in rows_of(stage):
        rows_a_device[length] = rows_a_device.get(length, 0) + -(-rows // devices)
    if isinstance(stage, config.LMStage):
        steps = stage.gradient_accumulation_steps
        return {length: -(-rows // -(-rows // steps)) for length, rows in rows_a_device.items()}
    size = getattr(stage, "encode_chunk_size", None)
    return {length: 1 if size is None else -(-rows // size) for length, rows in rows_a_device.items()}


def measure(model: config.Model, stage: config.AnyStage, body_parameters: int, attention: Attention, devices: int) -> Work:
    """The work of one update of `stage`; the mean of their turns where its tasks take turns.

    Args:
        body_parameters: parameters outside the embedding table.
        devices: parts that the rows are divided into (mesh data x fsdp).
    """
    chunks, turns, predicts = chunks_of(stage, devices), turns_of(stage), isinstance(stage, config.LMStage)
    forwards = {length: 1 + (model.remat == "full") + (count > 1 and not predicts) for length, count in chunks.items()}
    vocabulary = 6 * model.vocab_size * model.hidden_size if predicts else 0
    model_flops, hardware_flops, tokens, token_passes = 0.0, _scores(stage, model.hidden_size), 0.0, 0.0
    for rows, length in rows_of(stage):
        n = rows * length
        attention_unit = model.num_layers * model.num_heads * model.head_dim * length
        forward = 2 * body_parameters + 4 * attention_unit
        backward = 4 * body_parameters + _ATTENTION_BACKWARD[attention] * attention_unit
        model_flops += n * (6 * body_parameters + 12 * attention_unit + vocabulary)
        unneeded = 2 * model.num_layers * model.intermediate_size * model.hidden_size if model.remat == "full" else 0
        hardware_flops += n * (forwards[length] * forward - unneeded + backward + vocabulary)
        tokens, token_passes = tokens + n, token_passes + n * (forwards[length] + 2)
    weight_passes = sum(count * (forwards[length] + 2) for length, count in chunks.items())
    return Work(*(figure / turns for figure in (tokens, model_flops, hardware_flops, weight_passes, token_passes)))


def _rows_of_task(task: config.Task, hard_negatives: int) -> list[tuple[int, int]]:
    rows, bucket = task.global_batch_size, task.bucket
    own = {"retrieval": hard_negatives, "classification": task.num_negatives, "sts": 0}[task.kind]
    return [(rows, bucket.query_length), (rows, bucket.passage_length), *([(rows * own, bucket.passage_length)] if own else [])]


def _scores(stage: config.AnyStage, width: int) -> float:
    """FLOPs of the products of queries and candidates, forward and backward."""
    if isinstance(stage, config.LMStage):
        return 0.0
    widths = getattr(stage, "matryoshka", config.Matryoshka()).dims or (width,)
    tasks = getattr(stage, "tasks", None)
    if tasks is None:
        (rows, _), *_ = rows_of(stage)
        pairs = rows * rows
    else:
        pairs = 0
        for task in tasks:
            candidates = sum(rows for rows, _ in _rows_of_task(task, stage.hard_negatives.num_negatives)[1:])
            if task.kind != "sts":
                pairs += task.global_batch_size * candidates if task.in_batch_negatives else candidates
    return 6.0 * pairs * sum(widths)
