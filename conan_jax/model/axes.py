"""What the current mesh and flax's logical axis rules make of a logical axis name."""

from __future__ import annotations

from math import prod

import jax
from flax import linen as nn


def current_axes(name: str | None, size: int) -> tuple[str, ...]:
    """The mesh axes that a dimension of `size` with this logical name is split over.

    Empty where there is no mesh, the name has no axes, or their devices do not divide `size`: it then stays whole.
    """
    axes = dict(nn.get_logical_axis_rules()).get(name) or ()
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    sizes = jax.sharding.get_abstract_mesh().shape
    return axes if sizes and size % prod(sizes[axis] for axis in axes) == 0 else ()
