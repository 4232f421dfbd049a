"""`pretrain` and `sft`: next-token prediction on packed rows (METHODS 1.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from conan_jax import sharding
from conan_jax.config import LMStage
from conan_jax.losses import chunked_cross_entropy
from conan_jax.model import Causal, Embedder, Layout
from conan_jax.stages.base import Batch, Carry, Metrics, Params


class LanguageModel:
    """Mean of -log p(next token) over the target tokens of the global batch, under a causal mask.

    A token is a target when `loss_mask` is 1 on it and the token before it belongs to its own segment. `pretrain` and
    `sft` differ in the loss mask alone, which the data room writes.
    """

    def __init__(self, config: LMStage, embedder: Embedder) -> None:
        self.config, self.embedder = config, embedder

    def loss(self, params: Params, carry: Carry, batch: Batch, step: Any, rng: Any) -> tuple[Any, tuple[Carry, Metrics]]:
        """As `stages.base.Stage.loss`; metrics `loss`, `tokens` (all real ones) and `target_tokens`."""
        tokens, segments = batch["tokens"], batch["segment_ids"]
        hidden = self.embedder.hidden(params, tokens, Layout.from_segments(segments, batch["positions"]), Causal())
        next_in_segment = (jnp.roll(segments, -1, axis=1) == segments) & (segments > 0)
        next_in_segment &= jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1
        weights = jnp.where(next_in_segment, jnp.roll(batch["loss_mask"], -1, axis=1), 0.0)
        total, count = chunked_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), self.embedder.embedding_table(params),
            jnp.roll(tokens, -1, axis=1).reshape(-1), weights.reshape(-1),
            self.config.loss_chunk_size, self.config.z_loss, groups=sharding.batch_parts(tokens.shape[0]))
        loss = total / jnp.maximum(count, 1.0)
        return loss, (carry, {"loss": loss, "tokens": jnp.sum(segments > 0).astype(jnp.float32), "target_tokens": count})

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
        """Batch and objective."""
        c = self.config
        return {
            "global batch": f"{c.global_batch_size:,} rows x {c.sequence_length:,} tokens",
            "tokens a step": f"at most {c.global_batch_size * c.sequence_length:,}",
            "objective": "next token, causal" + (", on output tokens" if c.kind == "sft" else ""),
            "loss chunk": f"{c.loss_chunk_size:,} tokens a device",
        }
