"""The range of a step's time against arithmetic by hand."""

import pytest

from conan_jax import config
from conan_jax.hardware import accelerator
from conan_jax.preflight import roofline
from conan_jax.preflight.report import Traffic
from conan_jax.preflight.work import Work

V5E = accelerator("v5e:16x16")
WORK = Work(tokens=1e6, model_flops=3e15, hardware_flops=4e15, weight_passes=4, token_passes=4e6)


def traffic(link, members, sent, axes="fsdp"):
    return Traffic("all-gather", axes, link, members, 10, sent)


def test_bounds_and_range():
    line = roofline.estimate(WORK, [traffic("ici", 256, 10**9), traffic("ici", 16, 10**9, "data")], 8.19e9, V5E, 1)
    peak = 256 * 197e12
    assert line.bounds == pytest.approx({"compute": 4e15 / peak, "hbm": 0.01, "ici fsdp": 1e9 / 2e11, "ici data": 1e9 / 1e11})
    assert line.fast == pytest.approx(3e15 / peak / 0.5)
    assert line.slow == pytest.approx(4e15 / peak / 0.5 + 0.01 + 2 * 0.015)
    assert line.middle == (line.fast + line.slow) / 2


def test_what_binds_is_the_fast_end():
    line = roofline.estimate(WORK, [traffic("ici", 256, 4 * 10**11)], 8.19e9, V5E, 1)
    assert line.fast == pytest.approx(4e11 / 2e11)


def test_between_slices_the_network_counts():
    line = roofline.estimate(WORK, [traffic("dcn", 0, 3_125_000_000, "slices")], 0.0, V5E, 2)
    assert line.bounds["dcn"] == 1.0 and line.fast == 1.0
    assert line.bounds["compute"] == pytest.approx(4e15 / (512 * 197e12))


def test_published_mfu_where_there_is_one():
    line = roofline.estimate(WORK, [], 0.0, accelerator("v5p:4x4x4"), 1)
    assert line.fast == pytest.approx(3e15 / (64 * 459e12) / 0.52)


@pytest.mark.parametrize(("name", "members", "share"), [
    ("v5e:16x16", 256, 1.0), ("v5e:16x16", 16, 0.5), ("v5e:16x16", 2, 0.5), ("v5e:16x16", 32, 1.0), ("v5e:2x4", 8, 1.0),
    ("v5p:4x4x8", 8, 1 / 3), ("v5p:4x4x8", 32, 2 / 3), ("v5p:4x4x8", 128, 1.0)])
def test_links_that_a_group_can_use(name, members, share):
    one = accelerator(name)
    assert roofline.link_bandwidth(one, members) == pytest.approx(one.chip.ici_bandwidth * share)


def test_a_cpu_has_no_links():
    assert set(roofline.estimate(WORK, [traffic("ici", 8, 10**9)], 1e9, accelerator("cpu:8"), 1).bounds) == {"compute"}


def test_bytes_to_and_from_memory_by_hand():
    """2 layers, D 8, F 16, 2 heads of 4 and one of them for keys and values, float32; 100 token passes, 10 of them tokens."""
    model = config.Model(vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1,
                         compute_dtype="float32")
    work = Work(tokens=20, model_flops=1, hardware_flops=1, weight_passes=3, token_passes=60)
    moved = roofline.moved_bytes(model, work, 1000, 700, {"data": 2, "fsdp": 1, "tensor": 1}, predicts=True)
    activations = 60 / 2 * 2 * 2 * (6 * 8 + 2 * 4 + 3 * 16) * 4
    assert moved == activations + 2 * 4 * 700 * 3 + 4 * 4 * 10 * 32 + 32 * 1000
