"""AdamW against NumPy, the schedule against its formula, the decay mask against the real model's axes."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conan_jax import config
from conan_jax.model import Embedder
from conan_jax.train.optimizer import decay_mask, learning_rate_at, make_optimizer


def schedule_by_hand(o: config.Optimizer, steps: int, count: int) -> float:
    warmup = round(o.warmup_fraction * steps)
    if count < warmup:
        return o.learning_rate * (count + 1) / warmup
    u = min((count - warmup) / max(steps - 1 - warmup, 1), 1)
    f = o.final_fraction or 0.0
    return o.learning_rate * {"cosine": f + (1 - f) * (1 + np.cos(np.pi * u)) / 2, "linear": 1 - (1 - f) * u, "constant": 1.0}[o.schedule]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps, warmup", [(100, 0.05), (40, 0.0), (7, 0.3), (1, 0.05), (3, 1.0)])
def test_schedule_matches_its_formula(kind, steps, warmup):
    o = config.Optimizer(learning_rate=3e-3, schedule=kind, warmup_fraction=warmup, final_fraction=None if kind == "constant" else 0.1)
    schedule = learning_rate_at(o, steps)
    np.testing.assert_allclose([schedule(t) for t in range(steps)], [schedule_by_hand(o, steps, t) for t in range(steps)], rtol=1e-5)


def test_schedule_ends_at_the_final_fraction():
    o = config.Optimizer(learning_rate=1e-3, final_fraction=0.25)
    assert float(learning_rate_at(o, 50)(49)) == pytest.approx(0.25e-3, rel=1e-5)


def test_two_updates_equal_adamw_written_in_numpy():
    o = config.Optimizer(learning_rate=1e-2, warmup_fraction=0.0, schedule="constant", weight_decay=0.1, max_grad_norm=0.5)
    rng = np.random.default_rng(0)
    axes = {"w": ("embed", "mlp"), "norm": ("norm",)}
    params = {"w": rng.normal(size=(3, 4)), "norm": rng.normal(size=(4,))}
    m = {k: 0.0 for k in params}
    v = {k: 0.0 for k in params}
    ours = {k: jnp.asarray(p, jnp.float32) for k, p in params.items()}
    tx = make_optimizer(o, 10, axes)
    state = tx.init(ours)
    for t in (1, 2):
        grads = {k: rng.normal(size=p.shape) for k, p in params.items()}
        updates, state = tx.update({k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, state, ours)
        ours = optax.apply_updates(ours, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g * min(1, o.max_grad_norm / norm)
            m[k] = o.b1 * m[k] + (1 - o.b1) * g
            v[k] = o.b2 * v[k] + (1 - o.b2) * g * g
            step = m[k] / (1 - o.b1**t) / (np.sqrt(v[k] / (1 - o.b2**t)) + o.eps)
            params[k] = params[k] - o.learning_rate * (step + (o.weight_decay * params[k] if k == "w" else 0))
    for k in params:
        np.testing.assert_allclose(ours[k], params[k], rtol=1e-5, atol=1e-5)


def test_norms_and_the_embedding_table_do_not_decay_in_the_real_model():
    import jax

    model = config.Model(vocab_size=512, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, qk_norm=True)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): decays
            for path, decays in jax.tree_util.tree_flatten_with_path(decay_mask(Embedder(model).axes()))[0]}
    kept = {name for name, decays in flat.items() if not decays}
    assert all("norm" in name or "embedding" in name for name in kept) and any("embedding" in name for name in kept)
    assert not any("norm" in name or "embedding" in name for name in flat.keys() - kept) and len(flat.keys() - kept) >= 7
