"""The soft mask: attention that moves from causal to bidirectional as alpha goes from 0 to 1 (METHODS 1.3).

For 1-based positions i (query) and j (key) inside a segment of true length l,

    M_ij = 1 where i >= j,  else min(alpha * l / x, 1)     with x = j (index="key") or i (index="query").

`apply="log"` adds log M to the scores, so a weight is proportional to M * exp(s): exactly causal at alpha = 0, exactly
bidirectional at alpha = 1, monotone between. `apply="multiply"` is the paper's literal (s * M), which is *not* causal
at alpha = 0. Above the diagonal M depends on one index only, so a mask is carried as one number per token (`weights`)
and attention never needs an L x L array.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from conan_jax.config import SoftMask as SoftMaskConfig
from conan_jax.errors import ConfigError
from conan_jax.model.layout import Layout

# Stands for log 0. Finite, so that no difference of two of them is NaN; exp of it is exactly 0 in float32.
MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SoftMask:
    """A mask between causal (alpha 0) and bidirectional (alpha 1).

    Attributes:
        alpha: float32 scalar in [0, 1]; may be traced, so annealing never recompiles.
        apply: "log" (add log M to the scores) or "multiply" (scores times M).
        index: which position divides alpha * l above the diagonal, the "key" j or the "query" i.
    """

    alpha: Float[Array, ""] | float
    apply: Literal["log", "multiply"] = field(default="log", metadata={"static": True})
    index: Literal["key", "query"] = field(default="key", metadata={"static": True})

    def weights(self, positions: Int[Array, "..."], lengths: Int[Array, "..."]) -> Float[Array, "..."]:
        """min(alpha * l / x, 1) for 0-based `positions` x - 1: the value of M above the diagonal, float32."""
        alpha = jax.lax.stop_gradient(jnp.asarray(self.alpha, jnp.float32))  # a schedule, whatever implementation reads it
        return jnp.minimum(alpha * lengths.astype(jnp.float32) / (positions + 1).astype(jnp.float32), 1.0)

    def is_causal(self) -> Bool[Array, ""]:
        """Whether no token sees a later one, so that blocks above the diagonal may be skipped; may be traced."""
        return jnp.asarray(self.alpha, jnp.float32) <= 0 if self.apply == "log" else jnp.asarray(False)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Causal:
    """Each token sees itself and what stands before it: M is 0 above the diagonal."""

    apply = "log"
    index = "key"

    def weights(self, positions: Int[Array, "..."], lengths: Int[Array, "..."]) -> Float[Array, "..."]:
        """Zeros, float32."""
        return jnp.zeros(positions.shape, jnp.float32)

    def is_causal(self) -> Bool[Array, ""]:
        """Always true."""
        return jnp.asarray(True)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Bidirectional:
    """Each token sees its whole segment: M is 1 everywhere."""

    apply = "log"
    index = "key"

    def weights(self, positions: Int[Array, "..."], lengths: Int[Array, "..."]) -> Float[Array, "..."]:
        """Ones, float32."""
        return jnp.ones(positions.shape, jnp.float32)

    def is_causal(self) -> Bool[Array, ""]:
        """Always false."""
        return jnp.asarray(False)


# Masks without numbers are static nodes: jaxlib 0.10 takes two dataclass nodes for equal when only their classes differ, and
# `jit` then runs, whenever their hashes happen to meet, the program of the other mask.
Mask = Causal | Bidirectional | SoftMask


def log_weights(weights: Float[Array, "..."]) -> Float[Array, "..."]:
    """log M with `MASKED` for log 0."""
    return jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0)), MASKED)


def mask_matrix(mask: Mask, layout: Layout) -> Float[Array, "B L L"]:
    """M of METHODS 1.3, rows = queries, 0 between segments and on padding. Float32, dense: for short rows and for study."""
    weights = mask.weights(layout.positions, layout.lengths)
    above = weights[:, None, :] if mask.index == "key" else weights[:, :, None]
    later = layout.positions[:, None, :] > layout.positions[:, :, None]
    return jnp.where(same_segment(layout), jnp.where(later, above, 1.0), 0.0)


def mask_bias(mask: Mask, layout: Layout) -> Float[Array, "B L L"]:
    """log M, a finite large negative number where M is 0: what `apply="log"` adds to the scores. Float32."""
    return log_weights(mask_matrix(mask, layout))


def same_segment(layout: Layout) -> Bool[Array, "B L L"]:
    """True where query (rows) and key (columns) are tokens of one segment."""
    return (layout.segment_ids[:, :, None] == layout.segment_ids[:, None, :]) & layout.real[:, None, :]


def alpha_at(step: Int[Array, ""] | int, total_steps: int, config: SoftMaskConfig) -> Float[Array, ""]:
    """alpha(t) of METHODS 1.3: 0 at step 0, 1 from step tau on; float32 scalar, `step` may be traced.

    With u = min(t / tau, 1) and tau = `config.steps` or `total_steps`: linear u, accelerate u^2, decelerate
    1 - (1 - u)^2, constant 1 (the hard switch the anneal is compared with).

    Raises:
        ConfigError: an unknown schedule, or `total_steps` below 1.
    """
    if total_steps < 1:
        raise ConfigError(f"a soft mask needs at least one step to anneal over, got {total_steps}")
    if config.schedule not in _SCHEDULES:
        raise ConfigError(f"soft_mask.schedule {config.schedule!r} is not known; use one of {', '.join(_SCHEDULES)}")
    u = jnp.clip(jnp.asarray(step, jnp.float32) / (config.steps or total_steps), 0.0, 1.0)
    return _SCHEDULES[config.schedule](u)


_SCHEDULES = {
    "linear": lambda u: u,
    "accelerate": lambda u: u**2,
    "decelerate": lambda u: 1.0 - (1.0 - u) ** 2,
    "constant": jnp.ones_like,
}
