"""What each stage computes, against the losses applied by hand to vectors that the model gave one text batch at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from conan_jax import config, sharding
from conan_jax.errors import ConfigError
from conan_jax.losses import cosent, info_nce
from conan_jax.losses.matryoshka import truncate
from conan_jax.model import Bidirectional, Causal, Layout, SoftMask
from conan_jax.stages import STAGES, encode, hard_negatives, make_stage
from tests.stages import examples
from tests.stages.test_hard_negatives import Oracle

FAST = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def model():
    embedder, params = examples.embedder_and_params()
    embed = jax.jit(embedder.embed, compiler_options=FAST)
    flat = lambda text: {"tokens": text["tokens"].reshape(-1, examples.L), "lengths": text["lengths"].reshape(-1),
                         "prompt_lengths": text.get("prompt_lengths", np.zeros(text["lengths"].size, np.int32))}
    vectors = lambda text, mask=Bidirectional(), params=params: np.asarray(embed(params, flat(text), mask)).reshape(*text["lengths"].shape, -1)
    return embedder, params, vectors


def stage_of(model, kind, **changes):
    stage = make_stage(dataclasses.replace(examples.STAGES[kind], **changes), model[0])
    return stage, jax.jit(stage.loss, compiler_options=FAST)


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_language_model_predicts_the_targets_of_each_segment_from_the_token_before(model, kind):
    embedder, params, _ = model
    batch = examples.batch_of(kind)
    stage, loss = stage_of(model, kind)
    value, (_, metrics) = loss(params, {}, batch, 0, jax.random.key(0))
    hidden = embedder.hidden(params, batch["tokens"], Layout.from_segments(batch["segment_ids"], batch["positions"]), Causal())
    logits = np.asarray(embedder.logits(params, hidden), np.float64)
    losses = []
    for row in range(examples.B):
        for t in range(1, examples.L):
            before, here = batch["segment_ids"][row, t - 1 : t + 1]
            if batch["loss_mask"][row, t] and before == here > 0:
                z = np.log(np.sum(np.exp(logits[row, t - 1]))) if stage.config.z_loss else 0
                losses.append(-log_softmax(logits[row, t - 1])[batch["tokens"][row, t]] + stage.config.z_loss * z**2)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)
    assert metrics["target_tokens"] == len(losses) and metrics["tokens"] == np.sum(batch["segment_ids"] > 0)


def test_language_model_without_a_target_is_zero(model):
    batch = {**examples.batch_of("sft"), "loss_mask": np.zeros((examples.B, examples.L), np.float32)}
    assert stage_of(model, "sft")[1](model[1], {}, batch, 0, jax.random.key(0))[0] == 0


@pytest.mark.parametrize("soft", [config.SoftMask(), config.SoftMask(apply="multiply", index="query", schedule="accelerate", steps=5)], ids=["default", "options"])
def test_weak_is_info_nce_of_both_towers_under_the_mask_of_the_step(model, soft):
    _, params, vectors = model
    batch = examples.batch_of("weak")
    stage, loss = stage_of(model, "weak", soft_mask=soft)
    seen = []
    for step in (0, 4, 10, 12):
        value, (_, metrics) = loss(params, {}, batch, step, jax.random.key(0))
        u = min(step / (soft.steps or 10), 1)
        alpha = u**2 if soft.schedule == "accelerate" else u
        mask = SoftMask(jnp.float32(alpha), soft.apply, soft.index)
        expected, _ = info_nce(vectors(batch["query"], mask), vectors(batch["positive"], mask), temperature=0.2, false_negative_margin=0.1,
                               query_hash=batch["query_hash"], positive_hash=batch["positive_hash"])
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["alpha"], alpha, atol=1e-6)
        assert metrics["tokens"] == batch["query"]["lengths"].sum() + batch["positive"]["lengths"].sum()
        seen.append(float(value))
    assert len(set(seen)) == 3 and seen[2] == seen[3]  # alpha stays 1


def test_weak_leaves_empty_rows_out(model):
    _, params, vectors = model
    batch = examples.batch_of("weak")
    for side, row in (("query", 2), ("positive", 5)):
        batch[side]["tokens"][row] = batch[side]["lengths"][row] = batch[side]["prompt_lengths"][row] = 0
    stage, _ = stage_of(model, "weak")
    value, gradient = jax.jit(jax.value_and_grad(lambda p: stage.loss(p, {}, batch, 10, jax.random.key(0))[0]), compiler_options=FAST)(params)
    keep = [0, 1, 3, 4, 6, 7]
    expected, _ = info_nce(vectors(batch["query"])[keep], vectors(batch["positive"])[keep], temperature=0.2, false_negative_margin=0.1)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


def supervised_by_hand(vectors, batch, slots):
    """Unweighted loss of each task of `examples.STAGES["supervised"]`, MRL dims 8 and 16 with weights 0.5 and 1."""
    r, k, s = batch["retrieval"], batch["classification"], batch["sts"]
    rows = np.arange(examples.B)[:, None]
    picked = {name: value[rows, slots] for name, value in r["pool"].items()}
    filled = (slots < r["pool_size"][:, None]).astype(np.float32)

    def at(dim):
        v = lambda text: truncate(vectors(text), dim)
        return {
            "retrieval": info_nce(v(r["query"]), v(r["positive"]), v(picked), filled, temperature=0.2, query_hash=r["query_hash"],
                                  positive_hash=r["positive_hash"], negative_hash=r["pool_hash"][rows, slots])[0],
            "classification": info_nce(v(k["query"]), v(k["positive"]), v(k["negatives"]), k["negative_mask"], temperature=0.2, in_batch_negatives=False)[0],
            "sts": cosent(v(s["sentence1"]), v(s["sentence2"]), s["score"])[0],
        }

    narrow, full = at(8), at(16)
    return {task: (0.5 * narrow[task] + full[task]) / 1.5 for task in full}


def test_supervised_adds_the_tasks_with_their_weights_inside_matryoshka(model):
    _, params, vectors = model
    batch = examples.batch_of("supervised")
    batch["retrieval"]["pool_hash"][3, 4] = batch["retrieval"]["positive_hash"][4]  # one candidate is another example's positive
    batch["retrieval"]["pool_size"][3] = examples.P
    stage, loss = stage_of(model, "supervised")
    carry = stage.init_carry(examples.EXAMPLES)
    slots = np.tile([4, 1], (examples.B, 1))
    carry["retrieval"]["slot"] = carry["retrieval"]["slot"].at[batch["retrieval"]["ids"]].set(slots)
    value, (_, metrics) = loss(params, carry, batch, 3, jax.random.key(0))
    each = supervised_by_hand(vectors, batch, slots)
    for task, expected in each.items():
        np.testing.assert_allclose(metrics[f"loss/{task}"], expected, rtol=1e-5)
    np.testing.assert_allclose(value, each["retrieval"] + each["classification"] + 0.8 * each["sts"], rtol=1e-5)
    lengths = sum(text["lengths"].sum() for task in batch.values() for name, text in task.items() if isinstance(text, dict) and name != "pool")
    pool = batch["retrieval"]["pool"]["lengths"][np.arange(examples.B)[:, None], slots]
    assert metrics["tokens"] == lengths + np.sum(pool * (slots < batch["retrieval"]["pool_size"][:, None]))


@pytest.mark.parametrize("rule", ["v2", "v1"])
def test_hard_negatives_move_with_the_real_scores_of_a_moving_model(model, rule):
    embedder, params, vectors = model
    hard = dataclasses.replace(examples.HARD, rule=rule, **({"every": 2} if rule == "v1" else {}))
    stage, loss = stage_of(model, "supervised", tasks=(examples.RETRIEVAL,), hard_negatives=hard, matryoshka=config.Matryoshka())
    carry = stage.init_carry(examples.EXAMPLES)
    r = np.random.default_rng(11)
    pool_sizes = r.integers(0, examples.P + 1, examples.EXAMPLES["retrieval"])
    oracle = Oracle(rule, pool_sizes, examples.S, every=2)
    for step in range(12):
        batch = examples.batch_of("supervised", seed=step % 3)["retrieval"]
        batch["pool_size"] = pool_sizes[batch["ids"]].astype(np.int32)
        value, (carry, metrics) = loss(params, carry, {"retrieval": batch}, step, jax.random.key(0))
        slots = np.array([oracle.examples[i].slots for i in batch["ids"]])
        queries, pool = vectors(batch["query"], params=params), vectors(batch["pool"], params=params)
        scores = np.einsum("bd,bsd->bs", queries, pool[np.arange(examples.B)[:, None], slots])
        filled = slots < batch["pool_size"][:, None]
        np.testing.assert_allclose(metrics["hard_negative_score/retrieval"], scores[filled].mean(), atol=1e-5)
        for row, number in enumerate(batch["ids"]):
            oracle.visit(number, scores[row], step + 1)
        assert np.isfinite(value)
        assert np.asarray(carry["retrieval"]["slot"])[: len(pool_sizes)].tolist() == [example.slots for example in oracle.examples]
        assert [int(metrics[name]) for name in hard_negatives.COUNTERS] == [oracle.low, oracle.drop, oracle.exhausted]
        params = jax.tree.map(lambda p: p + 0.1 * r.normal(size=p.shape).astype(np.float32), params)
    assert oracle.drop > 0 and oracle.exhausted > 0


def test_without_any_candidate_and_with_the_rule_off_training_still_works(model):
    stage, loss = stage_of(model, "supervised", tasks=(examples.RETRIEVAL,), hard_negatives=dataclasses.replace(examples.HARD, rule="off"))
    batch = examples.batch_of("supervised")["retrieval"]
    batch["pool_size"] = np.zeros(examples.B, np.int32)
    carry = stage.init_carry(examples.EXAMPLES)
    value, (after, metrics) = loss(model[1], carry, {"retrieval": batch}, 0, jax.random.key(0))
    assert np.isfinite(value) and after == carry == {"retrieval": {}}
    assert metrics["hard_negative_score/retrieval"] == 0 and "replaced_low" not in metrics


def test_one_task_takes_turns_and_leaves_the_others_alone(model):
    _, params, _ = model
    batch = examples.batch_of("one_task")
    stage, loss = stage_of(model, "one_task")
    carry = stage.init_carry(examples.EXAMPLES)
    value, (after, metrics) = loss(params, carry, batch, 0, jax.random.key(0))
    assert value == metrics["loss/retrieval"] and np.isnan(metrics["loss/sts"])
    assert not np.all(np.isnan(after["retrieval"]["s0"]))
    value, (unmoved, metrics) = loss(params, after, batch, 3, jax.random.key(0))
    np.testing.assert_allclose(value, 0.8 * metrics["loss/sts"], rtol=1e-6)
    assert np.isnan(metrics["loss/retrieval"]) and metrics["tokens"] == batch["sts"]["sentence1"]["lengths"].sum() + batch["sts"]["sentence2"]["lengths"].sum()
    jax.tree.map(np.testing.assert_array_equal, after, unmoved)


@pytest.mark.parametrize(("full", "calls"), [(16_384, [(11, 6), (3, 4)]), (40, [(3, 6), (8, 6), (3, 4)]), (12, [(3, 6), (8, 6), (3, 4)])])
def test_texts_encoded_together_are_those_encoded_apart(model, monkeypatch, full, calls):
    embedder, params, vectors = model
    monkeypatch.setattr(encode, "FULL", full)  # tokens from which on a text batch has a call of its own
    seen = []

    class Watched:
        def embed(self, params, text, mask, keys):
            assert keys is None
            seen.append(text["tokens"].shape)
            return embedder.embed(params, text, mask)

    r = np.random.default_rng(5)
    short = {name: value[:, :4] if name == "tokens" else np.minimum(value, 4) for name, value in examples.texts(r, 3).items()}
    texts = {"a": examples.texts(r, 3, prompt=2), "b": examples.texts(r, 2, 4), "c": short}
    together = jax.jit(lambda p: encode.encode_all(Watched(), p, texts, Bidirectional()), compiler_options=FAST)(params)
    assert seen == calls
    assert list(map(jnp.shape, (together["a"], together["b"], together["c"]))) == [(3, 16), (2, 4, 16), (3, 16)]
    for name in ("a", "b"):
        np.testing.assert_allclose(together[name], vectors(texts[name]), atol=1e-6)
    np.testing.assert_allclose(together["c"], embedder.embed(params, short), atol=1e-6)


@pytest.mark.parametrize("kind", examples.STAGES)
def test_the_contract_of_every_stage(model, kind):
    stage = make_stage(examples.STAGES[kind], model[0])
    carry = jax.eval_shape(lambda: stage.init_carry(examples.EXAMPLES))
    jax.tree.map(lambda array, axes: len(array.shape) == len(axes) or pytest.fail("axes"), carry, stage.carry_axes(carry))
    loss, (after, metrics) = jax.eval_shape(stage.loss, model[1], carry, examples.batch_of(kind), jnp.int32(0), jax.random.key(0))
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jax.tree.structure(carry) == jax.tree.structure(after) and all(map(same, jax.tree.leaves(carry), jax.tree.leaves(after)))
    assert {(m.shape, str(m.dtype)) for m in [loss, *metrics.values()]} == {((), "float32")} and {"loss", "tokens"} <= set(metrics)
    assert stage.mask(stage.config.steps) in (Causal(), Bidirectional()) or float(stage.mask(stage.config.steps).alpha) == 1
    assert all(isinstance(k, str) and isinstance(v, str | int | float) for k, v in stage.describe().items())


def test_describe_counts_negatives_and_tokens(model):
    facts = make_stage(examples.STAGES["supervised"], model[0]).describe()
    assert facts["sub-batch retrieval"] == "8 retrieval, weight 1, 23 negatives per query (2 its own)"
    assert facts["sub-batch classification"] == "8 classification, weight 1, 2 negatives per query"
    assert facts["tokens per step"] == f"at most {8 * 6 * (4 + 4 + 2)}"
    assert facts["global batch"] == "24 examples, 80 texts" and facts["batch per device"] == "80 texts, encoded at once"
    weak = make_stage(dataclasses.replace(examples.STAGES["weak"], encode_chunk_size=3), model[0])
    assert weak.describe()["negatives per query"] == "7 in batch"
    lm = make_stage(dataclasses.replace(examples.STAGES["sft"], gradient_accumulation_steps=4), model[0])
    assert lm.describe()["batch per device"] == "8 rows, 4 micro-batches of 2"
    with sharding.activate(sharding.make_mesh(config.Mesh(2, 2, 2))):
        assert weak.describe()["batch per device"] == "2 pairs, encoded 3 texts at a time"
        assert lm.describe()["batch per device"] == "2 rows, 2 micro-batches of 1"


class OutsideStage:
    def __init__(self, config, embedder):
        self.options = config.options


def test_stages_are_found_by_kind_and_by_path(model):
    custom = config.CustomStage(name="mine", kind=f"{__name__}:OutsideStage", steps=1, options={"a": 1})
    assert make_stage(custom, model[0]).options == {"a": 1}
    assert {type(make_stage(c, model[0])) for c in examples.STAGES.values()} == set(STAGES.values())
    for kind in (f"{__name__}:Nothing", "no_such_package:Stage", ":"):
        with pytest.raises(ConfigError, match="mine"):
            make_stage(config.CustomStage(name="mine", kind=kind, steps=1), model[0])
