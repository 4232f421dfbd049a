"""The whole decoder against NumPy, and the equalities that options, packing, padding and masks must keep."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conan_jax.config import RopeScaling
from conan_jax.errors import ConfigError
from conan_jax.model import Bidirectional, Causal, Layout, SoftMask
from conan_jax.model.layers import rope_tables
from conan_jax.model.transformer import look_up
from tests.model import oracle
from tests.model.models import TINY, embed_of, hidden_of, params_of, variant

RNG = np.random.default_rng(11)
TOKENS = RNG.integers(4, TINY.vocab_size, (2, 9))
FULL = Layout.from_lengths(jnp.array([9, 9]), 9)


def run(embedder, inputs, layout, mask):
    return hidden_of(embedder, params_of(embedder), jnp.asarray(inputs), layout, mask)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("mask, apply", [(SoftMask(0.3), "log"), (SoftMask(0.3, "multiply", "query"), "multiply")])
def test_forward_against_numpy(qk_norm, mask, apply):
    embedder = variant(qk_norm=qk_norm)
    params = jax.tree.map(np.float64, params_of(embedder))
    m = oracle.soft_mask(0.3, mask.index, 9)
    hidden = run(embedder, TOKENS, FULL, mask)
    for row in range(2):
        np.testing.assert_allclose(hidden[row], oracle.forward(params, embedder.config, TOKENS[row], m, apply), atol=1e-5)
    np.testing.assert_allclose(embedder.logits(params_of(embedder), hidden), np.asarray(hidden) @ params["embedding"].T, atol=1e-4)


@pytest.mark.parametrize("changes", [
    {"attention_bias": True}, {"attention_bias": True, "attention_output_bias": True}, {"attention_head_dim": 12},
    {"rope_scaling": RopeScaling(8.0, 0.3, 1.5, 12)}, {"qk_norm": True, "attention_head_dim": 4, "tie_word_embeddings": False},
], ids=["qkv-bias", "all-biases", "head-dim", "llama3", "qwen3"])
def test_settings_of_other_families_against_numpy(changes):
    embedder = variant(**changes)
    params = jax.tree.map(np.float64, params_of(embedder))
    hidden = run(embedder, TOKENS, FULL, Causal())
    for row in range(2):
        expected = oracle.forward(params, embedder.config, TOKENS[row], oracle.soft_mask(0.0, "key", 9))
        np.testing.assert_allclose(hidden[row], expected, atol=1e-5)
    table = params["embedding" if embedder.config.tie_word_embeddings else "output_embedding"]
    np.testing.assert_allclose(embedder.logits(params_of(embedder), hidden), np.asarray(hidden) @ table.T, atol=1e-4)
    axes = embedder.axes()
    assert jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple)) == jax.tree.structure(params)
    for leaf, names in zip(jax.tree.leaves(params), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))):
        assert leaf.ndim == len(names) and None not in names


def test_llama3_scaling_has_all_three_kinds_of_frequencies():
    """Else the test above would not see the rule."""
    scaling = RopeScaling(8.0, 0.3, 1.5, 12)
    frequencies = TINY.rope_theta ** (-np.arange(4) * 2.0 / 8)
    kinds = {round(oracle.slowed(f, 8.0, 0.3, 1.5, 12) / f, 6) for f in frequencies}
    assert 1.0 in kinds and 0.125 in kinds and any(0.125 < kind < 1.0 for kind in kinds)
    cos, _ = rope_tables(jnp.array([[0, 1]]), 8, TINY.rope_theta, scaling)
    np.testing.assert_allclose(np.arccos(cos[0, 1, :4]), [oracle.slowed(f, 8.0, 0.3, 1.5, 12) for f in frequencies], atol=1e-5)


def test_packed_row_equals_separate_sequences():
    embedder, texts = variant(), [RNG.integers(4, 48, n) for n in (4, 1, 6)]
    row = np.concatenate([*texts, np.zeros(2, int)])[None]
    segments = np.repeat([1, 2, 3, 0], [4, 1, 6, 2])[None]
    positions = np.concatenate([np.arange(n) for n in (4, 1, 6)] + [np.zeros(2, int)])[None]
    padded = np.zeros((3, 13), int)
    for i, text in enumerate(texts):
        padded[i, : len(text)] = text
    for mask in (Causal(), SoftMask(0.4), SoftMask(0.4, "multiply")):
        packed = run(embedder, np.repeat(row, 3, 0), Layout.from_segments(np.repeat(segments, 3, 0), np.repeat(positions, 3, 0)), mask)[0]
        alone = run(embedder, padded, Layout.from_lengths(jnp.array([4, 1, 6]), 13), mask)
        start = 0
        for i, text in enumerate(texts):
            np.testing.assert_allclose(packed[start : start + len(text)], alone[i, : len(text)], atol=1e-5)
            start += len(text)


@lru_cache(maxsize=None)
def loss_and_gradient(embedder):
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(2, 9, 32)), jnp.float32)

    @jax.jit
    def f(params, mask):
        return jax.value_and_grad(lambda p: jnp.sum(embedder.hidden(p, jnp.asarray(TOKENS), FULL, mask) * weights))(params)

    return f(params_of(embedder), SoftMask(0.3))


@pytest.mark.parametrize("changes", [{"scan_layers": True}, {"remat": "dots"}, {"remat": "full"}, {"scan_layers": True, "remat": "dots"},
                                     {"attention": "blockwise"}, {"attention": "auto", "scan_layers": True, "remat": "full"}],
                         ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))
def test_options_change_nothing_but_speed(changes):
    """Values and gradients of an unrolled, dense, store-everything model; the parameter tree is the same one."""
    plain, changed = variant(), variant(**changes)
    assert jax.tree.map(jnp.shape, params_of(changed)) == jax.tree.map(jnp.shape, params_of(plain))
    for a, b in zip(jax.tree.leaves(loss_and_gradient(plain)), jax.tree.leaves(loss_and_gradient(changed))):
        np.testing.assert_allclose(b, a, atol=1e-5 * float(jnp.abs(a).max()) + 1e-5)


@pytest.mark.parametrize("index", ["key", "query"])
def test_last_token_moves_the_first_exactly_when_alpha_permits(index):
    embedder, changed = variant(), TOKENS.copy()
    changed[:, -1] = (changed[:, -1] - 3) % 44 + 4

    def first(tokens, alpha):
        return np.asarray(run(embedder, tokens, FULL, SoftMask(float(alpha), index=index)))[:, 0]

    np.testing.assert_array_equal(first(TOKENS, 0), first(changed, 0))
    for alpha in (0.05, 0.5, 1):
        assert np.abs(first(TOKENS, alpha) - first(changed, alpha)).max() > 1e-4


def test_literal_multiply_is_not_causal_at_alpha_zero():
    """Why `apply="log"` is the default (METHODS 1.3): a zeroed score still weighs exp(0)."""
    embedder, changed = variant(), TOKENS.copy()
    changed[:, -1] = 5
    a, b = (run(embedder, t, FULL, SoftMask(0.0, "multiply"))[:, 0] for t in (TOKENS, changed))
    assert np.abs(a - b).max() > 1e-3


def test_ends_of_the_anneal_are_the_plain_masks():
    embedder = variant()
    np.testing.assert_array_equal(run(embedder, TOKENS, FULL, SoftMask(0.0)), run(embedder, TOKENS, FULL, Causal()))
    # Rows where nothing but padding is masked go without the L x L mask: the same sums in another order.
    np.testing.assert_allclose(run(embedder, TOKENS, FULL, SoftMask(1.0)), run(embedder, TOKENS, FULL, Bidirectional()), rtol=0, atol=5e-6)


def test_token_embeddings_enter_multiplied_and_leave_bare():
    embedder = variant(embedding_multiplier=5.0)
    params = params_of(embedder)
    expected = oracle.forward(params, embedder.config, TOKENS[0], oracle.soft_mask(0.0, "key", 9))
    hidden = run(embedder, TOKENS, FULL, Causal())
    np.testing.assert_allclose(hidden[0], expected, atol=1e-5)
    np.testing.assert_allclose(embedder.logits(params, hidden)[0], expected @ np.asarray(params["embedding"]).T, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 4, 8, 9])
def test_looking_tokens_up_in_parts_gives_their_rows_and_the_gradient_of_every_use(columns):
    rng = np.random.default_rng(5)
    table, weights = rng.normal(size=(48, 6)), rng.normal(size=(2, 9, 6))

    def total(table):
        rows = look_up(table, jnp.asarray(TOKENS), lambda rows: 2.0 * rows, columns)
        return jnp.sum(rows * weights.astype(np.float32)), rows

    gradient, rows = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(table, jnp.float32))
    expected = np.zeros_like(table)
    np.add.at(expected, TOKENS, 2.0 * weights)
    np.testing.assert_allclose(rows, 2.0 * table[TOKENS], atol=1e-6)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_ready_embeddings_pass_as_token_ids_do():
    embedder = variant()
    table = embedder.output_table(params_of(embedder))
    np.testing.assert_array_equal(run(embedder, table[TOKENS], FULL, Causal()), run(embedder, TOKENS, FULL, Causal()))
    for inputs in (table[TOKENS][..., :8], TOKENS[:, :4]):
        with pytest.raises(ConfigError, match="shape"):
            embedder.hidden(params_of(embedder), jnp.asarray(inputs), FULL, Causal())


def test_bfloat16_compute_keeps_float32_where_it_matters():
    embedder = variant(compute_dtype="bfloat16")
    params = params_of(embedder)
    batch = {"tokens": jnp.asarray(TOKENS), "lengths": jnp.array([9, 6]), "prompt_lengths": jnp.array([0, 2])}
    hidden = run(embedder, TOKENS, FULL, Causal())
    assert hidden.dtype == jnp.bfloat16 and embedder.logits(params, hidden).dtype == jnp.float32
    vectors = embed_of(embedder, params, batch, SoftMask(0.5))
    assert vectors.dtype == jnp.float32
    assert (vectors * embed_of(variant(), params, batch, SoftMask(0.5))).sum(-1).min() > 0.995
    grads = jax.eval_shape(jax.grad(lambda p: embedder.embed(p, batch, SoftMask(0.5)).sum()), params)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


def test_fresh_parameters_and_their_axes():
    embedder = variant(hidden_size=128, vocab_size=256, intermediate_size=192, num_layers=8, embedding_initializer_range=0.1)
    params, axes = jax.jit(embedder.init)(jax.random.key(0)), embedder.axes()
    assert jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, p), names in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))):
        name = jax.tree_util.keystr(path)
        assert type(p) is not dict and p.dtype == jnp.float32 and len(names) == p.ndim
        assert ("layers" in name) == (names[0] == "layers")
        assert set(names) <= {"vocab", "embed", "heads", "kv_heads", "mlp", "layers", "norm"}
        if "norm" in name:
            assert (p == 1).all()
            continue
        into_residual = "o_proj" in name or "down_proj" in name
        stddev = 0.1 if "embedding" in name else 0.02 / 4 if into_residual else 0.02  # 4 = sqrt(2 * 8 layers)
        np.testing.assert_allclose(np.std(p), stddev, rtol=0.03)
        if names[0] == "layers":
            assert not np.allclose(p[0], p[1])
