"""Durations and sizes as people say them, without a unit that is too large or too small."""

import pytest

from conan_jax.units import duration, size


@pytest.mark.parametrize(("seconds", "words"), [
    (0, "0 s"), (2.5e-7, "0.25 us"), (4.577e-5, "45.8 us"), (0.0009999, "1 ms"), (0.25, "250 ms"), (0.99949, "999 ms"), (0.9999, "1 s"), (1.25, "1.25 s"),
    (5, "5 s"), (9.999, "10 s"), (59.4, "59 s"), (59.999, "1 min 00 s"), (512, "8 min 32 s"), (3600, "1 h 00 min"), (86_399, "23 h 59 min"),
    (273_600, "3 d 04 h"), (86_400 * 1234, "1,234 d 00 h"),
])
def test_a_duration_has_a_fitting_unit(seconds, words):
    assert duration(seconds) == words


def test_a_size_has_a_fitting_unit():
    assert [size(n) for n in (0, 228, 1024, 3.5 * 2**20, 12 * 2**30)] == ["0 B", "228 B", "1.00 KiB", "3.50 MiB", "12.00 GiB"]
