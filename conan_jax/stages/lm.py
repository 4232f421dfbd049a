"""`pretrain` and `sft`: next-token prediction on packed rows (METHODS 1.2)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from conan_jax import sharding
from conan_jax.config import LMStage
from conan_jax.losses import chunked_cross_entropy
from conan_jax.model import Causal, Embedder, Layout
from conan_jax.stages import chunks
from conan_jax.stages.accumulate import sum_over
from conan_jax.stages.base import Batch, Carry, Metrics, Params
from conan_jax.stages.encode import dropout, row_keys


class LanguageModel:
    """Mean of -log p(next token) over the target tokens of the global batch, under a causal mask.

    A token is a target when `loss_mask` is 1 on it and the token before it belongs to its own segment. `pretrain` and
    `sft` differ in the loss mask alone, which the data room writes. With `gradient_accumulation_steps` the rows of every
    device are taken a micro-batch at a time; the mean is that of the whole batch all the same.
    """

    def __init__(self, config: LMStage, embedder: Embedder) -> None:
        self.config, self.embedder = config, embedder

    def loss(self, params: Params, carry: Carry, batch: Batch, step: Any, rng: Any) -> tuple[Any, tuple[Carry, Metrics]]:
        """As `stages.base.Stage.loss`; metrics `loss`, `tokens` (all real ones) and `target_tokens`."""
        segments = batch["segment_ids"]
        rows = {**{name: batch[name] for name in ("tokens", "segment_ids", "positions")}, "weights": target_weights(batch),
                "rows": jnp.arange(segments.shape[0], dtype=jnp.int32)}
        rows = {name: chunks.by_device(x) for name, x in rows.items()}
        count = self._micro_batches(rows["tokens"].shape[1])
        micro_batches = {name: chunks.split(x, count) for name, x in rows.items()}
        rng = dropout(self.embedder, rng)
        if count == 1:
            total = self._sum(rng, params, {name: x[0] for name, x in micro_batches.items()})
        else:
            total = sum_over(partial(self._sum, rng), params, micro_batches, self.embedder.axes())
        targets = jnp.sum(rows["weights"])
        loss = total / jnp.maximum(targets, 1.0)
        return loss, (carry, {"loss": loss, "tokens": jnp.sum(segments > 0).astype(jnp.float32), "target_tokens": targets})

    def _micro_batches(self, rows: int) -> int:
        """Into how many `rows` rows of a device are taken apart; one with fewer rows than steps takes a row at a time."""
        return chunks.count_chunks(rows, -(-rows // self.config.gradient_accumulation_steps))

    def _sum(self, rng: Any, params: Params, batch: Batch) -> Float[Array, ""]:
        """Sum of the loss over the targets of some rows; `weights` stand on the token before each target."""
        tokens = batch["tokens"]
        layout = Layout.from_segments(batch["segment_ids"], batch["positions"])
        hidden = self.embedder.hidden(params, tokens, layout, Causal(), row_keys(rng, batch["rows"]))
        return chunked_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), self.embedder.output_table(params), jnp.roll(tokens, -1, axis=1).reshape(-1),
            batch["weights"].reshape(-1), self.config.loss_chunk_size, self.config.z_loss, groups=sharding.row_parts())[0]

    def init_carry(self, num_examples: Mapping[str, int]) -> Carry:
        """Nothing is remembered between steps."""
        return {}

    def carry_axes(self, carry: Carry) -> Any:
        """Nothing is remembered between steps."""
        return {}

    def mask(self, step: Any) -> Causal:
        """Always causal."""
        return Causal()

    def describe(self) -> dict[str, str | int | float]:
        """Batch and objective; what a device does under the current mesh."""
        c = self.config
        rows = sharding.rows_per_device(c.global_batch_size)
        micro = self._micro_batches(rows)
        return {
            "global batch": f"{c.global_batch_size:,} rows x {c.sequence_length:,} tokens",
            "batch per device": f"{rows:,} rows, {micro:,} micro-batches of {-(-rows // micro):,}" if micro > 1 else f"{rows:,} rows at once",
            "tokens per step": f"at most {c.global_batch_size * c.sequence_length:,}",
            "objective": "next token, causal" + (", on output tokens" if c.kind == "sft" else ""),
            "loss chunk": f"{c.loss_chunk_size:,} tokens per device",
        }


def target_weights(batch: Batch) -> Float[Array, "B L"]:
    """The `loss_mask` of the token after each one, 0 where that belongs to another segment or to none."""
    segments = batch["segment_ids"]
    next_in_segment = (jnp.roll(segments, -1, axis=1) == segments) & (segments > 0)
    next_in_segment &= jnp.arange(segments.shape[1]) < segments.shape[1] - 1
    return jnp.where(next_in_segment, jnp.roll(batch["loss_mask"], -1, axis=1), 0.0)
