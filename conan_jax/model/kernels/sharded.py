"""Kernels on a mesh: each device works on its own rows and its own heads, and nothing is exchanged."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from conan_jax.model.axes import current_axes

# Where an operand of attention has its rows and its heads, as "batch" and "heads"; a name stands for a whole pytree.
FORMS = {"tokens by heads": ("batch", None, "heads"), "heads by tokens": ("batch", "heads"), "tokens": ("batch",), "shared": ()}


def by_device(f: Callable, rows: int, kv_heads: int, operands: tuple[str, ...], results: tuple[str, ...]) -> Callable:
    """`f` under `jax.shard_map` over the current mesh; `f` itself where there is no mesh, or inside another `shard_map`.

    The compiler cannot look into a kernel and would gather its operands on every device. Rows and heads are split as
    flax's logical axis rules say of "batch" and "kv_heads": the query heads of a key/value head stay together. An axis
    that its devices do not divide is computed whole by each of them.

    Args:
        rows, kv_heads: global sizes B and K.
        operands, results: the form of each argument and result, keys of `FORMS`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if prod(dict(mesh.shape).values()) == 1 or AxisType.Manual in mesh.axis_types:
        return f
    axes = {None: None, "batch": current_axes("batch", rows) or None, "heads": current_axes("kv_heads", kv_heads) or None}

    def specs(forms: tuple[str, ...]) -> tuple[PartitionSpec, ...]:
        return tuple(PartitionSpec(*(axes[name] for name in FORMS[form])) for form in forms)

    # Results are never replicated by exchange, so the check of replication, which kernels do not support, has nothing to find.
    split = jax.shard_map(f, in_specs=specs(operands), out_specs=specs(results), check_vma=False)
    return lambda *args: split(*jax.tree.map(jnp.asarray, args))
