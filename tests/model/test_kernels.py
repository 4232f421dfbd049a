"""The TPU kernels in interpret mode against the dense reference, what they leave out, and their export for a TPU."""

import re
import sys
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from conan_jax import config, sharding
from conan_jax.errors import ConfigError
from conan_jax.model import Bidirectional, Causal, Layout, SoftMask, attention
from conan_jax.model.attention import choose, dense_attention
from conan_jax.model.device import platform
from conan_jax.model.kernels import block, flash_attention

entry = sys.modules["conan_jax.model.attention"]  # the package's attribute of that name is the function
F32, BF16 = jnp.float32, jnp.bfloat16
# One compiled program a case: mask of alpha, length, query and key/value heads, block sizes, dtype. The rest is data.
CASES = {
    "log-key": (lambda a: SoftMask(a), 20, (2, 1), (8, 8), F32),
    "log-query": (lambda a: SoftMask(a, index="query"), 17, (2, 2), (8, 16), F32),
    "multiply-key": (lambda a: SoftMask(a, "multiply"), 24, (2, 2), (16, 8), F32),
    "multiply-query": (lambda a: SoftMask(a, "multiply", "query"), 7, (3, 1), (8, 8), F32),
    "causal": (lambda a: Causal(), 40, (2, 2), (8, 16), F32),
    "bidirectional": (lambda a: Bidirectional(), 1, (2, 2), (8, 8), F32),
    "bfloat16": (lambda a: SoftMask(a), 20, (2, 1), (8, 8), BF16),
}


@lru_cache
def program(attend):
    """The output of `attend` and the gradient of sum(output * w) in q, k, v, compiled."""
    def run(q, k, v, w, mask, layout):
        def loss(q, k, v):
            out = attend(q, k, v, mask, layout)
            return jnp.sum(out.astype(F32) * w), out

        grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    return jax.jit(run)


@lru_cache
def kernels(block_q=8, block_k=8):
    return program(partial(flash_attention, block_q=block_q, block_k=block_k, interpret=True))


def arrays(seed, B, L, heads, C=6, dtype=F32):
    """q, k, v and the weights of the loss; bfloat16 ones are small, so that their rounding stays below the tolerance."""
    rng = np.random.default_rng(seed)
    scale = 1.5 if dtype == F32 else 0.5
    return tuple(jnp.asarray(rng.normal(size=(B, L, n, C)) * scale, dtype) for n in (heads[0], heads[1], heads[1], heads[0]))


def layout_of(rows):
    rows = np.asarray(rows)
    return Layout.from_segments(rows, np.array([[int((row[:i] == s).sum()) if s else 0 for i, s in enumerate(row)] for row in rows]))


@st.composite
def packed_rows(draw, L):
    """Three rows of packed segments with padding behind; long segments are drawn as often as short ones."""
    rows = np.zeros((3, L), int)
    for row in rows:
        start, segment = 0, 1
        for n in draw(st.lists(st.integers(1, L) | st.just(L), max_size=3)):
            row[start : start + n], start, segment = segment, start + n, segment + 1
    return rows


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data(), alpha=st.sampled_from([0.0, 0.01, 0.3, 0.8, 1.0]), seed=st.integers(0, 1000))
def test_output_and_gradients_are_those_of_the_dense_reference(name, data, alpha, seed):
    make, L, heads, blocks, dtype = CASES[name]
    rows = data.draw(packed_rows(L))
    args, mask, layout = arrays(seed, 3, L, heads, dtype=dtype), make(jnp.float32(alpha)), layout_of(rows)
    expected = program(dense_attention)(*(x.astype(F32) for x in args), mask, layout)
    for a, b in zip(expected, kernels(*blocks)(*args, mask, layout), strict=True):
        assert b.dtype == dtype and np.isfinite(np.asarray(b, np.float32)).all()
        tolerance = 2e-5 if dtype == F32 else 2e-2
        np.testing.assert_allclose(np.asarray(b, np.float32), a, atol=tolerance, rtol=tolerance)
        assert (np.asarray(b)[rows == 0] == 0).all()


def first_finite(x, n):
    """Whether the first n tokens of every row hold numbers only."""
    return bool(np.isfinite(np.asarray(x)[:, :n]).all())


@pytest.mark.parametrize(("alpha", "clean"), [(0.0, True), (0.1, False)])
def test_blocks_above_the_diagonal_are_skipped_at_run_time(alpha, clean):
    """A NaN in the last block reaches the tokens before it only through a visit, with one program for every alpha."""
    q, k, v, w = arrays(8, 3, 20, (2, 1))
    run, mask, layout = kernels(), SoftMask(jnp.float32(alpha)), layout_of(np.ones((3, 20)))
    out, dq, _, _ = run(q, k.at[:, 16:].set(jnp.nan), v.at[:, 16:].set(jnp.nan), w, mask, layout)
    assert first_finite(out, 16) == clean and first_finite(dq, 16) == clean
    _, _, dk, dv = (x[:, ::-1] for x in run(q.at[:, :8].set(jnp.nan), k, v, w, mask, layout))  # queries before see no key after them
    assert first_finite(dk, 12) == clean and first_finite(dv, 12) == clean


@pytest.mark.parametrize("poisoned", ["padding", "other segment"])
def test_blocks_of_padding_and_of_other_segments_are_not_visited(poisoned):
    row = [1] * 6 + [0] * 14 if poisoned == "padding" else [1] * 8 + [2] * 12
    bad = np.array([[i >= 8 for i in range(20)]] * 3)
    q, k, v, w = (jnp.where(bad[:, :, None, None], jnp.nan, x) for x in arrays(9, 3, 20, (2, 1)))
    for x in kernels()(q, k, v, w, SoftMask(jnp.float32(0.5)), layout_of([row] * 3)):
        assert first_finite(x, 8)
        if poisoned == "padding":
            assert (np.asarray(x)[:, 8:] == 0).all()


def test_a_block_of_one_segment_under_ones_is_computed_without_a_mask(monkeypatch):
    """With a mask that makes everything NaN, only what is computed without one stays a number."""
    monkeypatch.setattr(block, "_masking", lambda *_: lambda s: (s * jnp.nan, None))
    q, k, v, _ = arrays(10, 3, 24, (1, 1))
    run = jax.jit(partial(flash_attention, block_q=8, block_k=8, interpret=True))
    layout = layout_of([[1] * 24, [1] * 16 + [0] * 8, [1] * 8 + [2] * 16])
    out = run(q, k, v, SoftMask(jnp.float32(1)), layout)
    np.testing.assert_allclose(out, dense_attention(q, k, v, Bidirectional(), layout), atol=2e-5)
    # M is below 1 from key 17 on, and every query sees the last block of keys, which is below the diagonal of none
    assert not np.isfinite(np.asarray(run(q, k, v, SoftMask(jnp.float32(2 / 3)), layout))[0]).any()


def test_no_array_grows_with_the_square_of_the_length_and_the_kernels_export_for_a_tpu():
    def step(q, k, v, w, alpha, lengths):
        layout = Layout.from_lengths(lengths, q.shape[1])
        return jax.vjp(lambda q, k, v: flash_attention(q, k, v, SoftMask(alpha), layout), q, k, v)[1](w)

    for L in (512, 32_768):
        shapes = [jax.ShapeDtypeStruct((1, L, n, 112), BF16) for n in (32, 8, 8, 32)]
        scalars = [jax.ShapeDtypeStruct((), F32), jax.ShapeDtypeStruct((1,), jnp.int32)]
        text = jax.export.export(jax.jit(step), platforms=["tpu"])(*shapes, *scalars).mlir_module()
        assert text.count("@tpu_custom_call(") == 3
        sizes = [np.prod([int(n) for n in dims.split("x")[:-1]]) for dims in re.findall(r"tensor<((?:\d+x)+)[a-z]", text)]
        assert max(sizes) == 32 * L * 112


@pytest.mark.parametrize(("B", "heads"), [(4, (4, 2)), (3, (2, 1))])
def test_a_mesh_changes_nothing_and_moves_nothing(B, heads):
    """Rows and heads over 8 devices where they divide, everything everywhere where they do not."""
    args, mask = arrays(11, B, 16, heads), SoftMask(jnp.float32(0.3))
    layout = Layout.from_lengths(jnp.arange(B) * 5, 16)
    divided = B == 4
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    with sharding.activate(mesh):
        split = PartitionSpec(("data", "fsdp"), None, "tensor") if divided else PartitionSpec()
        placed = [jax.device_put(x, NamedSharding(mesh, split)) for x in args]
        run = program(partial(flash_attention, block_q=8, block_k=8, interpret=True))
        text = run.lower(*placed, mask, layout).compile().as_text()
        results = run(*placed, mask, layout)
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text)
    for a, b in zip(program(dense_attention)(*args, mask, layout), results, strict=True):
        assert b.sharding.is_equivalent_to(NamedSharding(mesh, split), 4)
        np.testing.assert_allclose(b, a, atol=2e-5, rtol=2e-5)


def test_auto_is_the_kernel_on_a_tpu(monkeypatch):
    assert [choose("tpu", n, 512) for n in (1, 127, 128, 32_768)] == ["dense", "dense", "pallas_tpu", "pallas_tpu"]
    assert [choose(device, n, 512) for device in ("cpu", "gpu") for n in (1, 512, 513)] == ["dense", "dense", "blockwise"] * 2
    assert platform() == "cpu"
    with sharding.activate(sharding.make_mesh(config.Mesh())):
        assert platform() == "cpu"
    monkeypatch.setattr(entry, "platform", lambda: "tpu")
    q = jax.ShapeDtypeStruct((1, 200, 2, 16), F32)
    run = jax.jit(lambda q: attention(q, q, q, Causal(), Layout.from_lengths(jnp.array([150]), 200)))
    assert "@tpu_custom_call(" in jax.export.export(run, platforms=["tpu"])(q).mlir_module()


def test_refusals():
    q, k, v, _ = arrays(0, 1, 7, (3, 2))
    layout = layout_of([[1] * 7])
    with pytest.raises(ConfigError, match="3 query heads cannot share 2"):
        flash_attention(q, k, v, Causal(), layout, interpret=True)
    with pytest.raises(ConfigError, match="blocks of 96 queries and 128 keys: a TPU needs positive multiples of 128"):
        flash_attention(q[:, :, :2], k, v, Causal(), layout, block_q=96)
    with pytest.raises(ConfigError, match="blocks of 128 queries and 0 keys"):
        flash_attention(q[:, :, :2], k, v, Causal(), layout, block_k=0, interpret=True)
    with pytest.raises(ConfigError, match="'pallas_tpu' runs on a TPU and this program is for a cpu; use auto, dense or blockwise"):
        attention(q[:, :, :2], k, v, Causal(), layout, implementation="pallas_tpu")
