"""A batch in chunks, each of which holds the same number of rows of every device.

    rows [R, ...]  ->  by device [parts, n, ...]  ->  chunks [count, parts * size, ...]

Devices hold contiguous rows, so neither step moves a row from one to another. Rows that fill up are zeros: a text of
length 0, a packed row of padding; both weigh nothing and are dropped again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from conan_jax import sharding


def by_device(x: Shaped[Array, "R ..."]) -> Shaped[Array, "parts n ..."]:
    """The rows of each device of the current mesh. Rows that the devices do not divide are filled up and spread over all of them."""
    parts = sharding.row_parts()
    return sharding.split_axis(_fill(x, 0, parts).reshape(parts, -1, *x.shape[1:]))


def from_device(x: Shaped[Array, "parts n ..."], rows: int) -> Shaped[Array, "R ..."]:
    """The inverse of `by_device`. Rows that the devices do not divide come back whole on every device."""
    x = x.reshape(-1, *x.shape[2:])
    return x if x.shape[0] == rows else sharding.whole(x[:rows])


def count_chunks(rows: int, size: int | None) -> int:
    """Chunks that `rows` rows of a device make when each holds at most `size`; None: one."""
    return 1 if size is None else -(-rows // size)


def split(x: Shaped[Array, "parts n ..."], count: int) -> Shaped[Array, "count rows ..."]:
    """`count` chunks, equally large, the last one filled up."""
    x = _fill(x, 1, count)
    parts, rows = x.shape[:2]
    x = x.reshape(parts, count, rows // count, *x.shape[2:]).swapaxes(0, 1)
    return sharding.split_axis(x.reshape(count, -1, *x.shape[3:]), 1)


def join(x: Shaped[Array, "count rows ..."], rows: int) -> Shaped[Array, "parts n ..."]:
    """The inverse of `split`, of n = `rows` rows a device."""
    parts = sharding.row_parts()
    x = x.reshape(x.shape[0], parts, -1, *x.shape[2:]).swapaxes(0, 1)
    return sharding.split_axis(x.reshape(parts, -1, *x.shape[3:])[:, :rows])


def _fill(x: Array, axis: int, multiple: int) -> Array:
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
