"""Encoding the texts of a batch in as few calls as possible."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from conan_jax import sharding
from conan_jax.model import Embedder, Mask

FULL = 16_384  # tokens of a text batch on one device from which on more beside them gain no speed


def encode_all(
    embedder: Embedder, params: Any, texts: Mapping[Hashable, Mapping[str, Array]], mask: Mask
) -> dict[Hashable, Float[Array, "... D"]]:
    """Unit vectors of every text batch of `texts`, under the same keys.

    Text batches of one row length are encoded by one call: the values are the same, and the step compiles one body of
    the model a length instead of one a text batch. One that fills a device by itself gets a call of its own, so that the
    temporary arrays are those of one text batch. `tokens` may have further leading axes, [B, S, L] gives [B, S, D];
    `prompt_lengths` may be absent where no text has an instruction.
    """
    flat = {key: _flat(text) for key, text in texts.items()}
    calls: dict[Hashable, list[Hashable]] = {}
    for key, text in flat.items():
        rows, length = text["tokens"].shape
        fills_a_device = rows // sharding.batch_parts(rows) * length >= FULL
        calls.setdefault((length, key) if fills_a_device else length, []).append(key)
    vectors = {}
    for keys in calls.values():
        together = embedder.embed(params, {name: jnp.concatenate([flat[key][name] for key in keys]) for name in flat[keys[0]]}, mask)
        ends = np.cumsum([flat[key]["lengths"].shape[0] for key in keys])
        for key, rows in zip(keys, jnp.split(together, ends[:-1]), strict=True):
            vectors[key] = rows.reshape(*texts[key]["lengths"].shape, -1)
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


def _flat(text: Mapping[str, Array]) -> dict[str, Array]:
    lengths = text["lengths"].reshape(-1)
    prompts = text["prompt_lengths"].reshape(-1) if "prompt_lengths" in text else jnp.zeros_like(lengths)
    return {"tokens": text["tokens"].reshape(-1, text["tokens"].shape[-1]), "lengths": lengths, "prompt_lengths": prompts}
