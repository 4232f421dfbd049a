"""`weak`: contrastive training on pairs while the mask opens from causal to bidirectional (METHODS 1.2, 1.3, 1.5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import jax.numpy as jnp

from conan_jax import sharding
from conan_jax.config import Contrastive, WeakStage
from conan_jax.losses import info_nce, matryoshka
from conan_jax.model import Embedder, SoftMask, alpha_at
from conan_jax.stages.base import Batch, Carry, Metrics, Params
from conan_jax.stages.encode import count_tokens, describe_chunks, dropout, encode_all, nonempty


class Weak:
    """InfoNCE over the global batch under `SoftMask(alpha(step))`; alpha is traced, so annealing never recompiles."""

    def __init__(self, config: WeakStage, embedder: Embedder) -> None:
        self.config, self.embedder = config, embedder

    def loss(self, params: Params, carry: Carry, batch: Batch, step: Any, rng: Any) -> tuple[Any, tuple[Carry, Metrics]]:
        """As `stages.base.Stage.loss`; metrics `loss`, `alpha`, `tokens` (of both towers) and those of `info_nce`."""
        c, mask = self.config, self.mask(step)
        texts = {"queries": batch["query"], "positives": batch["positive"]}
        objective = partial(info_nce, **contrastive_options(c.contrastive), query_hash=batch["query_hash"],
                            positive_hash=batch["positive_hash"], valid=nonempty(*texts.values()))
        vectors = encode_all(self.embedder, params, texts, mask, chunk_size=c.encode_chunk_size, rng=dropout(self.embedder, rng))
        loss, metrics = matryoshka(objective, vectors, c.matryoshka.dims, c.matryoshka.weights)
        return loss, (carry, {"loss": loss, "alpha": jnp.asarray(mask.alpha, jnp.float32), "tokens": count_tokens(texts), **metrics})

    def init_carry(self, num_examples: Mapping[str, int]) -> Carry:
        """Nothing is remembered between steps."""
        return {}

    def carry_axes(self, carry: Carry) -> Any:
        """Nothing is remembered between steps."""
        return {}

    def mask(self, step: Any) -> SoftMask:
        """The soft mask at alpha(step)."""
        soft = self.config.soft_mask
        return SoftMask(alpha_at(step, self.config.steps, soft), soft.apply or "log", soft.index or "key")

    def describe(self) -> dict[str, str | int | float]:
        """Batch, negatives and mask; what a device does under the current mesh."""
        c = self.config
        longest = max(b.query_length + b.passage_length for b in c.buckets)
        return {
            "global batch": f"{c.global_batch_size:,} pairs",
            "batch per device": f"{sharding.rows_per_device(c.global_batch_size):,} pairs, {describe_chunks(c.encode_chunk_size)}",
            "tokens per step": f"at most {c.global_batch_size * longest:,}",
            "negatives per query": f"{c.global_batch_size - 1:,} in batch",
            "temperature": c.contrastive.temperature,
            "mask": f"{c.soft_mask.schedule} from causal to bidirectional in {c.soft_mask.steps or c.steps:,} steps"
                    if c.soft_mask.schedule != "constant" else "bidirectional",
            **({"matryoshka dims": ", ".join(map(str, c.matryoshka.dims))} if c.matryoshka.dims else {}),
        }


def contrastive_options(contrastive: Contrastive) -> dict[str, Any]:
    """The fields of `config.Contrastive` as keywords of `info_nce`: they bear the same names."""
    return {option.name: getattr(contrastive, option.name) for option in fields(contrastive)}
