"""How long a step may take: four lower bounds, and a range made of them.

    compute   hardware FLOPs / (devices x peak)
    hbm       bytes a device moves to and from its memory / bandwidth
    ici       for each group of mesh axes, bytes a device sends inside its slice / bandwidth of the links it can use
    dcn       bytes a device sends to other slices / its share of the host's network

    fast = max(model FLOPs / (devices x peak x best MFU), compute, hbm, sum of ici, dcn)
    slow = compute / best MFU + hbm + 2 x sum of ici + dcn

"Fast" overlaps everything and computes as well as anyone has published for a model of this size; "slow" overlaps nothing and gets
half of what the links can carry, as on a slice too small to wrap around. What is expected is their mean.

Bytes of memory are an estimate. A block writes and reads 6 D + 2 K C + 3 F numbers a token, in the compute dtype, each time it
runs forward and twice for the gradient; each run reads and writes all gathered weights; logits are written and read twice in float32; the
optimizer reads and writes parameters, gradient and both moments once. A group of g devices uses as many axes of the torus as it takes
to hold g, and the links of those alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from conan_jax import config
from conan_jax.hardware import Accelerator
from conan_jax.preflight.report import Traffic
from conan_jax.preflight.work import Work

# Full-attention MFU of tuned training of 1.3B to 1.9B decoders: marin 1.4B on v5p, nanochat 1.9B on H100, llm-foundry 1.3B on A100.
PUBLISHED_MFU = {"v5p": 0.52, "h100": 0.51, "a100": 0.61}
ASSUMED_MFU = 0.5  # of a chip with none to be found


@dataclass(frozen=True)
class Roofline:
    """Seconds. `bounds` by name, "ici KIND" for each group of mesh axes; `fast` and `slow` as above."""

    bounds: dict[str, float]
    fast: float
    slow: float

    @property
    def middle(self) -> float:
        """What is expected."""
        return (self.fast + self.slow) / 2


def best_mfu(chip: str) -> float:
    """The best MFU published for this chip near this size, by the convention of `train.metrics`."""
    return PUBLISHED_MFU.get(chip, ASSUMED_MFU)


def estimate(work: Work, traffic: Iterable[Traffic], hbm_bytes: float, accelerator: Accelerator, slices: int) -> Roofline:
    """The range for one step. `hbm_bytes` as `moved_bytes` gives them; a bandwidth that the table of hardware lacks bounds nothing."""
    chip, devices = accelerator.chip, accelerator.chips * slices
    peak, best = devices * chip.peak_flops, best_mfu(chip.name)
    bounds = {"compute": work.hardware_flops / peak}
    if chip.hbm_bandwidth:
        bounds["hbm"] = hbm_bytes / chip.hbm_bandwidth
    for one in traffic:
        bandwidth = chip.dcn_bandwidth if one.link == "dcn" else link_bandwidth(accelerator, one.members)
        if bandwidth:
            name = "dcn" if one.link == "dcn" else f"ici {one.axes}"
            bounds[name] = bounds.get(name, 0.0) + one.bytes_per_device / bandwidth
    ici = sum(seconds for name, seconds in bounds.items() if name.startswith("ici"))
    compute, memory, dcn = (bounds.get(name, 0.0) for name in ("compute", "hbm", "dcn"))
    fast = max(work.model_flops / (peak * best), compute, memory, ici, dcn)
    return Roofline(bounds, fast, max(fast, compute / best + memory + 2 * ici + dcn))


def link_bandwidth(accelerator: Accelerator, members: int) -> float | None:
    """Bytes/s that a chip can send to a group of so many inside its slice; None where the table knows no links."""
    chip = accelerator.chip
    if chip.ici_bandwidth is None:
        return None
    used, held = 0, 1
    for size in sorted(map(int, accelerator.topology.split("x")), reverse=True) if accelerator.topology else [accelerator.chips]:
        if held < members:
            used, held = used + 1, held * size
    return chip.ici_bandwidth * max(used, 1) / chip.ici_axes


def moved_bytes(model: config.Model, work: Work, parameters: int, body_parameters: int, mesh: dict[str, int], predicts: bool) -> float:
    """Bytes that one device reads from and writes to its memory in a step, estimated as above."""
    number = 2 if model.compute_dtype == "bfloat16" else 4
    parts = mesh["data"] * mesh["fsdp"]
    kv = 2 * model.num_kv_heads * model.head_dim
    a_token = 2 * (6 * model.hidden_size + (kv + 3 * model.intermediate_size) / mesh["tensor"])
    activations = work.token_passes / parts * model.num_layers * a_token * number
    weights = 2 * number * body_parameters / mesh["tensor"] * work.weight_passes
    logits = 4 * 4 * work.tokens / parts * model.vocab_size / mesh["tensor"] if predicts else 0.0
    optimizer = 2 * 4 * 4 * parameters / math.prod(mesh[axis] for axis in ("fsdp", "tensor"))
    return activations + weights + logits + optimizer
