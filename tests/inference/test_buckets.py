"""Batches hold every text once, in few shapes within the bounds, at nearly the least padding there can be."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conan_jax.inference.buckets import batches, grid, row_lengths

BOUNDS = dict(longest=300, most_rows=32, most_tokens=2048, shape_tokens=500.0)


@given(st.lists(st.integers(1, 300), max_size=80), st.sampled_from([1, 2, 8]))
def test_every_text_once_within_the_bounds(lengths, multiple):
    lengths = np.array(lengths, np.int64)
    made = batches(lengths, **BOUNDS, multiple=multiple)
    assert sorted(np.concatenate([b.members for b in made]).tolist() if made else []) == list(range(len(lengths)))
    for b in made:
        assert lengths[b.members].max() <= b.length <= 300 and len(b.members) <= b.rows and b.rows % multiple == 0
        assert b.rows <= 32 and b.rows * b.length <= max(2048, multiple * b.length)
    assert len({b.length for b in made}) <= len(row_lengths(lengths, 300, 500.0)) if len(lengths) else not made
    assert [b.length for b in made] == sorted((b.length for b in made), reverse=True)


def test_only_the_last_batch_is_not_full_and_it_is_at_least_half_full():
    lengths = np.random.default_rng(0).integers(1, 301, 1000)
    made = batches(lengths, **BOUNDS)
    assert all(len(b.members) == b.rows for b in made[:-1]) and made[-1].rows < 2 * len(made[-1].members)
    one = batches(np.array([7]), **BOUNDS)
    assert [(b.rows, b.length) for b in one] == [(1, 16)]


def cost(lengths, chosen, program):
    return sum(min(c for c in chosen if c >= n) for n in lengths) + program * len(chosen)


@pytest.mark.parametrize("seed, program", itertools.product(range(5), [0.0, 40.0, 400.0]))
def test_row_lengths_are_the_cheapest_there_are(seed, program):
    lengths = np.random.default_rng(seed).integers(1, 113, 60)
    offered = grid(112, 8) if lengths.sum() > program else grid(112, 1)
    chosen = row_lengths(lengths, 112, program)
    subsets = (s for n in range(1, len(offered) + 1) for s in itertools.combinations(offered, n) if max(s) >= lengths.max())
    assert cost(lengths, chosen, program) == min(cost(lengths, s, program) for s in subsets)


def test_few_texts_share_powers_of_two():
    assert {b.length for n in range(1, 301) for b in batches(np.array([n]), **BOUNDS)} == {16, 32, 64, 128, 256, 300}


def test_many_texts_are_padded_little_in_a_bounded_number_of_shapes():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 0.8, 20_000).astype(int), 4, 512)
    made = batches(lengths, longest=512, most_rows=256, most_tokens=4096, shape_tokens=3300)
    assert sum(b.rows * b.length for b in made) < 1.06 * lengths.sum() and len({(b.rows, b.length) for b in made}) <= 32
    assert len(grid(32_768, 8)) < 80 and grid(32_768, 8)[-1] == 32_768 and grid(16, 8) == [16] and grid(9, 8) == [9]
