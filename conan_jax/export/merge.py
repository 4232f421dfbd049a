"""The average of several checkpoints of one model, as a run folder of its own.

Linear: sum_n w_n p_n, as published under the name of model soups (Wortsman et al., 2022). Slerp, of two: along the arc between
them, sin((1 - t) W) / sin W * a + sin(t W) / sin W * b with W the angle between a and b, for each tensor flattened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import acos, isclose, isfinite, sin, sqrt
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from conan_jax import config
from conan_jax.config_io import from_dict
from conan_jax.errors import CheckpointError, ConfigError
from conan_jax.hf.importer import placed, refuse_taken, write_run
from conan_jax.inference.load import find_tokenizer
from conan_jax.model import Embedder
from conan_jax.train import checkpoint, start_rule

METHODS = ("linear", "slerp")
SMALLEST_SINE = 1e-3  # of the angle between two tensors; below it, the arc between them is taken for a line


@dataclass(frozen=True)
class Merged:
    """What `merge` made. `sources`: (stage folder, step, weight) of each; `straight`: tensors, of `tensors`, that slerp took linearly."""

    run: config.Run
    stage: str
    step: int
    sources: tuple[tuple[str, int, float], ...]
    tensors: int
    straight: tuple[str, ...]


def merge(
    places: Sequence[str], out: str | os.PathLike[str], *, weights: Sequence[float] | None = None, method: str = "linear",
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Write the run folder `out`, whole or not at all: the stage of the first of `places` with averaged weights, and its tokenizer.

    Args:
        places: RUN, RUN/STAGE or RUN/STAGE@STEP, two or more; of one model and one tokenizer.
        weights: one a place, none negative, with the sum 1; default: equal ones.
        method: "linear" or "slerp", which takes two.
        progress: called with checkpoints read and all checkpoints.

    Raises:
        ConfigError: weights or a method that cannot be used, or something stands at `out`.
        CheckpointError: a checkpoint is missing or damaged, or they are of several models or tokenizers.
    """
    shares = _shares(places, weights, method)
    refuse_taken(Path(out))
    found = [start_rule.locate(place) for place in places]
    metadata = [checkpoint.read_metadata(folder, step) for folder, step in found]
    run = from_dict(metadata[0]["config"])
    for (folder, _), other in zip(found, metadata):
        if problem := start_rule.mismatch(other, run.model, metadata[0]["tokenizer_sha256"], start_rule.FREE_AT_A_START):
            raise CheckpointError(f"{folder} {problem} (here: {found[0][0]}); only weights of one model and one tokenizer can be averaged")
    tokenizer = find_tokenizer(run, found[0][0], metadata[0]["tokenizer_sha256"])
    here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here),
                            jax.eval_shape(Embedder(run.model).init, jax.random.key(0)))

    def read(i: int) -> dict[str, Float32[np.ndarray, "..."]]:
        params = checkpoint.restore_params(*found[i], abstract)
        if progress is not None:
            progress(i + 1, len(found))
        return {name: np.asarray(array) for name, array in _tensors(params)}

    straight: list[str] = []
    if method == "slerp":
        first, second = read(0), read(1)
        merged = {}
        for name in list(first):
            a, b = first.pop(name), second.pop(name)
            pairs = [(f"{name}[{n}]", *pair) for n, pair in enumerate(zip(a, b))] if name.startswith("layers.") else [(name, a, b)]
            parts = [slerp(x, y, shares[1]) for _, x, y in pairs]
            straight += [part for (part, _, _), merged_part in zip(pairs, parts) if merged_part is None]
            parts = [linear([x, y], shares) if part is None else part for (_, x, y), part in zip(pairs, parts)]
            merged[name] = np.stack(parts) if name.startswith("layers.") else parts[0]
    else:
        sums: dict[str, np.ndarray] = {}
        for i, share in enumerate(shares):
            for name, array in read(i).items():
                sums[name] = sums.get(name, 0.0) + share * array.astype(np.float64)
        merged = {name: array.astype(np.float32) for name, array in sums.items()}
    names = jax.tree_util.tree_flatten_with_path(abstract)
    params = jax.tree.unflatten(names[1], [merged[_name(path)] for path, _ in names[0]])

    stage = run.stage(metadata[0]["stage"])
    step = max(other["step"] for other in metadata if other["stage"] == stage.name and other["config"]["name"] == run.name)
    run = replace(run, **placed(Path(out)))
    sources = tuple((str(folder), step, share) for (folder, step), share in zip(found, shares))
    described = {"method": method, "sources": [{"folder": f, "step": s, "weight": w} for f, s, w in sources], "taken_linearly": straight}
    write_run(Path(out), run, stage, step, params, tokenizer, {"merge.json": described})
    count = sum(run.model.num_layers if name.startswith("layers.") else 1 for name in merged)
    return Merged(run, stage.name, step, sources, count, tuple(straight))


def linear(arrays: Sequence[Float32[np.ndarray, "..."]], weights: Sequence[float]) -> Float32[np.ndarray, "..."]:
    """sum_n w_n a_n, added up in float64."""
    return sum(weight * array.astype(np.float64) for array, weight in zip(arrays, weights)).astype(np.float32)


def slerp(a: Float32[np.ndarray, "..."], b: Float32[np.ndarray, "..."], t: float) -> Float32[np.ndarray, "..."] | None:
    """The point at t in [0, 1] of the arc from a to b, flattened, in float64. None where there is no arc: (anti)parallel, or zero."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    lengths = sqrt(x @ x) * sqrt(y @ y)
    angle = acos(min(max(float(x @ y) / lengths, -1.0), 1.0)) if lengths > 0 else 0.0
    if sin(angle) < SMALLEST_SINE:
        return None
    point = (sin((1 - t) * angle) * x + sin(t * angle) * y) / sin(angle)
    return point.astype(np.float32).reshape(a.shape)


def _shares(places: Sequence[str], weights: Sequence[float] | None, method: str) -> list[float]:
    if len(places) < 2:
        raise ConfigError("name two checkpoints or more to average")
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is not known; use {' or '.join(METHODS)}")
    if method == "slerp" and len(places) != 2:
        raise ConfigError(f"slerp goes from one checkpoint to another, and {len(places)} are named; use linear, or merge two at a time")
    shares = [1 / len(places)] * len(places) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(places):
        raise ConfigError(f"{len(places)} checkpoints need as many weights, got {len(shares)}")
    if not all(isfinite(share) and share >= 0 for share in shares) or not isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise ConfigError(f"the weights must be 0 or more with the sum 1, got {', '.join(f'{share:g}' for share in shares)}")
    return shares


def _tensors(params: Any) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
