"""Step time of a contrastive update: 2-D against 3-D activations, unrolled against scanned layers, blockwise against dense attention.

    python benchmarks/model_step.py [--rounds N] [--json]

The step is InfoNCE forward and backward on 64 texts of 128 tokens (4 layers x 256, 8/2 heads, FFN 768, V 8192, float32).
Variants run in turn, round by round, and every ratio is the median over rounds. A bar is the value that supports the choice
made in the code.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator

import conan_jax  # sets the allocator before jax starts  # noqa: F401

import jax
import jax.numpy as jnp
import numpy as np

from conan_jax.config import Model
from conan_jax.model import Embedder, Layout, SoftMask, attention
from conan_jax.model.layers import RMSNorm, rope_tables
from conan_jax.model.transformer import Block, l2_normalise

from timing import Figure, at_least, parser, plain, ratio, seconds, show, temporary_bytes

TEXTS, LENGTH = 64, 128
BASE = Model(vocab_size=8192, hidden_size=256, intermediate_size=768, num_layers=4, num_heads=8, num_kv_heads=2, max_length=2048,
             compute_dtype="float32", scan_layers=False, remat="none")


def three_dimensional(params, batch: dict, mask: SoftMask) -> jax.Array:
    """The unrolled model again, with [B, L, D] activations between and inside the blocks."""
    layout = Layout.from_lengths(batch["lengths"], LENGTH)
    rope = rope_tables(layout.positions, BASE.head_dim, BASE.rope_theta)
    x = params["embedding"][batch["tokens"]]
    for n in range(BASE.num_layers):
        x, _ = Block(BASE).apply({"params": jax.tree.map(lambda p: p[n], params["layers"])}, x, rope, layout, mask)
    x = RMSNorm(BASE.rms_norm_eps).apply({"params": params["final_norm"]}, x)
    return l2_normalise(x.mean(axis=1))


def contrastive_step(embed: Callable) -> Callable:
    """Compiled InfoNCE value and gradient, first half of the texts against the second; temperature 0.02."""
    rng = np.random.default_rng(0)
    batch = {"tokens": jnp.asarray(rng.integers(4, BASE.vocab_size, (TEXTS, LENGTH)), jnp.int32),
             "lengths": jnp.full(TEXTS, LENGTH), "prompt_lengths": jnp.zeros(TEXTS, jnp.int32)}
    params = jax.jit(Embedder(BASE).init)(jax.random.key(0))

    def loss(params, batch, alpha):
        vectors = embed(params, batch, SoftMask(alpha))
        scores = vectors[: TEXTS // 2] @ vectors[TEXTS // 2 :].T / 0.02
        return jnp.mean(jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores))

    args = (params, batch, jnp.float32(0.3))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
    return lambda: compiled(*args)


def attention_step(implementation: str, length: int, alpha: float = 0.3) -> tuple[Callable, float]:
    """Compiled attention value and gradient on 4096 tokens of `length`, and its temporary memory in MiB."""
    rng = np.random.default_rng(0)
    q, k, v, w = (jnp.asarray(rng.normal(size=(4096 // length, length, n, 32)), jnp.float32) for n in (8, 2, 2, 8))
    layout = Layout.from_lengths(jnp.full(len(q), length), length)

    def total(qkv, alpha):
        return jnp.sum(attention(*qkv, SoftMask(alpha), layout, implementation=implementation) * w)

    args = ((q, k, v), jnp.float32(alpha))
    compiled = jax.jit(jax.value_and_grad(total)).lower(*args).compile()
    return lambda: compiled(*args), temporary_bytes(compiled) / 2**20


def measure(rounds: int) -> Iterator[Figure]:
    """All figures; a bar is the value that supports the choice made in the code."""
    variants = {"2d": {}, "scan": {"scan_layers": True}, "blockwise": {"attention": "blockwise"}}
    steps = {name: contrastive_step(Embedder(dataclasses.replace(BASE, **changes)).embed) for name, changes in variants.items()}
    steps["3d"] = contrastive_step(three_dimensional)
    times = seconds(steps, rounds)
    # Three dimensions and the scan are what a CPU configuration does not choose; within one block the two attentions are equals.
    yield plain("step, 2-D activations, unrolled", min(times["2d"]), "s")
    yield at_least(1.0, "time of [B, L, D] activations over 2-D", ratio(times, "3d", "2d"), "x")
    yield at_least(1.0, "time of scanned over unrolled layers", ratio(times, "scan", "2d"), "x")
    yield plain("time of blockwise over dense attention in the step, L=128", ratio(times, "blockwise", "2d"), "x")
    dense, dense_mib = attention_step("dense", 2048)
    blocks, blocks_mib = attention_step("blockwise", 2048)
    causal, _ = attention_step("blockwise", 2048, alpha=0.0)
    times = seconds({"dense": dense, "blockwise": blocks, "causal": causal}, rounds)
    yield at_least(1.0, "time of dense over blockwise attention, L=2048", ratio(times, "dense", "blockwise"), "x")
    yield at_least(10.0, "memory of dense over blockwise attention, L=2048", dense_mib / blocks_mib, "x")
    yield at_least(1.0, "time of alpha=0.3 over alpha=0 in blockwise attention, L=2048", ratio(times, "blockwise", "causal"), "x")


def main() -> None:
    arguments = parser(__doc__, rounds=10).parse_args()
    sys.exit(show(measure(arguments.rounds), arguments.json) and arguments.check)


if __name__ == "__main__":
    main()
