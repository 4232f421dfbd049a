"""MRL: one loss at several widths of the same vectors (METHODS 1.5; Kusupati et al., arXiv 2205.13147)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]


def matryoshka(
    loss: Callable[..., Loss],
    vectors: Mapping[str, Float[Array, "... D"]],
    dims: Sequence[int] = (),
    weights: Sequence[float] = (),
) -> Loss:
    """sum_d w_d * loss(vectors truncated to d coordinates, re-normalised) / sum_d w_d.

    Args:
        loss: takes the vectors as keyword arguments and returns (scalar, metrics), as `info_nce` and `cosent` do.
        vectors: float arrays of one width D.
        dims: widths, each at most D. Empty: the loss of the vectors as they are.
        weights: one for each of `dims`; empty for equal weights.

    Returns:
        (loss, metrics): the metrics of the widest vectors, and `loss@d` for each d of `dims`.

    Raises:
        ValueError: a width exceeds D.
    """
    if not dims:
        return loss(**vectors)
    width = min(v.shape[-1] for v in vectors.values())
    if max(dims) > width:
        raise ValueError(f"matryoshka dims {tuple(dims)} exceed the vectors' width {width}")
    total, by_width, widest = jnp.zeros(()), {}, {}
    weights = tuple(weights) or (1.0,) * len(dims)
    for dim, weight in zip(dims, weights, strict=True):
        value, metrics = loss(**{name: truncate(v, dim) for name, v in vectors.items()})
        total += weight * value
        by_width[f"loss@{dim}"] = value
        widest = metrics if dim == max(dims) else widest
    return total / sum(weights), {**widest, **by_width}


def truncate(vectors: Float[Array, "... D"], dim: int) -> Float[Array, "... d"]:
    """The first `dim` coordinates, L2-normalised in float32; a zero vector stays zero and has a zero gradient."""
    vectors = vectors[..., :dim].astype(jnp.float32)
    square = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return jnp.where(square > 0, vectors * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)
