"""CoSENT: rank sentence pairs by their cosine as people ranked them (METHODS 1.5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def cosent(
    first: Float[Array, "B D"],
    second: Float[Array, "B D"],
    scores: Float[Array, " B"],
    *,
    temperature: float | Float[Array, ""] = 0.05,
    valid: Bool[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """log( 1 + sum over pairs a, b with score_a > score_b of exp((cos_b - cos_a) / t) ),  cos_a = <first_a, second_a>.

    Args:
        first, second: L2-normalised vectors of the two sentences; computed in float32. The sum runs over the global batch.
        scores: graded similarity on any scale, only its order counts; equal scores make no term.
        temperature: t, in units of cosine.
        valid: False where a pair is empty; it then makes no term.

    Returns:
        (loss, metrics), float32 scalars: `cosine` (mean) and `ordered` (share of the ordered pairs the cosines rank right).
        A batch without two different scores has loss 0 and no gradient. Source: METHODS 1.5.
    """
    valid = jnp.ones(scores.shape, bool) if valid is None else valid
    cosines = jnp.sum(first.astype(jnp.float32) * second.astype(jnp.float32), axis=-1)
    ranked = (scores[:, None] > scores[None, :]) & valid[:, None] & valid[None, :]
    gaps = cosines[None, :] - cosines[:, None]
    terms = jnp.where(ranked, gaps / temperature, -1e30).reshape(-1)
    loss = jax.nn.logsumexp(jnp.concatenate([jnp.zeros(1), terms]))
    metrics = {
        "cosine": jnp.sum(jnp.where(valid, cosines, 0.0)) / jnp.maximum(jnp.sum(valid), 1),
        "ordered": jnp.sum(ranked & (gaps < 0)) / jnp.maximum(jnp.sum(ranked), 1),
    }
    return loss, {name: value.astype(jnp.float32) for name, value in metrics.items()}
