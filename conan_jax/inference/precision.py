"""Vectors in fewer bits, with the meaning sentence-transformers gives the names.

    float32   as they are
    uint8     floor((x - low) / step) per dimension, step = (high - low) / 255, clipped to [0, 255]
    int8      the same minus 128
    ubinary   one bit a dimension, x > 0, eight to a byte, the first dimension in the highest bit
    binary    the same minus 128, as int8
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Num

from conan_jax.errors import ConfigError, DataError

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
DTYPES: dict[str, type] = {"float32": np.float32, "int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8}


def check_precision(precision: str) -> None:
    """Raise `ConfigError` for a name that is not known."""
    if not isinstance(precision, str) or precision not in DTYPES:
        raise ConfigError(f"precision {precision!r} is not known; use one of {', '.join(DTYPES)}")


def is_whole(number: object) -> bool:
    """Whether it is an integer, of Python or NumPy."""
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def kept_dimensions(truncate_dim: int | None, dimension: int) -> int:
    """How many numbers of a vector of `dimension` are kept; None: all. Raises `ConfigError` for what is no such number."""
    if truncate_dim is None:
        return dimension
    if not is_whole(truncate_dim) or not 1 <= truncate_dim <= dimension:
        raise ConfigError(f"truncate_dim must be a whole number in [1, {dimension}], the width of the vectors; got {truncate_dim!r}")
    return int(truncate_dim)


def width(dimension: int, precision: Precision) -> int:
    """Elements a vector of `dimension` has in a precision."""
    return -(-dimension // 8) if precision.endswith("binary") else dimension


def ranges_of(vectors: Float[np.ndarray, "N D"]) -> Float32[np.ndarray, "2 D"]:
    """The lowest and the highest value of each dimension.

    Raises `ConfigError` for a single vector, since every range would be empty.
    """
    if len(vectors) < 2:
        raise ConfigError("int8 and uint8 need ranges: give several texts at once, or `ranges`, the lowest and highest value of each "
                          "dimension over texts like these")
    return np.stack([vectors.min(axis=0), vectors.max(axis=0)]).astype(np.float32)


def quantize(
    vectors: Float[np.ndarray, "N D"], precision: Precision, ranges: Float[np.ndarray, "2 D"] | None = None
) -> Num[np.ndarray, "N W"]:
    """Vectors in `precision`; W = D, or ceil(D / 8) of the binary ones.

    Args:
        ranges: of int8 and uint8, the lowest and the highest value of each dimension; default: those of `vectors`. Values
            outside are clipped.

    Raises `ConfigError` for an unknown precision, wrong ranges (`checked_ranges`), or one vector without ranges, and `DataError` for a
    vector with a number that is not finite.
    """
    check_precision(precision)
    if not np.isfinite(vectors).all():
        row = int(np.argwhere(~np.isfinite(np.atleast_2d(vectors)).all(axis=1))[0, 0])
        raise DataError(f"vector {row} holds a number that is not finite (NaN or infinity): the weights are damaged or their training "
                        "diverged; use another checkpoint")
    if precision == "float32":
        return vectors.astype(np.float32, copy=False)
    if precision.endswith("binary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else (bits ^ 128).view(np.int8)
    if not len(vectors):
        return np.zeros(vectors.shape, DTYPES[precision])
    low, high = checked_ranges(ranges_of(vectors) if ranges is None else np.asarray(ranges, np.float32), vectors.shape[1])
    if (vectors != low).any():
        refuse_empty_ranges(np.stack([low, high]))
    step = (high - low) / 255
    levels = np.clip(np.floor((vectors - low) / np.where(step == 0, 1, step)), 0, 255)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)


def dequantize(vectors: Num[np.ndarray, "N W"], precision: Precision, dimension: int, ranges: Float[np.ndarray, "2 D"] | None = None
               ) -> Float32[np.ndarray, "N D"]:
    """Numbers to compare with a float32 query: the middle of each level of int8 and uint8, +-1 / sqrt(D) of a bit."""
    if precision == "float32":
        return np.asarray(vectors, np.float32)
    if precision.endswith("binary"):
        bits = np.unpackbits(vectors.view(np.uint8) ^ (128 if precision == "binary" else 0), axis=-1, count=dimension)
        return (bits * np.float32(2) - 1) / np.float32(np.sqrt(dimension))
    low, high = checked_ranges(np.asarray(ranges, np.float32), dimension)
    levels = vectors.astype(np.float32) + (128.5 if precision == "int8" else 0.5)
    return low + levels * ((high - low) / 255)


def checked_ranges(ranges: np.ndarray, dimension: int) -> np.ndarray:
    """`ranges`. Raises `ConfigError` unless they are the lowest and the highest of each of `dimension` numbers: finite, not reversed."""
    if ranges.shape != (2, dimension):
        raise ConfigError(f"ranges must have the shape (2, {dimension}), lowest and highest of each dimension; got {ranges.shape}")
    for wrong, what in ((~np.isfinite(ranges).all(axis=0), "is not finite"), (ranges[0] > ranges[1], "has its lowest above its highest")):
        if wrong.any():
            at = int(np.argmax(wrong))
            raise ConfigError(f"ranges: dimension {at} {what} ({ranges[0, at]}, {ranges[1, at]}); take them from other vectors")
    return ranges


def refuse_empty_ranges(ranges: np.ndarray) -> None:
    """Raise `ConfigError` for ranges that are empty in every dimension: all vectors would be written as one."""
    if (ranges[0] == ranges[1]).all():
        raise ConfigError("ranges: the lowest and the highest value are equal in every dimension, so all vectors would become one; take "
                          "them from several different texts")
