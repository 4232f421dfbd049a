import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conan_jax.data import transforms as tf
from conan_jax.errors import DataError
from tests.data.corpus import sentences, tokenizer

EOS = 3


def test_prompt_text_and_eos_in_a_row():
    t = tokenizer()
    tokens, length, prompt = tf.encode_text(t, "read the file", 40, "find it")
    asked, content = t.encode("Instruct: find it\nQuery: "), t.encode("read the file")
    assert tokens.dtype == np.int32 and tokens.shape == (40,)
    assert tokens.tolist() == asked + content + [EOS] + [0] * (40 - len(asked) - len(content) - 1)
    assert (length, prompt) == (len(asked) + len(content) + 1, len(asked))


def test_without_an_instruction_the_text_is_bare():
    t = tokenizer()
    tokens, length, prompt = tf.encode_text(t, "read", 16)
    assert prompt == 0 and tokens[:length].tolist() == t.encode("read") + [EOS]


@given(st.integers(3, 40), st.sampled_from(sentences(50)))
@settings(max_examples=100, deadline=None)
def test_a_cut_text_keeps_its_eos(length, text):
    t = tokenizer()
    full = t.encode(text)
    tokens, n, _ = tf.encode_text(t, text, length)
    assert n == min(len(full) + 1, length)
    assert tokens[:n].tolist() == full[: length - 1] + [EOS]


SPACED = st.lists(
    st.sampled_from(["read", " ", "  ", "\n", "模型", "search", " the", "\u2581", "x" * 40, " value"]), max_size=200,
).map("".join)


@given(SPACED, st.integers(3, 24))
@settings(max_examples=300, deadline=None)
def test_a_long_document_gives_the_tokens_of_the_whole(text, length):
    """Only its head is encoded; that shows in the time, not in the tokens."""
    t = tokenizer()
    full = t.encode(text)
    tokens, n, _ = tf.encode_text(t, text, length)
    assert n == min(len(full) + 1, length) and tokens[: n - 1].tolist() == full[: n - 1]


def test_the_rest_of_a_long_document_is_not_encoded(monkeypatch):
    t = tokenizer()
    encoded = []
    monkeypatch.setattr(t, "encode_batch", lambda texts, *a: encoded.extend(texts) or [[7] * len(text) for text in texts])
    tf.encode_texts(t, ["read the file " * 10_000], 16)
    assert max(map(len, encoded)) < 200


def test_an_instruction_without_room_for_text_is_refused():
    t = tokenizer()
    prompt = len(t.encode(tf.query_prompt("find the document")))
    assert tf.encode_text(t, "x y z", prompt + 2, "find the document")[1] == prompt + 2
    with pytest.raises(DataError, match=f"takes {prompt} tokens.*in {prompt + 1}"):
        tf.encode_text(t, "x y z", prompt + 1, "find the document")


def test_count_tokens_is_the_uncut_row_length():
    t = tokenizer()
    texts, instructions = sentences(20), ["", "find it"] * 10
    rows = [tf.encode_text(t, text, 400, i)[1] for text, i in zip(texts, instructions)]
    assert tf.count_tokens(t, texts, instructions).tolist() == rows


def test_text_hash_is_64_bits_of_blake2b():
    digest = hashlib.blake2b("模型".encode(), digest_size=8).digest()
    found = tf.text_hash("模型")
    assert found.dtype == np.uint32
    assert found.tolist() == [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")]


def test_stable_seed_separates_its_parts():
    assert tf.stable_seed("ab", "c") != tf.stable_seed("a", "bc")
    assert tf.stable_seed(0, "weak", "", "pairs") == 2724835412  # the data order of every run depends on this value


def test_views_of_a_pair():
    sft = {"instruction": "Translate", "input": "bonjour", "output": "hello"}
    assert tf.as_pair("sft", sft) == ("Translate\nbonjour", "hello")
    assert tf.as_pair("sft", {**sft, "input": ""}) == ("Translate", "hello")
    retrieval = {"query": "q", "pos": ["a", "b", "c"], "neg": []}
    assert [tf.as_pair("retrieval", retrieval, k)[1] for k in (0, 1, 5)] == ["a", "b", "c"]
    with pytest.raises(DataError, match="no pairs"):
        tf.as_pair("text", {"text": "x"})


def test_the_records_own_instruction_wins_but_an_sft_instruction_is_text():
    assert tf.instruction_of("pair", {"instruction": "mine"}, "default") == "mine"
    assert tf.instruction_of("pair", {"instruction": ""}, "default") == "default"
    assert tf.instruction_of("sft", {"instruction": "Translate"}, "default") == "default"


def test_candidates_skip_the_top_and_leave_out_positives_query_and_repeats():
    record = {"query": "q", "pos": ["p1", "p2"], "neg": ["n0", "n1", "p2", "q", "n2", "n2", "n3", "n4"]}
    assert tf.candidates(record, 10, 0) == ["n0", "n1", "n2", "n3", "n4"]
    assert tf.candidates(record, 3, 1) == ["n1", "n2", "n3"]
    assert tf.candidates(record, 3, 10) == []


def test_pools_are_padded_with_empty_rows():
    t = tokenizer()
    batch = tf.pool_batch(t, [["read", "write", "open"], [], ["close"]], 4, 8)
    assert batch["pool"]["tokens"].shape == (3, 4, 8) and batch["pool_size"].tolist() == [3, 0, 1]
    assert (batch["pool"]["lengths"] > 0).tolist() == [[True] * 3 + [False], [False] * 4, [True] + [False] * 3]
    assert (batch["pool"]["tokens"][batch["pool"]["lengths"] == 0] == 0).all()
    assert batch["pool"]["tokens"][2, 0].tolist() == tf.encode_text(t, "close", 8)[0].tolist()
    assert batch["pool"]["tokens"][0, 1].tolist() == tf.encode_text(t, "write", 8)[0].tolist()
    assert batch["pool_hash"][0, 2].tolist() == tf.text_hash("open").tolist()
    assert (batch["pool_hash"][1] == 0).all() and "prompt_lengths" not in batch["pool"]


def test_all_pools_empty():
    batch = tf.pool_batch(tokenizer(), [[], []], 3, 8)
    assert batch["pool"]["tokens"].shape == (2, 3, 8) and batch["pool_size"].tolist() == [0, 0]


def test_pair_batch_shapes_and_types():
    batch = tf.pair_batch(tokenizer(), [7, 9], ["read", "write"], ["file", "set"], ["find it", ""], (32, 12))
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items() if not isinstance(v, dict)} == {
        "ids": ((2,), "int32"), "query_hash": ((2, 2), "uint32"), "positive_hash": ((2, 2), "uint32")}
    assert batch["query"]["tokens"].shape == (2, 32) and batch["positive"]["tokens"].shape == (2, 12)
    assert batch["query"]["prompt_lengths"][1] == 0 < batch["query"]["prompt_lengths"][0]
    assert batch["positive"]["prompt_lengths"].tolist() == [0, 0]
    assert batch["query_hash"][0].tolist() == tf.text_hash("read").tolist()  # of the text alone, not of the prompt


def test_sts_batch_keeps_the_score():
    records = [{"sentence1": "a", "sentence2": "b", "score": 3.8}, {"sentence1": "c", "sentence2": "d", "score": 0.0}]
    batch = tf.sts_batch(tokenizer(), [0, 1], records, ["", ""], (6, 8))
    assert batch["score"].dtype == np.float32 and batch["score"].tolist() == pytest.approx([3.8, 0.0])
    assert batch["sentence1"]["tokens"].shape == (2, 6) and batch["sentence2"]["tokens"].shape == (2, 8)


@pytest.mark.parametrize("label, text", [("card_arrival", "card arrival"), ("sport", "sport"), ("_", "_")])
def test_label_text(label, text):
    assert tf.label_text(label) == text


@pytest.mark.parametrize("kind, record, texts", [
    ("text", {"text": "a"}, ["a"]), ("labelled", {"text": "a", "label": "l"}, ["a"]), ("pair", {"query": "q", "pos": "p"}, ["q", "p"]),
    ("retrieval", {"query": "q", "pos": ["p", "r"], "neg": ["n"]}, ["q", "p", "r"]),
    ("sts", {"sentence1": "a", "sentence2": "b", "score": 1.0}, ["a", "b"]),
    ("sft", {"instruction": "i", "input": "x", "output": "o"}, ["i\nx", "o"]),
])
def test_texts_to_learn_from(kind, record, texts):
    assert tf.record_texts(kind, record) == texts
