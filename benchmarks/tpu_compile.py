"""What TPU pods make of the attention kernels and of the full model's steps, compiled on a machine without a TPU.

    python benchmarks/tpu_compile.py [--json] [--list] [--only NAME ...] [--check]

Attention is 32/8 heads x 112 in bfloat16 under a soft mask whose alpha is traced, one row on one chip. The steps are those
of configs/conan_v2.py by `preflight.check`, optimizer included, on 256 chips of v5e: `pretrain` with 256 rows of 4096 tokens,
`weak` with 256 pairs of 32,768 tokens a side, each at once (no micro-batches, no chunks). The peak is what one device holds at
most, arguments included, as its compiler planned it. Needs libtpu (`make test-tpu` sets it up).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from conan_jax import hardware
from conan_jax.preflight import environment

POD = hardware.accelerator("v5e:16x16")
environment.prepare(POD)  # before jax is imported

import timing

import jax
import jax.numpy as jnp

from conan_jax import config, preflight, sharding
from conan_jax.config_io import load_run
from conan_jax.errors import ConanError, ConfigError
from conan_jax.model import Layout, SoftMask
from conan_jax.model.attention import attention
from conan_jax.model.softmask import Mask
from conan_jax.train.abstract import topology_devices

CONFIG = Path(__file__).parent.parent / "configs" / "conan_v2.py"
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
LENGTHS = (512, 4096, 32_768)
ROWS = 256
PEAK_GIB = {"pretrain": 3.9, "weak": 9.0}  # at most
LONG = config.Bucket(32_768, 32_768)


def one_chip(chip: str) -> jax.sharding.Mesh:
    """A mesh of one chip of `CHIPS`."""
    return sharding.make_mesh(config.Mesh(fsdp=1), topology_devices(CHIPS[chip]))


def compile_attention(
    mesh: jax.sharding.Mesh, length: int, gradient: bool = True, mask: Callable[[jax.Array], Mask] = SoftMask,
    heads: tuple[int, int] = (32, 8), head_dim: int = 112, dtype: jnp.dtype = jnp.bfloat16,
) -> jax.stages.Compiled:
    """The kernels, one row a device; with `gradient`, value and gradient. `heads`: of queries, of keys and values."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]

    def total(qkv: tuple, lengths: jax.Array, alpha: jax.Array) -> jax.Array:
        out = attention(*qkv, mask(alpha), Layout.from_lengths(lengths, length), implementation="pallas_tpu")
        return jnp.sum(out.astype(jnp.float32)) if gradient else out

    def operand(dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh) if shape else sharding.replicated(mesh))

    qkv = tuple(operand(dtype, rows, length, n, head_dim) for n in (*heads, heads[1]))
    with sharding.activate(mesh):
        step = jax.jit(jax.value_and_grad(total) if gradient else total)
        return step.lower(qkv, operand(jnp.int32, rows), operand(jnp.float32)).compile()


def measure_attention(name: str, chip: str, length: int, gradient: bool) -> Iterator[timing.Figure]:
    """The peak of attention alone."""
    peak = compile_attention(one_chip(chip), length, gradient).memory_analysis().peak_memory_in_bytes
    yield timing.plain(f"{name}, peak", peak / 2**20, "MiB")


def measure_step(name: str, stage: str, implementation: str) -> Iterator[timing.Figure]:
    """The peak against its bar, and how long the compiler took (this machine, as busy as it is)."""
    run = load_run(str(CONFIG), [f"model.attention={implementation}"])
    at_once = {"buckets": (LONG,), "encode_chunk_size": None} if stage == "weak" else {"gradient_accumulation_steps": 1}
    report = preflight.check(run, dataclasses.replace(run.stage(stage), global_batch_size=ROWS, **at_once), POD)
    yield timing.at_most(PEAK_GIB[stage], f"{name}, peak a device", report.peak_bytes_per_device / 2**30, "GiB")
    yield timing.plain(f"{name}, compilation", report.compile_seconds, "s")


def cases() -> dict[str, Callable[[], Iterator[timing.Figure]]]:
    """Everything there is to compile, by name: the kernels, then the steps by the default path, then the portable one."""
    found: dict[str, Callable[[], Iterator[timing.Figure]]] = {}
    for chip in CHIPS:
        for length in LENGTHS:
            for what, gradient in (("forward", False), ("forward and backward", True)):
                name = f"attention {chip} L={length} {what}"
                found[name] = partial(measure_attention, name, chip, length, gradient)
    for implementation in ("pallas_tpu", "blockwise"):
        for stage in PEAK_GIB:
            name = f"{stage} step v5e:16x16 {implementation}"
            found[name] = partial(measure_step, name, stage, implementation)
    return found


def chosen(only: list[str]) -> list[Callable[[], Iterator[timing.Figure]]]:
    """The cases whose names hold one of `only`, all without it. Raises `ConfigError` when a part is in no name."""
    for part in only:
        if not any(part in name for name in cases()):
            raise ConfigError(f"--only {part!r} is in no name of --list")
    return [measure for name, measure in cases().items() if not only or any(part in name for part in only)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--list", action="store_true", help="print the names of all cases and compile nothing")
    parser.add_argument("--only", action="append", default=[], metavar="NAME",
                        help="compile the cases whose name holds NAME; may be repeated")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure misses its bar")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(cases()))
        return 0
    try:
        missed = False
        for measure in chosen(arguments.only):
            for figure in measure():
                missed |= timing.show([figure], arguments.json)
    except ConanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 1 if missed and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
