"""Dynamic hard negatives in the graph (METHODS 1.4): which candidates of its pool each example trains against, and when they change.

The state lives in the train state, keyed by example number, so it is sharded, checkpointed and resumed with the weights:

    slot    Int32[N S]    index into the example's own candidate pool, hardest first
    s0      Float32[N S]  cosine at which that candidate was first seen; NaN = not seen yet
    cursor  Int32[N]      the next candidate of the pool
    replaced_low, replaced_drop, exhausted   Int32 totals since the stage began

A batch carries every pool whole, [B, P, L]; the step encodes only the S active candidates, scores them, and writes the
next slots, which take effect at the example's next visit. Nothing crosses to the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from conan_jax.config import HardNegatives

State = dict[str, Array]

COUNTERS = ("replaced_low", "replaced_drop", "exhausted")
AXES = {"slot": ("examples", None), "s0": ("examples", None), "cursor": ("examples",), **dict.fromkeys(COUNTERS, ())}
PADDING = 1024  # N is rounded up to a multiple of this, so that any mesh in use divides it

_DROP_RATIO = {"v2": 1.2, "v1": 1.15}
_CEILING = {"v2": 0.7, "v1": 0.8}


def initial_state(num_examples: int, config: HardNegatives) -> State:
    """Slots 0..S-1, all unseen, the cursor behind them. Empty under `rule="off"`, which remembers nothing."""
    if config.rule == "off":
        return {}
    rows, slots = -(-num_examples // PADDING) * PADDING, config.num_negatives
    return {
        "slot": jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (rows, slots)),
        "s0": jnp.full((rows, slots), jnp.nan, jnp.float32),
        "cursor": jnp.full(rows, slots, jnp.int32),
        **{name: jnp.zeros((), jnp.int32) for name in COUNTERS},
    }


def active(
    state: State, ids: Int[Array, " B"], pool_size: Int[Array, " B"], config: HardNegatives
) -> tuple[Int[Array, "B S"], Float[Array, "B S"]]:
    """Pool indices that the examples `ids` train against now, and a float32 mask: 0 where a pool is too small to fill the slot."""
    first = jnp.broadcast_to(jnp.arange(config.num_negatives, dtype=jnp.int32), (ids.shape[0], config.num_negatives))
    slots = state["slot"][ids] if state else first
    return slots, (slots < pool_size[:, None]).astype(jnp.float32)


def gather(pool: Mapping[str, Any], slots: Int[Array, "B S"], mask: Float[Array, "B S"]) -> dict[str, Array]:
    """The active candidates of a pool {tokens [B P L], lengths [B P]}: {tokens [B S L], lengths [B S]}, empty slots of length 0."""
    lengths = jnp.take_along_axis(pool["lengths"], slots, axis=1, mode="clip")
    return {
        "tokens": jnp.take_along_axis(pool["tokens"], slots[..., None], axis=1, mode="clip"),
        "lengths": jnp.where(mask > 0, lengths, 0),
    }


def update(
    state: State,
    ids: Int[Array, " B"],
    scores: Float[Array, "B S"],
    pool_size: Int[Array, " B"],
    step: Int[Array, ""] | int,
    config: HardNegatives,
) -> State:
    """The state after a visit of the examples `ids`, whose active candidates scored `scores` = cos(f(q), f(n)).

    A slot seen for the first time records s0 = s. Then a slot asks for the next candidate when

        v2: s0 < low_score ("low"), or else drop_ratio * s < s0 and s < ceiling ("drop"), slot by slot;
        v1: on updates number `every`, 2 * `every`, ...: with s and s0 averaged over the sample's filled slots,
            drop_ratio * s < s0 and |s| < ceiling asks for all of them ("drop").

    Asking slots take the candidates at the cursor in slot order and become unseen. A slot that finds the pool exhausted
    keeps its candidate and its s0, and is counted. Under v1 the pool starts at rank `skip_top`, which the data room has
    already cut off, and the candidates trained first are those of i = 1: so the i-th set is ranks (i-1)*n+10 ... i*n+10.
    An example that stands twice in a batch is judged once, by its first row. Source: METHODS 1.4.
    """
    if config.rule == "off":
        return state
    drop_ratio = _DROP_RATIO[config.rule] if config.drop_ratio is None else config.drop_ratio
    ceiling = _CEILING[config.rule] if config.ceiling is None else config.ceiling
    slot, cursor = state["slot"][ids], state["cursor"][ids]
    filled = slot < pool_size[:, None]
    s0 = state["s0"][ids]
    s0 = jnp.where(filled & jnp.isnan(s0), scores, s0)
    first_row = jnp.argmax(ids[:, None] == ids[None, :], axis=1) == jnp.arange(ids.shape[0])
    judged = filled & first_row[:, None]

    if config.rule == "v2":
        low = judged & (s0 < config.low_score)
        drop = judged & ~low & (drop_ratio * scores < s0) & (scores < ceiling)
    else:
        mean, mean0 = _mean(scores, filled), _mean(s0, filled)
        fallen = (drop_ratio * mean < mean0) & (jnp.abs(mean) < ceiling) & ((step + 1) % config.every == 0)
        low, drop = jnp.zeros_like(judged), judged & fallen[:, None]

    asks = low | drop
    candidate = cursor[:, None] + jnp.cumsum(asks, axis=1, dtype=jnp.int32) - 1
    replaced = asks & (candidate < pool_size[:, None])
    rows = jnp.where(first_row, ids, state["slot"].shape[0])  # later rows of an example fall out of bounds and are dropped
    count = lambda where: jnp.sum(where, dtype=jnp.int32)
    return {
        "slot": state["slot"].at[rows].set(jnp.where(replaced, candidate, slot), mode="drop"),
        "s0": state["s0"].at[rows].set(jnp.where(replaced, jnp.nan, s0), mode="drop"),
        "cursor": state["cursor"].at[rows].set(cursor + jnp.sum(replaced, axis=1, dtype=jnp.int32), mode="drop"),
        "replaced_low": state["replaced_low"] + count(replaced & low),
        "replaced_drop": state["replaced_drop"] + count(replaced & drop),
        "exhausted": state["exhausted"] + count(asks & ~replaced),
    }


def _mean(values, where):
    return jnp.sum(jnp.where(where, values, 0.0), axis=1) / jnp.maximum(jnp.sum(where, axis=1), 1).astype(jnp.float32)
