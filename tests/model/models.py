"""Tiny models shared by the tests of this room, with parameters large enough that every part matters."""

import dataclasses
from functools import lru_cache

import jax
import numpy as np

from conan_jax.config import Model
from conan_jax.model import Embedder

TINY = Model(vocab_size=48, hidden_size=32, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64,
             rope_theta=100.0, compute_dtype="float32", scan_layers=False, remat="none", attention="dense", attention_block_size=4)


def variant(**changes) -> Embedder:
    return Embedder(dataclasses.replace(TINY, **changes))


@lru_cache(maxsize=None)
def params_of(embedder: Embedder):
    """The embedder's tree filled with normal(0.3) numbers (norms around 1), in an order that does not depend on the options."""
    shapes = jax.eval_shape(embedder.init, jax.random.key(0))
    rng = np.random.default_rng(7)
    return jax.tree_util.tree_map_with_path(
        lambda path, s: (rng.normal(size=s.shape) * 0.3 + ("norm" in jax.tree_util.keystr(path))).astype(np.float32), shapes)


# Compiled once an embedder, mask kind and shape, whatever the number of calls.
hidden_of = jax.jit(Embedder.hidden, static_argnums=0)
embed_of = jax.jit(Embedder.embed, static_argnums=0)
