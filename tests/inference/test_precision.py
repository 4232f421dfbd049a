"""Fewer bits by formulas written out per number, not by the code under test."""

import math

import numpy as np
import pytest

from conan_jax.errors import ConfigError, DataError
from conan_jax.inference.precision import dequantize, quantize, ranges_of, width

VECTORS = np.random.default_rng(0).normal(size=(40, 11)).astype(np.float32)


def test_float32_is_as_it_was():
    np.testing.assert_array_equal(quantize(VECTORS, "float32"), VECTORS)


@pytest.mark.parametrize("precision, offset, dtype", [("uint8", 0, np.uint8), ("int8", -128, np.int8)])
def test_levels_of_each_dimension(precision, offset, dtype):
    found = quantize(VECTORS, precision)
    assert found.dtype == dtype and found.shape == VECTORS.shape
    for d in range(11):
        column = [float(v) for v in VECTORS[:, d]]
        low, step = min(column), (max(column) - min(column)) / 255
        for value, level in zip(column, found[:, d].tolist(), strict=True):
            assert abs(level - offset - min(255, math.floor((value - low) / step))) <= (abs((value - low) / step % 1 - 0.5) > 0.499)
    assert found.min() == offset and found.max() >= offset + 254


@pytest.mark.parametrize("precision", ["uint8", "int8"])
def test_given_ranges_clip(precision):
    ranges = np.array([[-1] * 3, [1] * 3], np.float32)
    found = quantize(np.array([[-5, 0.001, 5], [9, -1, 0.501]], np.float32), precision, ranges)
    assert (found.astype(int) + (128 if precision == "int8" else 0)).tolist() == [[0, 127, 255], [255, 0, 191]]


def test_a_dimension_without_range_is_zero():
    assert quantize(np.array([[1, 2], [1, 3]], np.float32), "uint8").tolist() == [[0, 0], [0, 254]]  # 255 * (1 / 255) is below 1 in float32


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits(precision):
    found = quantize(VECTORS, precision)
    assert found.shape == (40, 2) and found.dtype == (np.int8 if precision == "binary" else np.uint8)
    for vector, packed in zip(VECTORS, found, strict=True):
        bits = "".join("1" if v > 0 else "0" for v in vector) + "0" * 5
        assert [int(b) + (128 if precision == "binary" else 0) for b in packed] == [int(bits[:8], 2), int(bits[8:], 2)]


@pytest.mark.parametrize("precision", ["float32", "uint8", "int8", "binary", "ubinary"])
def test_back_to_numbers_and_no_vectors_at_all(precision):
    ranges = ranges_of(VECTORS)
    back = dequantize(quantize(VECTORS, precision, ranges), precision, 11, ranges)
    if precision.endswith("binary"):
        np.testing.assert_array_equal(np.sign(back), np.where(VECTORS > 0, 1, -1))
        np.testing.assert_allclose(np.linalg.norm(back, axis=1), 1, atol=1e-6)
    else:
        assert np.abs(back - VECTORS).max() <= (ranges[1] - ranges[0]).max() / 255 * 0.51
    assert quantize(VECTORS[:0], precision).shape == (0, width(11, precision))


@pytest.mark.parametrize("precision", ["uint8", "int8"])
@pytest.mark.parametrize("low, high", [(np.nan, 1), (-1, np.nan), (-np.inf, 1), (1, -1)])
def test_ranges_that_hold_no_range_are_refused_with_their_dimension(precision, low, high):
    ranges = np.tile(np.array([[-3], [3]], np.float32), 11)
    ranges[:, 4] = low, high
    for call in (lambda: quantize(VECTORS, precision, ranges), lambda: dequantize(np.zeros((2, 11), np.uint8), precision, 11, ranges)):
        with pytest.raises(ConfigError, match="dimension 4"):
            call()


def test_ranges_that_make_all_vectors_one_are_refused():
    same = np.stack([VECTORS[0], VECTORS[0]])
    with pytest.raises(ConfigError, match="ranges"):
        quantize(VECTORS, "int8", same)
    assert (quantize(same, "uint8") == 0).all()  # of equal vectors nothing is lost: the one level of each dimension is its value
    np.testing.assert_array_equal(dequantize(quantize(same, "uint8"), "uint8", 11, same), same)


@pytest.mark.parametrize("precision", ["float32", "uint8", "int8", "binary", "ubinary"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused_with_their_row(precision, number):
    vectors = VECTORS.copy()
    vectors[7, 3] = number
    with pytest.raises(DataError, match="vector 7 "):
        quantize(vectors, precision)


@pytest.mark.parametrize("ranges, message", [(None, "give several texts"), (np.zeros((2, 3)), r"shape \(2, 11\)")])
def test_missing_and_misshapen_ranges_are_refused(ranges, message):
    with pytest.raises(ConfigError, match=message):
        quantize(VECTORS[:1], "int8", ranges)
