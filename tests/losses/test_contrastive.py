"""InfoNCE against a float64 loop over queries and candidates written from the formula, every option."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conan_jax.losses.contrastive import info_nce

B, S, D = 6, 3, 8


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def batch():
    r = np.random.default_rng(1)
    q = unit(r.normal(size=(B, D)))
    p = unit(q + 0.8 * r.normal(size=(B, D)))
    n = unit(q[:, None] + 1.0 * r.normal(size=(B, S, D)))
    texts = np.arange(B * (2 + S))
    texts[B + 4] = texts[B + 1]  # positives 1 and 4 are one text
    texts[B + 5] = texts[2]  # positive 5 is query 2
    texts[2 * B + 2] = texts[B + 3]  # a negative of example 0 is positive 3
    texts[2 * B + 4 * S] = texts[4]  # a negative of example 4 is its own query
    hashes = np.stack([texts % 2, texts // 2], axis=1).astype(np.uint32)  # either half alone collides
    mask = np.ones((B, S), np.float32)
    mask[1, 2] = mask[3] = 0
    return dict(queries=q, positives=p, negatives=n), mask, dict(
        query_hash=hashes[:B], positive_hash=hashes[B : 2 * B], negative_hash=hashes[2 * B :].reshape(B, S, 2))


def oracle(q, p, n, mask, t, hashes=None, in_batch=True, margin=None, qq=False, pp=False, symmetric=False, valid=None):
    """The loss, and (kept scores, dropped, hits), by plain loops."""
    valid = np.ones(len(q), bool) if valid is None else valid
    name = (lambda kind, *i: None) if hashes is None else (lambda kind, *i: tuple(hashes[f"{kind}_hash"][i]))
    losses, kept_scores, dropped, hits = [], [], 0, 0
    for i in np.flatnonzero(valid):
        positive = q[i] @ p[i]
        candidates = []  # (score, text)
        for j in np.flatnonzero(valid):
            if in_batch and j != i:
                candidates.append((q[i] @ p[j], name("positive", j)))
                candidates += [(q[i] @ q[j], name("query", j))] * qq
                candidates += [(p[i] @ p[j], name("positive", j))] * pp
            if n is not None and (in_batch or j == i):
                candidates += [(q[i] @ n[j, s], name("negative", j, s)) for s in range(S) if mask[j, s] > 0]
        false = lambda s, text: (margin is not None and s > positive + margin) or (text is not None and text in (name("positive", i), name("query", i)))
        kept = [s for s, text in candidates if not false(s, text)]
        dropped += len(candidates) - len(kept)
        kept_scores += kept
        hits += all(positive > s for s in kept)
        loss = -np.log(np.exp(positive / t) / (np.exp(positive / t) + sum(np.exp(s / t) for s in kept)))
        if symmetric and in_batch:
            others = [(q[j] @ p[i], j) for j in np.flatnonzero(valid) if j != i]
            same = lambda j: hashes is not None and (name("positive", j) == name("positive", i) or name("query", j) in (name("positive", i), name("query", i)))
            back = [s for s, j in others if not (margin is not None and s > positive + margin) and not same(j)]
            loss = (loss - np.log(np.exp(positive / t) / (np.exp(positive / t) + sum(np.exp(s / t) for s in back)))) / 2
        losses.append(loss)
    return np.mean(losses), kept_scores, dropped, hits


CASES = [dict(zip(("in_batch", "margin", "hashed", "qq", "pp", "symmetric"), values)) for values in itertools.chain(
    itertools.product([True, False], [None, 0.05], [False, True], [False], [False], [False]),
    [(True, 0.05, True, True, False, False), (True, None, True, False, True, False), (True, 0.05, True, True, True, True), (False, 0.05, True, True, True, True)])]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_metrics_and_gradients(batch, case):
    vectors, mask, hashes = batch
    hashes = hashes if case["hashed"] else {}
    t = 0.1
    loss = lambda v: info_nce(**{k: jnp.asarray(x, jnp.float32) for k, x in v.items()}, negative_mask=mask, temperature=t,
                              in_batch_negatives=case["in_batch"], false_negative_margin=case["margin"],
                              query_query=case["qq"], passage_passage=case["pp"], symmetric=case["symmetric"], **hashes)
    names = ("queries", "positives", "negatives")
    reference = lambda v: oracle(*(v[k] for k in names), mask, t, hashes or None, case["in_batch"], case["margin"], case["qq"], case["pp"], case["symmetric"])
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)({k: jnp.asarray(v, jnp.float32) for k, v in vectors.items()})
    expected, kept, dropped, hits = reference(vectors)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["negative_score"], np.mean(kept), atol=1e-6)
    np.testing.assert_allclose(metrics["positive_score"], np.mean(np.sum(vectors["queries"] * vectors["positives"], -1)), atol=1e-6)
    np.testing.assert_allclose(metrics["masked"], dropped / (dropped + len(kept)), atol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], hits / B, atol=1e-6)
    if case["hashed"]:
        assert dropped > 0
    r = np.random.default_rng(2)
    for name in names:  # a directional derivative, central differences in float64
        direction = r.normal(size=vectors[name].shape)
        at = lambda h: reference({**vectors, name: vectors[name] + h * direction})[0]
        np.testing.assert_allclose(np.sum(gradient[name] * direction), (at(1e-6) - at(-1e-6)) / 2e-6, rtol=2e-4, atol=1e-5)


def test_empty_examples_are_neither_queries_nor_candidates(batch):
    vectors, mask, hashes = batch
    valid = np.array([True, False, True, True, True, True])
    vectors = {k: np.where(valid.reshape(-1, *[1] * (v.ndim - 1)), v, 0) for k, v in vectors.items()}
    value, metrics = info_nce(**vectors, negative_mask=mask, temperature=0.1, **hashes, valid=jnp.asarray(valid), symmetric=True, query_query=True)
    expected, kept, _, hits = oracle(*vectors.values(), mask, 0.1, hashes, valid=valid, symmetric=True, qq=True)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], hits / 5, atol=1e-6)
    np.testing.assert_allclose(metrics["negative_score"], np.mean(kept), atol=1e-6)


@pytest.mark.parametrize("in_batch", [True, False])
def test_nothing_to_contrast_with_is_zero_loss_and_finite(batch, in_batch):
    vectors, _, _ = batch
    one = {k: jnp.asarray(v[:1], jnp.float32) for k, v in vectors.items()}
    loss = lambda v: info_nce(**v, negative_mask=jnp.zeros((1, S)), in_batch_negatives=in_batch)
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(one)
    assert value == 0 and metrics["accuracy"] == 1 and metrics["masked"] == 0 and metrics["negative_score"] == 0
    assert all(np.all(g == 0) for g in gradient.values())
    value, _ = info_nce(**{k: jnp.zeros_like(v) for k, v in one.items()}, valid=jnp.zeros(1, bool))
    assert value == 0


def test_every_candidate_a_duplicate_is_zero_loss(batch):
    vectors, _, _ = batch
    same = jnp.ones((B, 2), jnp.uint32)
    value, metrics = info_nce(vectors["queries"], vectors["positives"], query_hash=same + 1, positive_hash=same)
    assert value == 0 and metrics["masked"] == 1


def test_a_cold_temperature_stays_finite():
    q = jnp.eye(4)
    loss, gradient = jax.value_and_grad(lambda q: info_nce(q, jnp.roll(jnp.eye(4), 1, 0), temperature=1e-3)[0])(q)
    np.testing.assert_allclose(loss, 1000, rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_no_negatives_at_all_is_refused(batch):
    with pytest.raises(ValueError, match="negatives"):
        info_nce(batch[0]["queries"], batch[0]["positives"], in_batch_negatives=False)
