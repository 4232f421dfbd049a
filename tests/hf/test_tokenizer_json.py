import functools
import gzip
import json
import os
import random
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from conan_jax.data.tokenizer import EOS, Tokenizer
from conan_jax.data.transforms import encode_texts, query_prompt
from conan_jax.errors import DataError
from conan_jax.hf.tokenizer_json import tokenizer_config, tokenizer_json
from tests.data.corpus import sentences, tokenizer

SHARED = Path(os.environ.get("CONAN_DATA", "../shared/data"))
AWKWARD = [
    "\u2581", "\u2581\u2581", " ", "  ", "    ", "\n", "\r\n", "\t", "\0", "<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<0xE2>", "\ufffd",
    "\ufeff", "\u0301", "e\u0301", "\u200d", "\U0001f469\u200d\U0001f4bb", "\U0010ffff", "\u2028", "\u00a0", "\u3000", "模型", "ß", "Query",
    "Instruct: ", "\nQuery: ", "Query: ", "aaaa", "1234",
]
ANY_TEXT = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=8), st.sampled_from(sentences(20)))).map("".join)
TASKS = ["Find what answers the question", "読む (a|b)* [x] {1} $^ \\d +?", "two\nlines"]


@functools.cache
def converted(prompts: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer(), prompts)))


def ids(text: str, prompts: tuple[str, ...] = ()) -> list[int]:
    return converted(prompts).encode(text, add_special_tokens=False).ids


def expected(text: str) -> list[int]:
    """What rows are made of: the ids of the prompt, where there is one, and those of the text."""
    prompt = re.match("Instruct: [^\n]*\nQuery: ", text)
    return [i for part in ([text] if prompt is None else [prompt.group(), text[prompt.end():]]) for i in tokenizer().encode(part)]


@given(ANY_TEXT)
@settings(max_examples=400, deadline=None)
def test_ids_are_those_of_sentencepiece(text):
    assert ids(text) == expected(text)
    assert converted().encode(text).ids == [*expected(text), EOS]


def test_ids_are_those_of_sentencepiece_on_ten_thousand_random_strings():
    rng = random.Random(0)
    known = sorted({c for line in sentences(300) for c in line})
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    blocks = [points[start : start + 256] for start in range(0, 0x3000, 256)]
    texts = []
    for _ in range(10_000):
        alphabet = rng.choice([known, known[:12], points, rng.choice(blocks), AWKWARD, known + AWKWARD])
        texts.append("".join(rng.choices(alphabet, k=rng.randint(0, 40))))
    plain = [text for text in texts if not text.startswith("Instruct: ")]
    assert len(plain) > 9_900
    for text, ours, theirs in zip(plain, tokenizer().encode_batch(plain), converted().encode_batch(plain, add_special_tokens=False)):
        assert theirs.ids == ours, text
        assert converted().decode(theirs.ids) == text


@given(st.lists(st.sampled_from("ab "), max_size=60).map("".join))
@settings(max_examples=400, deadline=None)
def test_overlapping_merges_are_taken_in_the_same_order(text):
    """Pieces of two letters in any combination: many cuts of each piece, and runs in which the leftmost pair matters."""
    ours, theirs = crowded()
    assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


@functools.cache
def crowded() -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """A model of shuffled scores: pieces that outrank what they are made of, and some that are never reached."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer().model_bytes)
    letters = [""]
    for _ in range(5):
        letters += [text + c for text in letters[-(len("ab\u2581") ** 4):] for c in "ab\u2581"]
    words = sorted({text for text in letters if 2 <= len(text) <= 5})
    rng = random.Random(5)
    chosen = rng.sample(words, 150)
    kept = [p for p in model.pieces if p.type != p.NORMAL or len(p.piece) == 1]
    del model.pieces[:]
    model.pieces.extend(kept)
    for rank, word in enumerate(chosen):
        model.pieces.add(piece=word, score=-float(rank))
    for rank, piece in enumerate(p for p in model.pieces if p.type == p.NORMAL and len(p.piece) == 1):
        piece.score = -1000.0 - rank
    ours = Tokenizer(model.SerializeToString())
    return ours, tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))


def test_every_code_point_falls_to_the_same_ids():
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    blocks = ["".join(points[start : start + 4096]) for start in range(0, len(points), 64 * 4096)]
    for block in blocks:
        assert ids(block) == tokenizer().encode(block)


@pytest.mark.parametrize("text", ["a" * 200_000, " " * 200_000, "ab " * 60_000, "\u2581" * 20_000, "模" * 50_000], ids=lambda t: repr(t[:3]))
def test_a_long_text_without_a_place_to_cut_is_no_trouble(text):
    assert ids(text) == tokenizer().encode(text)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("text", [
    "", "what is it", "  two spaces", "Query", "Query: x", "\n", "\nQuery: y", ": z", " ", "Instruct: a\nQuery: b"])
def test_a_prompt_is_cut_from_its_text(task, text):
    prompt = query_prompt(task)
    row = encode_texts(tokenizer(), [text], 512, [task])
    assert converted((prompt,)).encode(prompt + text).ids == row["tokens"][0, : row["lengths"][0]].tolist()
    assert len(converted((prompt,)).encode(prompt).ids) - 1 == row["prompt_lengths"][0]  # how sentence-transformers counts it


def test_a_prompt_in_one_line_needs_no_list():
    prompt = query_prompt("never seen before")
    assert ids(prompt + "the file") == [*tokenizer().encode(prompt), *tokenizer().encode("the file")]
    assert ids("x" + prompt + "the file") == tokenizer().encode("x" + prompt + "the file")
    assert ids("a\n" + prompt + "the file") == tokenizer().encode("a\n" + prompt + "the file")


def test_other_prompts_are_cut_where_they_end():
    prompts = ("query: ", "query: deep ", "(a+b")
    for prompt in prompts:
        assert ids(prompt + "the file", prompts) == [*tokenizer().encode(prompt), *tokenizer().encode("the file")]
    assert ids("a query: the file", prompts) == tokenizer().encode("a query: the file")


def test_a_text_that_is_cut_keeps_its_end():
    hf = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer())))
    hf.enable_truncation(8)
    text = sentences(1)[0] * 5
    assert hf.encode(text).ids == encode_texts(tokenizer(), [text], 8)["tokens"][0].tolist()


def test_the_configuration_names_the_special_ids():
    content = tokenizer_json(tokenizer())
    found, vocab = tokenizer_config(tokenizer(), content, 512), content["model"]["vocab"]
    assert [vocab[found[f"{name}_token"]] for name in ("pad", "unk", "bos", "eos")] == [0, 1, 2, 3]
    assert found["model_max_length"] == 512 and found["split_special_tokens"] is True


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data here")
@pytest.mark.parametrize("part", ["lm", "pairs"])
def test_ids_are_those_of_sentencepiece_on_real_text(part):
    lines = 0
    for file in sorted((SHARED / part).glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as opened:
            texts = [line for _, line in zip(range(60), opened)]
        lines += len(texts)
        for ours, theirs in zip(tokenizer().encode_batch(texts), converted().encode_batch(texts, add_special_tokens=False)):
            assert theirs.ids == ours
    assert lines > 100


@pytest.mark.parametrize("change, words", [
    (lambda m: setattr(m.normalizer_spec, "add_dummy_prefix", True), "adds a space before a text"),
    (lambda m: setattr(m.normalizer_spec, "remove_extra_whitespaces", True), "removes white space"),
    (lambda m: setattr(m.trainer_spec, "model_type", m.trainer_spec.UNIGRAM), "not bpe"),
    (lambda m: setattr(m.pieces[-1], "type", m.pieces[-1].USER_DEFINED), "user-defined"),
    (lambda m: [setattr(p, "score", -1.0) for p in m.pieces], "same score"),
    (lambda m: m.pieces.add(piece="\u4e00\u4e01", score=-9999.0), "no pieces themselves"),
])
def test_what_cannot_be_the_same_is_refused(change, words):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer().model_bytes)
    change(model)
    with pytest.raises(DataError, match=words):
        tokenizer_json(Tokenizer(model.SerializeToString()))
