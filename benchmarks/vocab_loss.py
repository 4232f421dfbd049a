"""The vocabulary loss in chunks against the naive one: time and temporary memory of value and gradients.

    python benchmarks/vocab_loss.py [--rounds N] [--json]

4096 tokens, 32,000 words, 512 wide, float32; gradients in the hidden states and in the table. Compared in the same run:

    naive      all logits in one array, -log_softmax read at the targets, gradients by JAX: what the bars are relative to
    lean       all logits in one array too, as logsumexp minus the target's logit: an array less, the best of its kind we know
    recompute  `lean` on chunks of 512 tokens under `jax.checkpoint`: as little memory, the logits multiplied twice

Memory is what the compiler plans beside arguments and results; time is the median over rounds of the ratio to a neighbour.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import conan_jax  # sets the allocator before jax starts  # noqa: F401

import jax
import jax.numpy as jnp
import numpy as np

from conan_jax.losses import chunked_cross_entropy

from timing import Figure, at_most, parser, plain, ratio, seconds, show, temporary_bytes

TOKENS, WORDS, WIDTH, CHUNK = 4096, 32_000, 512, 1024


def naive(hidden, table, targets, weights):
    log_probabilities = jax.nn.log_softmax(hidden @ table.T, axis=-1)
    return -jnp.sum(weights * jnp.take_along_axis(log_probabilities, targets[:, None], axis=1)[:, 0])


def lean(hidden, table, targets, weights):
    logits = hidden @ table.T
    target = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - target))


def recompute(hidden, table, targets, weights):
    def body(total, chunk):
        states, ids, weight = chunk
        return total + jax.checkpoint(lean)(states, table, ids, weight), None

    chunks = tuple(x.reshape(-1, 512, *x.shape[1:]) for x in (hidden, targets, weights))
    return jax.lax.scan(body, jnp.zeros(()), chunks)[0]


def chunked(size: int) -> Callable:
    return lambda *arguments: chunked_cross_entropy(*arguments, size)[0]


def measure(rounds: int) -> Iterator[Figure]:
    """All figures. The bars: a tenth less time than the naive loss, an eighth of its memory."""
    r = np.random.default_rng(0)
    arguments = (jnp.asarray(r.normal(size=(TOKENS, WIDTH)), jnp.float32), jnp.asarray(r.normal(size=(WORDS, WIDTH)) / 16, jnp.float32),
                 jnp.asarray(r.integers(0, WORDS, TOKENS), jnp.int32), jnp.ones(TOKENS, jnp.float32))
    losses = {"naive": naive, "lean": lean, "recompute": recompute, "chunked": chunked(CHUNK), "half": chunked(CHUNK // 2)}
    programs = {name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile() for name, loss in losses.items()}
    memory = {name: temporary_bytes(program) for name, program in programs.items()}
    times = seconds({name: lambda program=program: program(*arguments) for name, program in programs.items()}, rounds)

    yield at_most(0.90, f"time of chunks of {CHUNK} over naive", ratio(times, "chunked", "naive"), "x")
    yield at_most(13.0, f"temporary memory of chunks of {CHUNK} over naive", 100 * memory["chunked"] / memory["naive"], "%")
    yield plain(f"time of chunks of {CHUNK // 2} over naive", ratio(times, "half", "naive"), "x")
    yield plain(f"temporary memory of chunks of {CHUNK // 2} over naive", 100 * memory["half"] / memory["naive"], "%")
    yield plain(f"time of chunks of {CHUNK} over lean", ratio(times, "chunked", "lean"), "x")
    yield plain(f"temporary memory of chunks of {CHUNK} over lean", 100 * memory["chunked"] / memory["lean"], "%")
    yield plain("time of recompute over naive", ratio(times, "recompute", "naive"), "x")
    yield plain("temporary memory of recompute over naive", 100 * memory["recompute"] / memory["naive"], "%")
    for name in ("naive", "lean", "chunked"):
        yield plain(f"temporary memory of {name}", memory[name] / 2**20, "MiB")
        yield plain(f"{name}, fastest round", min(times[name]), "s")


def main() -> None:
    arguments = parser(__doc__, rounds=5).parse_args()
    sys.exit(show(measure(arguments.rounds), arguments.json) and arguments.check)


if __name__ == "__main__":
    main()
