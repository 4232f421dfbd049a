"""Attention forward and backward: blocks against the L x L bias, what the mask makes zero, and long rows.

    python benchmarks/attention.py [--rounds N] [--json] [--run-full]

On a CPU: float32, one row, 4 query heads and 1 key/value head of width 64, against `jax.nn.dot_product_attention` with
log M as an L x L bias, which is made beforehand and is on nobody's clock. Steps take turns; a time is the median of the
ratios of one round. Memory is the compiler's plan for what a step holds beside its arguments and results. The model's
full heads (32 and 8 of width 112, 32,768 tokens) are compiled, and with `--run-full` also run once: that takes minutes.
On an accelerator: bfloat16 and the full heads, every implementation that the platform has, side by side.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import conan_jax  # sets the allocator before jax starts  # noqa: F401

import jax
import jax.numpy as jnp
import numpy as np

from conan_jax.model import Layout, SoftMask, attention
from conan_jax.model.device import platform
from conan_jax.model.softmask import mask_bias

from timing import Figure, at_most, parser, plain, ratio, seconds, show, temporary_bytes

BARS = {2048: (0.72, 9.0), 8192: (0.60, 1.0)}  # length: time and temporary memory (%) of blocks over the bias, at most
SMALL, FULL = (4, 1, 64), (32, 8, 112)  # query heads, key/value heads, head width
FULL_LENGTH = 32768


class Step(NamedTuple):
    """A compiled program and its arguments."""

    compiled: Any
    arguments: tuple

    def __call__(self) -> Any:
        return self.compiled(*self.arguments)


def with_bias(q, k, v, bias, implementation=None):
    """What there is without this package: the library's attention under log M."""
    return jax.nn.dot_product_attention(q, k, v, bias=bias, implementation=implementation)


def in_blocks(q, k, v, state, implementation="blockwise"):
    mask, layout = state
    return attention(q, k, v, mask, layout, implementation=implementation)


def step(attend: Callable, length: int, state: Any, heads: tuple[int, int, int] = SMALL, dtype: Any = jnp.float32) -> Step:
    """Output and gradients of `attend` on one row of random numbers, as sum(o * w) and its derivative in q, k and v."""
    rng = np.random.default_rng(0)
    H, K, C = heads
    qkv_w = [jnp.asarray(rng.normal(size=(1, length, n, C)), dtype) for n in (H, K, K, H)]

    def loss(qkv, w, state):
        return jnp.sum((attend(*qkv, state) * w).astype(jnp.float32))

    arguments = (tuple(qkv_w[:3]), qkv_w[3], state)
    return Step(jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile(), arguments)


def row(alpha: float, length: int, real: int | None = None) -> tuple[SoftMask, Layout]:
    """One row of `length` tokens, `real` of them no padding (default all), under a soft mask."""
    return SoftMask(jnp.float32(alpha)), Layout.from_lengths(jnp.array([real or length]), length)


def bias_of(alpha: float, length: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.block_until_ready(jax.jit(lambda state: mask_bias(*state)[:, None].astype(dtype))(row(alpha, length)))


def against_bias(length: int, rounds: int) -> Iterator[Figure]:
    """Time and memory at one length, and at the longest what alpha and padding save."""
    steps = {"bias": step(with_bias, length, bias_of(0.5, length)), "blocks": step(in_blocks, length, row(0.5, length))}
    if length == max(BARS):
        # One program runs these four: alpha and the lengths are arguments.
        states = {"alpha 0": row(0.0, length), "alpha 1": row(1.0, length), "half": row(0.5, length, length // 2)}
        steps |= {name: steps["blocks"]._replace(arguments=(*steps["blocks"].arguments[:2], state)) for name, state in states.items()}
    times = seconds(steps, rounds)
    time_bar, memory_bar = BARS[length]
    yield at_most(time_bar, f"time of blocks over the bias, L={length}, alpha=0.5", ratio(times, "blocks", "bias"), "x")
    yield at_most(memory_bar, f"temporary memory of blocks over the bias, L={length}",
                  100 * temporary_bytes(steps["blocks"].compiled) / temporary_bytes(steps["bias"].compiled), "%")
    yield plain(f"temporary memory of blocks, L={length}", temporary_bytes(steps["blocks"].compiled) / 2**20, "MiB")
    yield plain(f"time of blocks, L={length}, alpha=0.5, least", min(times["blocks"]), "s")
    if length == max(BARS):
        yield at_most(0.57, f"time of alpha=0 over alpha=0.5 in blocks, L={length}", ratio(times, "alpha 0", "blocks"), "x")
        causal = steps["bias"]._replace(arguments=(*steps["bias"].arguments[:2], bias_of(0.0, length)))
        yield at_most(2e-5, f"largest error of a gradient at alpha=0 over its largest value, L={length}",
                      gradient_error(steps["alpha 0"], causal), "")
        yield plain(f"time of alpha=1 over alpha=0.5 in blocks, L={length}", ratio(times, "alpha 1", "blocks"), "x")
        yield plain(f"time of a row that is half padding over a full one, L={length}", ratio(times, "half", "blocks"), "x")


def gradient_error(actual: Step, reference: Step) -> float:
    """max |a - b| / max |b| over the gradients in q, k and v: the worst of the three."""
    pairs = zip(actual()[1], reference()[1], strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)


def full_heads(run: bool) -> Iterator[Figure]:
    """The model's own heads at its own length, on whatever is here."""
    full = step(in_blocks, FULL_LENGTH, row(0.5, FULL_LENGTH), FULL)
    kind = "32/8 heads x 112, L=32768, float32"
    yield at_most(1536, f"temporary memory of blocks, {kind}", temporary_bytes(full.compiled) / 2**20, "MiB")
    if run:
        start = time.perf_counter()
        loss, gradients = jax.block_until_ready(full())
        yield plain(f"time of one run of blocks, {kind}", time.perf_counter() - start, "s")
        finite = all(bool(jnp.isfinite(x).all()) for x in (loss, *gradients))
        yield at_most(0, f"values of that run that are not finite numbers, {kind}", 0 if finite else 1, "")


def side_by_side(rounds: int, device: str) -> Iterator[Figure]:
    """Every implementation that an accelerator has, full heads in bfloat16, over the time of blocks at the same length.

    One that does not fit or does not compile is named on stderr, with the reason, and has no figure.
    """
    for length in (512, 2048, 8192, FULL_LENGTH):
        choices: dict[str, Callable[[], Step]] = {"blockwise": lambda: step(in_blocks, length, row(0.5, length), FULL, jnp.bfloat16)}

        def library(implementation: str) -> Step:
            attend = lambda q, k, v, bias: with_bias(q, k, v, bias, implementation)  # noqa: E731
            return step(attend, length, bias_of(0.5, length, jnp.bfloat16), FULL, jnp.bfloat16)

        choices["xla with the bias"] = lambda: library("xla")
        if device == "gpu":
            choices["cudnn with the bias"] = lambda: library("cudnn")
        if device == "tpu":
            kernels = lambda q, k, v, state: in_blocks(q, k, v, state, "pallas_tpu")  # noqa: E731
            choices["pallas_tpu"] = lambda: step(kernels, length, row(0.5, length), FULL, jnp.bfloat16)
        steps = {}
        for name, make in choices.items():
            try:
                steps[name] = made = make()
                jax.block_until_ready(made())
            except Exception as error:  # out of memory or refused by the library: the others still have figures
                steps.pop(name, None)
                print(f"{name} at L={length} did not run: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        times = seconds(steps, rounds) if steps else {}
        for name in times:
            yield plain(f"{device}: time of {name}, L={length}, least", min(times[name]), "s")
            yield plain(f"{device}: temporary memory of {name}, L={length}", temporary_bytes(steps[name].compiled) / 2**20, "MiB")
            if name != "blockwise" and "blockwise" in times:
                yield plain(f"{device}: time of {name} over blockwise, L={length}", ratio(times, name, "blockwise"), "x")


def measure(rounds: int, run_full: bool) -> Iterator[Figure]:
    device = platform()
    if device != "cpu":
        yield from side_by_side(rounds, device)
        return
    for length in BARS:
        yield from against_bias(length, rounds)
    yield from full_heads(run_full)
    left_out = "" if run_full else " The full heads were compiled and not run (--run-full runs them)."
    print(f"Measured on a CPU; nothing here says how TPU kernels or a GPU would do.{left_out}", file=sys.stderr)


def main() -> None:
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("--run-full", action="store_true", help="also run the full heads at 32,768 tokens once (minutes)")
    arguments = arguments.parse_args()
    sys.exit(show(measure(arguments.rounds, arguments.run_full), arguments.json) and arguments.check)


if __name__ == "__main__":
    main()
