"""The in-graph hard negatives against an oracle of plain loops, slot for slot, on one device and on eight (METHODS 1.4)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from conan_jax.config import HardNegatives
from conan_jax.stages import hard_negatives

N, B, S, P, STEPS = 60, 16, 7, 24, 300


class Example:
    """One training example as METHODS 1.4 tells it: its pool is 0, 1, 2, ... and it trains against `slots` of it."""

    def __init__(self, size, slots):
        self.size = size
        self.slots = list(range(slots))
        self.s0 = [None] * slots
        self.next = slots

    def filled(self):
        return [k for k, candidate in enumerate(self.slots) if candidate < self.size]

    def replace(self, k):
        """Put the next candidate into slot k; False when the pool has none left."""
        if self.next >= self.size:
            return False
        self.slots[k], self.s0[k] = self.next, None
        self.next += 1
        return True


class Oracle:
    def __init__(self, rule, sizes, slots=S, every=None):
        self.rule, self.every = rule, every
        self.examples = [Example(size, slots) for size in sizes]
        self.low = self.drop = self.exhausted = 0

    def visit(self, number, scores, updates_done):
        """`updates_done` counts this update too."""
        example = self.examples[number]
        filled = example.filled()
        for k in filled:
            if example.s0[k] is None:
                example.s0[k] = scores[k]
        if self.rule == "v2":
            for k in filled:
                if example.s0[k] < np.float32(0.4):
                    if example.replace(k):
                        self.low += 1
                    else:
                        self.exhausted += 1
                elif np.float32(1.2) * scores[k] < example.s0[k] and scores[k] < np.float32(0.7):
                    if example.replace(k):
                        self.drop += 1
                    else:
                        self.exhausted += 1
        elif filled and updates_done % self.every == 0:
            s = np.mean([scores[k] for k in filled], dtype=np.float32)
            s0 = np.mean([example.s0[k] for k in filled], dtype=np.float32)
            if np.float32(1.15) * s < s0 and abs(s) < np.float32(0.8):
                for k in filled:
                    if example.replace(k):
                        self.drop += 1
                    else:
                        self.exhausted += 1


def random_visits(seed):
    """ids, scores of each step. Scores wander around a level of each example that sinks, so every branch of both rules is taken."""
    r = np.random.default_rng(seed)
    level = r.uniform(0.1, 1.0, N).astype(np.float32)
    for step in range(STEPS):
        ids = r.permutation(N)[:B].astype(np.int32)
        if step % 10 == 3:
            ids[5] = ids[2]  # an example twice in one batch: its first row counts
        scores = (level[ids, None] * (1 - 0.5 * step / STEPS) + r.normal(scale=0.15, size=(B, S))).clip(-1, 1).astype(np.float32)
        yield step, ids, scores


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("rule", ["v2", "v1"])
def test_equals_the_oracle_slot_for_slot_over_300_random_steps(rule, devices):
    config = HardNegatives(rule=rule, num_negatives=S, pool_size=P, every=3 if rule == "v1" else None)
    sizes = np.random.default_rng(7).integers(S, P + 1, N).astype(np.int32)
    sizes[:4] = [0, 1, S - 1, S]
    oracle = Oracle(rule, sizes, every=3)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("x",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    state = hard_negatives.initial_state(N, config)
    state = {name: jax.device_put(value, split if value.ndim else whole) for name, value in state.items()}
    update = jax.jit(functools.partial(hard_negatives.update, config=config), donate_argnums=0, out_shardings={k: v.sharding for k, v in state.items()})

    for step, ids, scores in random_visits(seed=len(rule) + devices):
        state = update(state, *(jax.device_put(x, split) for x in (ids, scores, sizes[ids])), np.int32(step))
        for row, number in enumerate(ids):
            if number not in ids[:row]:
                oracle.visit(number, scores[row], step + 1)
        slots, s0, cursor = (np.asarray(state[name]) for name in ("slot", "s0", "cursor"))
        for number, example in enumerate(oracle.examples):
            assert slots[number].tolist() == example.slots, (step, number)
            assert cursor[number] == example.next
            np.testing.assert_array_equal(s0[number], np.array([np.nan if x is None else x for x in example.s0], np.float32))
        assert [int(state[name]) for name in hard_negatives.COUNTERS] == [oracle.low, oracle.drop, oracle.exhausted]
    assert update._cache_size() == 1
    assert oracle.drop > 50 and oracle.exhausted > 50 and (oracle.low > 50) == (rule == "v2")  # every branch was taken
    assert np.all(np.asarray(state["slot"])[N:] == np.arange(S))  # rows that only fill up the last 1024 stay untouched


def visit(state, config, scores, size=P, step=0, number=0):
    return hard_negatives.update(state, jnp.array([number]), jnp.asarray([scores], jnp.float32), jnp.array([size]), step, config)


def test_v2_thresholds_of_the_paper():
    config = HardNegatives(num_negatives=4, pool_size=P)
    state = visit(hard_negatives.initial_state(1, config), config, [0.39, 0.41, 0.9, 0.6])
    assert state["slot"][0].tolist() == [4, 1, 2, 3]  # s0 < 0.4 at first sight
    # 1.2 * 0.34 < 0.41; 1.2 * 0.71 < 0.9 but 0.71 is not below 0.7; 1.2 * 0.51 is not below 0.6; slot 0 is unseen again
    state = visit(state, config, [0.8, 0.34, 0.71, 0.51])
    assert state["slot"][0].tolist() == [4, 5, 2, 3]
    assert [int(state[c]) for c in hard_negatives.COUNTERS] == [1, 1, 0]
    np.testing.assert_array_equal(state["s0"][0], np.array([0.8, np.nan, 0.9, 0.6], np.float32))


def test_v1_swaps_whole_sets_in_rank_order_every_100_steps():
    config = HardNegatives(rule="v1", num_negatives=4, pool_size=10)
    state = hard_negatives.initial_state(1, config)
    state = visit(state, config, [0.7, 0.7, 0.9, 0.9], size=10, step=5)
    fallen = [0.5, 0.9, 0.5, 0.5]
    assert visit(state, config, fallen, size=10, step=98)["slot"][0].tolist() == [0, 1, 2, 3]  # not the 100th update
    state = visit(state, config, fallen, size=10, step=99)
    assert state["slot"][0].tolist() == [4, 5, 6, 7] and np.all(np.isnan(state["s0"][0]))
    state = visit(state, config, [0.9] * 4, size=10, step=150)
    state = visit(state, config, [0.5] * 4, size=10, step=199)
    assert state["slot"][0].tolist() == [8, 9, 6, 7]  # the pool ends: two slots keep their last candidate
    assert [int(state[c]) for c in hard_negatives.COUNTERS] == [0, 6, 2]


def test_constants_of_the_rules_can_be_set():
    config = HardNegatives(num_negatives=1, pool_size=P, low_score=0.0, drop_ratio=2.0, ceiling=0.3)
    state = visit(hard_negatives.initial_state(1, config), config, [0.6])
    assert visit(state, config, [0.31])["slot"][0, 0] == 0
    assert visit(state, config, [0.29])["slot"][0, 0] == 1


def test_off_keeps_the_first_and_remembers_nothing():
    config = HardNegatives(rule="off", num_negatives=3, pool_size=5)
    state = hard_negatives.initial_state(10, config)
    slots, mask = hard_negatives.active(state, jnp.arange(2), jnp.array([5, 2]), config)
    assert state == {} and visit(state, config, [0.0] * 3) == {}
    assert slots.tolist() == [[0, 1, 2]] * 2 and mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_gather_takes_the_active_candidates_and_empties_slots_beyond_the_pool():
    pool = {"tokens": jnp.arange(2 * 4 * 3).reshape(2, 4, 3), "lengths": jnp.array([[3, 2, 1, 3], [2, 0, 0, 0]])}
    state = {"slot": jnp.array([[3, 1], [0, 1]], jnp.int32)}
    config = HardNegatives(num_negatives=2, pool_size=4)
    slots, mask = hard_negatives.active(state, jnp.array([0, 1]), jnp.array([4, 1]), config)
    texts = hard_negatives.gather(pool, slots, mask)
    assert mask.tolist() == [[1, 1], [1, 0]] and texts["lengths"].tolist() == [[3, 2], [2, 0]]
    assert texts["tokens"][0].tolist() == [[9, 10, 11], [3, 4, 5]]


@pytest.mark.parametrize("examples", [1, 1024, 1025])
def test_states_are_padded_so_that_meshes_divide_them(examples):
    state = hard_negatives.initial_state(examples, HardNegatives())
    assert state["slot"].shape == (math.ceil(examples / 1024) * 1024, 7)
    assert set(state) == set(hard_negatives.AXES) and all(len(hard_negatives.AXES[k]) == v.ndim for k, v in state.items())
