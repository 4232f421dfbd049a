"""Encoding the texts of a batch in as few calls as possible."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from conan_jax.model import Embedder, Mask


def encode_all(
    embedder: Embedder, params: Any, texts: Mapping[Hashable, Mapping[str, Array]], mask: Mask
) -> dict[Hashable, Float[Array, "... D"]]:
    """Unit vectors of every text batch of `texts`, under the same keys.

    Text batches of one row length are encoded by one call: the values are the same, and the step compiles one body of
    the model a length instead of one a text batch. `tokens` may have further leading axes, [B, S, L] gives [B, S, D];
    `prompt_lengths` may be absent where no text has an instruction.
    """
    by_length: dict[int, list[Hashable]] = {}
    for key, text in texts.items():
        by_length.setdefault(text["tokens"].shape[-1], []).append(key)
    vectors = {}
    for length, keys in by_length.items():
        flat = [_flat(texts[key], length) for key in keys]
        together = embedder.embed(params, {name: jnp.concatenate([t[name] for t in flat]) for name in flat[0]}, mask)
        start = 0
        for key, rows in zip(keys, (t["lengths"].shape[0] for t in flat), strict=True):
            vectors[key] = together[start : start + rows].reshape(*texts[key]["lengths"].shape, -1)
            start += rows
    return vectors


def count_tokens(texts: Mapping[Hashable, Mapping[str, Array]]) -> Float[Array, ""]:
    """Real tokens of all text batches together, float32."""
    return sum((jnp.sum(text["lengths"]).astype(jnp.float32) for text in texts.values()), jnp.zeros((), jnp.float32))


def nonempty(*texts: Mapping[str, Int[Array, "..."]]) -> Array:
    """Bool[B]: every one of the text batches has a text in this row."""
    valid = texts[0]["lengths"] > 0
    for text in texts[1:]:
        valid &= text["lengths"] > 0
    return valid


def _flat(text: Mapping[str, Array], length: int) -> dict[str, Array]:
    lengths = text["lengths"].reshape(-1)
    prompts = text["prompt_lengths"].reshape(-1) if "prompt_lengths" in text else jnp.zeros_like(lengths)
    return {"tokens": text["tokens"].reshape(-1, length), "lengths": lengths, "prompt_lengths": prompts}
