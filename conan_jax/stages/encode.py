"""Encoding the texts of a batch: in as few calls as possible, or a few texts at a time with the gradients of all at once.

A contrastive loss needs every vector of the batch before its first gradient, yet one vector's gradient needs no other
text: so the vectors are computed chunk by chunk and forgotten but for their D numbers, and the backward pass computes each
chunk again to send its part of the gradient through (GradCache: Gao et al., arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from conan_jax import sharding
from conan_jax.model import Embedder, Mask
from conan_jax.stages import chunks

FULL = 16_384  # tokens of a text batch on one device from which on more beside them gain no speed

Texts = Mapping[Hashable, Mapping[str, Array]]


def encode_all(
    embedder: Embedder, params: Any, texts: Texts, mask: Mask, *, chunk_size: int | None = None, rng: Any = None
) -> dict[Hashable, Float[Array, "... D"]]:
    """Unit vectors of every text batch of `texts`, under the same keys.

    Text batches of one row length are encoded by one call: the values are the same, and the step compiles one body of
    the model a length instead of one a text batch. Without chunks, one that fills a device by itself gets a call of its own,
    so that the temporary arrays are those of one text batch. A text batch whose leading axis the devices do not divide is
    spread over all of them, and its vectors are whole on every device. `tokens` may have further leading axes, [B, S, L]
    gives [B, S, D]; `prompt_lengths` may be absent where no text has an instruction.

    Args:
        chunk_size: texts a device whose activations exist at one time; None: all of a call. Vectors and gradients are the same.
        rng: the key of dropout, None for none (see `dropout`). What is dropped of a text depends on its place in `texts` alone, not
            on chunks or devices.
    """
    flat, first = {}, 0
    for key, text in texts.items():
        flat[key] = _flat(text, first)
        first += flat[key]["lengths"].shape[0]
    calls: dict[Hashable, list[Hashable]] = {}
    for key, text in flat.items():
        rows, length = text["tokens"].shape
        fills_a_device = chunk_size is None and -(-rows // sharding.row_parts()) * length >= FULL
        calls.setdefault((length, key) if fills_a_device else length, []).append(key)
    vectors = {}
    for keys in calls.values():
        # Text batches lie side by side on each device; those that were whole on every device are spread together.
        divided = [[key] for key in keys if sharding.batch_parts(texts[key]["lengths"].shape[0]) == sharding.row_parts()]
        groups = divided + [group for group in ([key for key in keys if [key] not in divided],) if group]
        placed = [{name: chunks.by_device(jnp.concatenate([flat[key][name] for key in group])) for name in flat[group[0]]}
                  for group in groups]
        call = {name: jnp.concatenate([group[name] for group in placed], axis=1) for name in placed[0]}
        ends = np.cumsum([group["lengths"].shape[1] for group in placed])
        parts = jnp.split(_encode(embedder, params, call, mask, chunk_size, rng), ends[:-1], axis=1)
        for group, part in zip(groups, parts, strict=True):
            sizes = [flat[key]["lengths"].shape[0] for key in group]
            for key, rows in zip(group, jnp.split(chunks.from_device(part, sum(sizes)), np.cumsum(sizes)[:-1]), strict=True):
                vectors[key] = rows.reshape(*texts[key]["lengths"].shape, -1)
    return vectors


def _encode(
    embedder: Embedder, params: Any, call: Mapping[str, Array], mask: Mask, chunk_size: int | None, rng: Any
) -> Float[Array, "parts n D"]:
    """Vectors of the texts of each device."""
    def embed(params: Any, text: Mapping[str, Array]) -> Float[Array, "rows D"]:
        batch = {name: text[name] for name in ("tokens", "lengths", "prompt_lengths")}
        return embedder.embed(params, batch, mask, row_keys(rng, text["rows"]))

    rows = call["lengths"].shape[1]
    count = chunks.count_chunks(rows, chunk_size)
    split = {name: chunks.split(x, count) for name, x in call.items()}
    if count == 1:
        return chunks.join(embed(params, {name: x[0] for name, x in split.items()})[None], rows)
    axes = embedder.axes()

    # All that is kept of a chunk is its vectors. The forward pass of the model runs once for those and once more for the
    # gradient; under model.remat="full" its blocks run a third time, since the second pass keeps their inputs only. A chunk
    # small enough for model.remat="none" or "dots" avoids that: what bounds the memory is the chunk already.
    # A scan keeps forward and backward apart by itself, so nothing has to keep XLA from merging them.
    @partial(jax.checkpoint, prevent_cse=False)
    def forgetful(params: Any, chunk: Mapping[str, Array]) -> Float[Array, "rows D"]:
        return embed(sharding.as_parameters(params, axes), chunk)

    return chunks.join(jax.lax.map(partial(forgetful, params), split), rows)


def dropout(embedder: Embedder, rng: Any) -> Any:
    """`rng` where the model has dropout; None where it has none, so that nothing is drawn."""
    return rng if embedder.config.hidden_dropout else None


def row_keys(rng: Any, rows: Int[Array, " B"]) -> Any:
    """A key for each row, from its number alone; None without `rng`."""
    return None if rng is None else jax.vmap(partial(jax.random.fold_in, rng))(rows)


def describe_chunks(chunk_size: int | None) -> str:
    """What `encode_all` does with the texts of a device, for people."""
    return "encoded at once" if chunk_size is None else f"encoded {chunk_size:,} texts at a time"


def count_tokens(texts: Mapping[Hashable, Mapping[str, Array]]) -> Float[Array, ""]:
    """Real tokens of all text batches together, float32."""
    return sum((jnp.sum(text["lengths"]).astype(jnp.float32) for text in texts.values()), jnp.zeros((), jnp.float32))


def nonempty(*texts: Mapping[str, Int[Array, "..."]]) -> Array:
    """Bool[B]: every one of the text batches has a text in this row."""
    valid = texts[0]["lengths"] > 0
    for text in texts[1:]:
        valid &= text["lengths"] > 0
    return valid


def _flat(text: Mapping[str, Array], first: int) -> dict[str, Array]:
    lengths = text["lengths"].reshape(-1)
    prompts = text["prompt_lengths"].reshape(-1) if "prompt_lengths" in text else jnp.zeros_like(lengths)
    return {"tokens": text["tokens"].reshape(-1, text["tokens"].shape[-1]), "lengths": lengths, "prompt_lengths": prompts,
            "rows": first + jnp.arange(lengths.shape[0], dtype=jnp.int32)}
