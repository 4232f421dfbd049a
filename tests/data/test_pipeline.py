import dataclasses

import jax
import numpy as np
import pytest

from conan_jax import config as c
from conan_jax.data import indexes, mixture, transforms
from conan_jax.data.pipeline import Pipeline
from conan_jax.errors import ConfigError, DataError
from tests.data.corpus import WORDS, sentences, tokenizer

LINES = sentences(200)
SOURCES = {
    "pairs": [{"query": LINES[i][:20], "pos": LINES[i], "instruction": ""} for i in range(100)],
    "chat": [{"instruction": "say", "input": LINES[i], "output": LINES[-i]} for i in range(40)],
    "search": [{"query": f"query {i}", "pos": [f"first {i}", f"second {i}", f"third {i}"], "neg": [f"no {i} {k}" for k in range(i % 7)], 
                "scores": [], "instruction": ""} for i in range(64)],
    "labels": [{"text": f"text {i}", "label": f"label_{i % 5}"} for i in range(50)],
    "other_labels": [{"text": f"more {i}", "label": "ab"[i % 2]} for i in range(20)],
    "graded": [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i / 7} for i in range(24)],
    "rows": [{"id": i, "tokens": np.full(16, i, np.int32), "segment_ids": np.ones(16, np.int32), "positions": np.arange(16, dtype=np.int32),
              "loss_mask": np.ones(16, np.float32)} for i in range(30)],
}
KINDS = {
    "pairs": "pair", "chat": "sft", "search": "retrieval", "labels": "labelled", "other_labels": "labelled", "graded": "sts",
    "rows": "text",
}
ADAM = c.Optimizer()


def make_run(*stages, seed=0, **instructions):
    datasets = tuple(c.Dataset(name, kind, "unused", instruction=instructions.get(name, "")) for name, kind in KINDS.items())
    model = c.Model(vocab_size=640, hidden_size=32, num_heads=2, num_kv_heads=1, max_length=256)
    return c.Run(name="t", stages=stages, datasets=datasets, model=model, tokenizer=c.Tokenizer(vocab_size=600), seed=seed)


def weak(*mixes, size=8, buckets=(c.Bucket(16, 48),), name="weak"):
    return c.WeakStage(name=name, steps=4, datasets=mixes, global_batch_size=size, buckets=buckets)


def supervised(*tasks, **changes):
    return c.SupervisedStage(name="supervised", steps=4, tasks=tasks, **changes)


def pipeline(stage, sources=SOURCES, seed=0, **keywords):
    return Pipeline(make_run(stage, seed=seed), stage, tokenizer(), sources=sources, **keywords)


def equal(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


RETRIEVAL = c.Task("retrieval", "retrieval", (c.Mix("search"),), 8, c.Bucket(8, 12))
CLASSES = c.Task("classes", "classification", (c.Mix("labels"), c.Mix("other_labels")), 8, c.Bucket(8, 6), num_negatives=3)
GRADED = c.Task("graded", "sts", (c.Mix("graded"),), 8, c.Bucket(8, 10))
LM = c.LMStage(name="pretrain", kind="pretrain", datasets=(c.Mix("rows"),), steps=4, global_batch_size=8, sequence_length=16)
STAGES = {
    "pretrain": LM,
    "weak": weak(c.Mix("pairs"), c.Mix("chat"), c.Mix("search")),
    "buckets": weak(c.Mix("pairs"), buckets=(c.Bucket(7, 16), c.Bucket(9, 24), c.Bucket(16, 48))),
    "supervised": supervised(RETRIEVAL, CLASSES, GRADED),
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_the_slices_of_all_hosts_in_order_are_the_global_batch(name, hosts):
    whole = pipeline(STAGES[name])
    parts = [pipeline(STAGES[name], host_index=h, host_count=hosts) for h in range(hosts)]
    for step in (0, 1, 5, 29):
        joined = jax.tree.map(lambda *rows: np.concatenate(rows), *(part.batch(step) for part in parts))
        assert equal(joined, whole.batch(step))


@pytest.mark.parametrize("name", STAGES)
def test_a_run_resumes_from_its_step_alone(name):
    one, other = pipeline(STAGES[name]), pipeline(STAGES[name])
    ahead = other.iterate(3)
    for step in range(3, 9):
        assert equal(next(ahead), one.batch(step))


def ids_by_epoch(stage, records, size, epochs=3):
    p = pipeline(stage)
    per_epoch = records // size
    return [[p.batch(e * per_epoch + t)["ids"].tolist() for t in range(per_epoch)] for e in range(epochs)]


@pytest.mark.parametrize("size", [8, 32, 100])
def test_an_epoch_shows_each_record_at_most_once_and_is_reshuffled(size):
    epochs = ids_by_epoch(weak(c.Mix("pairs"), size=size), 100, size)
    for batches in epochs:
        flat = sum(batches, [])
        assert len(set(flat)) == len(flat) == 100 // size * size and set(flat) <= set(range(100))
    assert epochs[0] != epochs[1] != epochs[2]
    assert sum(epochs[0], []) != sorted(sum(epochs[0], []))


def test_all_records_get_their_turn_though_the_remainder_of_an_epoch_is_dropped():
    epochs = ids_by_epoch(weak(c.Mix("pairs"), size=32), 100, 32, epochs=12)
    assert {i for batches in epochs for batch in batches for i in batch} == set(range(100))


def test_seed_stage_and_dataset_change_the_order():
    first = pipeline(weak(c.Mix("pairs"))).batch(0)["ids"].tolist()
    assert first != pipeline(weak(c.Mix("pairs")), seed=1).batch(0)["ids"].tolist()
    assert first != pipeline(weak(c.Mix("pairs"), name="again")).batch(0)["ids"].tolist()
    assert first == pipeline(weak(c.Mix("pairs"))).batch(0)["ids"].tolist()


def test_a_batch_holds_records_of_one_dataset_and_ids_point_to_them():
    p = pipeline(STAGES["weak"])
    assert p.num_examples == {"": 204}
    offsets = {"pairs": 0, "chat": 100, "search": 140}
    seen = set()
    for step in range(25):
        batch = p.batch(step)
        [name] = {max((n for n in offsets if offsets[n] <= i), key=offsets.get) for i in batch["ids"].tolist()}
        seen.add(name)
        assert p.datasets_of(batch) == {"": name}
        for row, i in enumerate(batch["ids"].tolist()):
            query, _ = transforms.as_pair(KINDS[name], SOURCES[name][i - offsets[name]])
            tokens, length, _ = transforms.encode_text(tokenizer(), query, 16)
            assert batch["query"]["tokens"][row].tolist() == tokens.tolist() and batch["query"]["lengths"][row] == length
            assert batch["query_hash"][row].tolist() == transforms.text_hash(query).tolist()
    assert seen == set(offsets)


@pytest.mark.parametrize("weights, expected", [((None, None), 100 / 140), ((3.0, 1.0), 0.75), ((0.02, 0.08), 0.2)])
def test_batches_follow_the_weights_or_the_sizes(weights, expected):
    p = pipeline(weak(c.Mix("pairs", weights[0]), c.Mix("chat", weights[1])))
    share = np.mean([p.batch(t)["ids"][0] < 100 for t in range(140)])
    assert share == pytest.approx(expected, abs=0.02)


def test_several_positives_take_turns_over_the_epochs():
    p = pipeline(weak(c.Mix("search"), size=64))
    shown = {}
    for epoch in range(12):
        batch = p.batch(epoch)
        for i, positive in zip(batch["ids"].tolist(), batch["positive"]["tokens"]):
            text = tokenizer().decode(positive.tolist())
            assert text in SOURCES["search"][i]["pos"]
            shown.setdefault(i, set()).add(text)
    assert np.mean([len(texts) for texts in shown.values()]) > 2.5


def test_records_go_to_the_smallest_bucket_that_holds_them():
    buckets = STAGES["buckets"].buckets
    p = pipeline(STAGES["buckets"])
    t = tokenizer()
    shapes = set()
    for step in range(24):
        batch = p.batch(step)
        shape = (batch["query"]["tokens"].shape[1], batch["positive"]["tokens"].shape[1])
        shapes.add(shape)
        place = [(b.query_length, b.passage_length) for b in buckets].index(shape)
        for i in batch["ids"].tolist():
            need = (len(t.encode(SOURCES["pairs"][i]["query"])) + 1, len(t.encode(SOURCES["pairs"][i]["pos"])) + 1)
            fits = [need[0] <= b.query_length and need[1] <= b.passage_length for b in buckets]
            assert place == (fits.index(True) if any(fits) else 2)
    assert len(shapes) == 3


@pytest.mark.parametrize("counts, expected", [
    ((10, 10, 10), {0: 10, 1: 10, 2: 10}),
    ((3, 10, 10), {1: 13, 2: 10}),  # too few to fill a batch: they ride in the next larger bucket
    ((10, 3, 0), {0: 10, 2: 3 + 0}),
    ((10, 10, 3), {0: 10, 2: 13}),  # the largest is short: it takes over the one before
    ((3, 3, 3), {2: 9}),
    ((10, 0, 0), {0: 10}),
])
def test_short_buckets_are_merged_upwards(counts, expected):
    lengths = np.array([(4, 4)] * counts[0] + [(8, 8)] * counts[1] + [(99, 4)] * counts[2], np.int32)
    if counts == (10, 3, 0):  # three records in the largest bucket cannot fill a batch of 8 alone
        expected = {2: 13}
    groups = mixture.assign_buckets(lengths, [(4, 4), (8, 8), (16, 16)], 8)
    assert {b: len(members) for b, members in groups.items()} == expected
    assert sorted(np.concatenate(list(groups.values())).tolist()) == list(range(sum(counts)))


def test_a_record_handed_up_skips_a_bucket_it_does_not_fit():
    lengths = np.array([(2, 30)] * 2 + [(10, 10)] * 9 + [(20, 40)] * 9, np.int32)
    groups = mixture.assign_buckets(lengths, [(2, 30), (30, 10), (32, 48)], 8)
    assert {b: members.tolist() for b, members in groups.items()} == {1: list(range(2, 11)), 2: [0, 1, *range(11, 20)]}


def test_pair_lengths_take_prompts_and_the_longest_positive():
    t = tokenizer()
    records = [{"query": "read", "pos": ["a", "the longest of them all"], "instruction": ""},
               {"query": "q", "pos": ["x"], "instruction": "mine"}]
    found = indexes.pair_lengths(records, "retrieval", "find it", t)
    prompt = [len(t.encode(f"Instruct: {i}\nQuery: ")) for i in ("find it", "mine")]
    assert found.tolist() == [[prompt[0] + len(t.encode("read")) + 1, len(t.encode("the longest of them all")) + 1],
                              [prompt[1] + len(t.encode("q")) + 1, len(t.encode("x")) + 1]]


def shapes(batch):
    return {"/".join(str(k.key) for k in path): (leaf.shape, leaf.dtype.name) for path, leaf in jax.tree_util.tree_leaves_with_path(batch)}


def text_shapes(name, *shape):
    i32 = "int32"
    return {f"{name}/tokens": (shape, i32), f"{name}/lengths": (shape[:1], i32), f"{name}/prompt_lengths": (shape[:1], i32)}


def test_batches_have_the_shapes_of_the_contract():
    assert shapes(pipeline(LM).batch(0)) == {
        "ids": ((8,), "int32"), "tokens": ((8, 16), "int32"), "segment_ids": ((8, 16), "int32"), "positions": ((8, 16), "int32"),
        "loss_mask": ((8, 16), "float32")}
    hashes = {"ids": ((8,), "int32"), "query_hash": ((8, 2), "uint32"), "positive_hash": ((8, 2), "uint32")}
    assert shapes(pipeline(STAGES["weak"]).batch(0)) == {**hashes, **text_shapes("query", 8, 16), **text_shapes("positive", 8, 48)}
    batch = pipeline(STAGES["supervised"]).batch(0)
    assert list(batch) == ["retrieval", "classes", "graded"]
    assert shapes(batch["retrieval"]) == {
        **hashes, **text_shapes("query", 8, 8), **text_shapes("positive", 8, 12), "pool/tokens": ((8, 32, 12), "int32"),
        "pool/lengths": ((8, 32), "int32"), "pool_hash": ((8, 32, 2), "uint32"), "pool_size": ((8,), "int32")}
    assert shapes(batch["classes"]) == {
        **hashes, **text_shapes("query", 8, 8), **text_shapes("positive", 8, 6), "negatives/tokens": ((8, 3, 6), "int32"),
        "negatives/lengths": ((8, 3), "int32"), "negative_mask": ((8, 3), "float32")}
    assert shapes(batch["graded"]) == {
        "ids": ((8,), "int32"), "score": ((8,), "float32"), **text_shapes("sentence1", 8, 8), **text_shapes("sentence2", 8, 10)}


def test_packed_rows_pass_through():
    batch = pipeline(LM).batch(2)
    assert (batch["tokens"] == batch["ids"][:, None]).all()


def test_pools_hold_the_negatives_of_their_record():
    p = pipeline(supervised(RETRIEVAL, hard_negatives=c.HardNegatives(pool_size=4, num_negatives=2, skip_top=1)))
    assert p.num_examples == {"retrieval": 64}
    batch = p.batch(0)["retrieval"]
    for row, i in enumerate(batch["ids"].tolist()):
        expected = SOURCES["search"][i]["neg"][1:5]
        assert batch["pool_size"][row] == len(expected)
        assert [tokenizer().decode(x.tolist()) for x in batch["pool"]["tokens"][row][: len(expected)]] == expected


@pytest.mark.parametrize("negatives, skipped", [
    (c.HardNegatives(rule="v1", num_negatives=1), 10), (c.HardNegatives(rule="v2", num_negatives=1), 0),
    (c.HardNegatives(rule="v1", num_negatives=1, skip_top=3), 3),
])
def test_the_rule_decides_how_many_top_candidates_are_skipped(negatives, skipped):
    records = [{"query": f"q{i}", "pos": ["p"], "neg": [f"n{k}" for k in range(12)], "scores": [], "instruction": ""} for i in range(8)]
    batch = pipeline(supervised(RETRIEVAL, hard_negatives=negatives), {"search": records}).batch(0)
    assert (batch["retrieval"]["pool_size"] == 12 - skipped).all()


def test_label_negatives_are_other_labels_each_once():
    task = c.Task("classes", "classification", (c.Mix("labels"), c.Mix("other_labels")), 8, c.Bucket(8, 8), num_negatives=3)
    p = pipeline(supervised(task))
    t = tokenizer()
    assert p.num_examples == {"classes": 70}
    drawn = set()
    for step in range(20):
        batch = p.batch(step)["classes"]
        for row, i in enumerate(batch["ids"].tolist()):
            name, record = ("labels", SOURCES["labels"][i]) if i < 50 else ("other_labels", SOURCES["other_labels"][i - 50])
            own = record["label"].replace("_", " ")
            assert t.decode(batch["query"]["tokens"][row].tolist()) == record["text"]
            assert t.decode(batch["positive"]["tokens"][row].tolist()) == own
            found = [t.decode(x.tolist()) for x, m in zip(batch["negatives"]["tokens"][row], batch["negative_mask"][row]) if m]
            others = {r["label"].replace("_", " ") for r in SOURCES[name]} - {own}
            assert set(found) <= others and len(set(found)) == len(found) == min(3, len(others))
            drawn.add((i, tuple(found)))
    assert len(drawn) > 70  # another draw each epoch


def test_example_positives_share_the_class_and_negatives_do_not():
    sources = {"labels": [*SOURCES["labels"], {"text": "alone", "label": "single_one"}]}
    task = c.Task("classes", "classification", (c.Mix("labels"),), 51, c.Bucket(8, 8), num_negatives=4, positives="example")
    p = pipeline(supervised(task), sources)
    t, of = tokenizer(), {r["text"]: r["label"] for r in sources["labels"]}
    for step in range(3):
        batch = p.batch(step)["classes"]
        for row, i in enumerate(batch["ids"].tolist()):
            record = sources["labels"][i]
            positive = t.decode(batch["positive"]["tokens"][row].tolist())
            assert positive != record["text"]
            assert of[positive] == record["label"] if record["label"] != "single_one" else positive == "single one"
            negatives = [t.decode(x.tolist()) for x in batch["negatives"]["tokens"][row]]
            assert len(set(negatives)) == 4 and record["label"] not in {of[n] for n in negatives}


@pytest.mark.parametrize("positives", ["label", "example"])
def test_a_dataset_of_one_label_is_refused(positives):
    stage = supervised(dataclasses.replace(CLASSES, positives=positives))
    one = [{"text": f"text {i}", "label": "only_this"} for i in range(20)]
    with pytest.raises(DataError, match="'other_labels' .*'only_this'.*'classes'"):
        pipeline(stage, SOURCES | {"other_labels": one})


def test_labels_index():
    found = indexes.labels([{"label": x} for x in "bacab"])
    assert found.names == ["a", "b", "c"] and found.of.tolist() == [1, 0, 2, 0, 1]
    assert [found.members(k).tolist() for k in range(3)] == [[1, 3], [0, 4], [2]]
    assert sorted(found.outside(1, np.arange(3)).tolist()) == [1, 2, 3]


def test_the_datasets_instruction_stands_before_queries_only():
    stage = weak(c.Mix("pairs"), buckets=(c.Bucket(64, 48),))
    p = Pipeline(make_run(stage, pairs="find it"), stage, tokenizer(), sources=SOURCES)
    batch = p.batch(0)
    assert (batch["query"]["prompt_lengths"] == len(tokenizer().encode("Instruct: find it\nQuery: "))).all()
    assert (batch["positive"]["prompt_lengths"] == 0).all()


def test_only_tasks_of_several_datasets_name_the_dataset_of_a_batch():
    p = pipeline(weak(c.Mix("pairs")))
    assert p.datasets_of(p.batch(0)) == {}


def test_tasks_in_turn_miss_no_batch():
    together = pipeline(supervised(RETRIEVAL, GRADED))
    in_turn = pipeline(supervised(RETRIEVAL, GRADED, update="one_task"))
    for step in range(8):
        due, other = (("retrieval", "graded"), ("graded", "retrieval"))[step % 2]  # task k is due at steps = k mod 2
        batch, whole = in_turn.batch(step), together.batch(step // 2)
        assert list(batch) == list(whole) and equal(batch[due], whole[due])
        assert shapes(batch) == shapes(whole) and not any(x.any() for x in jax.tree.leaves(batch[other]))


def test_a_dataset_named_twice_is_not_in_step_with_itself():
    p = pipeline(weak(c.Mix("pairs", 0.5), c.Mix("pairs", 0.5)))
    once = pipeline(weak(c.Mix("pairs")))
    ids = [p.batch(step)["ids"] for step in range(8)]
    first, second = [x for x in ids if x[0] < 100], [x - 100 for x in ids if x[0] >= 100]
    assert len(first) == len(second) == 4 and not np.array_equal(first, second)
    assert np.array_equal(first, [once.batch(step)["ids"] for step in range(4)])


@pytest.mark.parametrize("stage, message", [
    (weak(c.Mix("chat"), size=41), r"dataset 'chat' holds 40 records, fewer than the global batch of 41 of stage 'weak'"),
    (supervised(c.Task("x", "sts", (c.Mix("graded"),), 64, c.Bucket(8, 8))),
     r"'graded' holds 24 records.*64 of task 'x' of stage 'supervised'"),
])
def test_a_dataset_smaller_than_a_batch_is_refused_with_both_numbers(stage, message):
    with pytest.raises(DataError, match=message):
        pipeline(stage)


@pytest.mark.parametrize("stage, message", [
    (weak(c.Mix("graded")), "needs records of kind pair or retrieval or sft, but dataset 'graded' is of kind sts"),
    (weak(c.Mix("pairs", 0.5), c.Mix("chat")), "not to chat"),
    (c.CustomStage(name="mine", kind="a.b:c", steps=1, datasets=(c.Mix("pairs"),), options={"query_length": 8}),
     "global_batch_size, passage_length"),
])
def test_contradictions_are_refused(stage, message):
    with pytest.raises(ConfigError, match=message):
        pipeline(stage)


def test_hosts_must_divide_the_batch():
    with pytest.raises(ConfigError, match="8 cannot be divided among 3 hosts"):
        pipeline(weak(c.Mix("pairs")), host_count=3)


def test_an_instruction_too_long_for_the_bucket_names_the_dataset():
    stage = weak(c.Mix("pairs"))
    p = Pipeline(make_run(stage, pairs=" ".join(WORDS)), stage, tokenizer(), sources=SOURCES)
    with pytest.raises(DataError, match="dataset 'pairs': the instruction"):
        p.batch(0)
    with pytest.raises(DataError, match="dataset 'pairs': the instruction"):
        next(p.iterate(0))


def test_a_stage_from_outside_gets_pairs():
    options = {"global_batch_size": 8, "query_length": 16, "passage_length": 48}
    stage = c.CustomStage(name="mine", kind="a.b:c", steps=1, datasets=(c.Mix("pairs"),), options=options)
    assert shapes(pipeline(stage).batch(0)) == shapes(pipeline(weak(c.Mix("pairs"))).batch(0))
