"""Every accepted dialect gives the one record its kind promises; everything else is refused with its reason."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conan_jax.data.dialects import DIALECTS
from conan_jax.data.schema import KINDS, REASONS, Reject, check_fields, is_blank, parse
from conan_jax.errors import ConfigError

PAIR = {"query": "q", "pos": "p", "instruction": ""}
RETRIEVAL = {"query": "q", "pos": ["p"], "neg": ["n1", "n2"], "scores": [], "instruction": ""}
SYSTEM, USER, ANSWER = ({"role": r, "content": c} for r, c in (("system", "i"), ("user", "x"), ("assistant", "o")))
STS = {"sentence1": "a", "sentence2": "b", "score": 2.5}

ACCEPTED = [
    ("text", {"text": "a  b"}, {"text": "a  b"}),
    ("text", {"content": "a", "title": "t"}, {"text": "a"}),
    ("sft", {"instruction": "i", "input": "x", "output": "o"}, {"instruction": "i", "input": "x", "output": "o"}),
    ("sft", {"instruction": "i", "output": "o"}, {"instruction": "i", "input": "", "output": "o"}),
    ("sft", {"instruction": "", "input": "x", "output": "o"}, {"instruction": "", "input": "x", "output": "o"}),
    ("sft", {"instruction": "i", "context": "x", "response": "o", "category": "c"}, {"instruction": "i", "input": "x", "output": "o"}),
    ("sft", {"prompt": "i", "completion": "o"}, {"instruction": "i", "input": "", "output": "o"}),
    ("pair", {"query": "q", "pos": ["p"], "neg": ["n"]}, PAIR),
    ("pair", {"query": "q", "pos": "p", "prompt": "find"}, PAIR | {"instruction": "find"}),
    ("pair", {"query": "q", "positive_passages": [{"docid": "7", "title": "T", "text": "p"}]}, PAIR | {"pos": "T p"}),
    ("pair", {"query": "q", "positive": "p", "negative": "n"}, PAIR),
    ("pair", {"anchor": "q", "positive": "p"}, PAIR),
    ("pair", {"sent0": "q", "sent1": "p", "hard_neg": "n"}, PAIR),
    ("pair", {"question": "q", "answer": "p"}, PAIR),
    ("pair", {"question": "q", "context": "p"}, PAIR),
    ("pair", {"title": "q", "text": "p", "url": "u"}, PAIR),
    ("pair", {"sentence1": "q", "sentence2": "p"}, PAIR),
    ("pair", {"instruction": "i", "input": "x", "output": "p"}, PAIR | {"query": "i\nx"}),
    ("pair", {"instruction": "i", "input": "", "output": "p"}, PAIR | {"query": "i"}),
    ("pair", {"instruction": "i", "context": "x", "response": "p"}, PAIR | {"query": "i\nx"}),
    ("pair", {"set": ["q", "p"]}, PAIR),
    ("pair", {"premise": "q", "hypothesis": "p"}, PAIR),
    *[("pair", {"premise": "q", "hypothesis": "p", "label": label}, PAIR)
      for label in ("entailment", "Entailment", b"entailment", 0, 0.0, "0", None)],
    ("pair", {"premise": "q", "entailment": "p", "contradiction": "n1"}, PAIR),
    ("pair", {"query_id": "1", "query_text": "q", "positive_passages": [{"docid": "7", "text": "p"}]}, PAIR),
    ("pair", {"messages": [SYSTEM, USER, ANSWER]}, PAIR | {"query": "i\nx", "pos": "o"}),
    ("pair", {"messages": [USER, ANSWER], "prompt": "x"}, PAIR | {"query": "x", "pos": "o"}),
    ("sft", {"messages": [SYSTEM, USER, ANSWER]}, {"instruction": "i", "input": "x", "output": "o"}),
    ("sft", {"messages": [USER, ANSWER], "prompt": "x", "prompt_id": "1"}, {"instruction": "x", "input": "", "output": "o"}),
    ("sft", {"messages": [{"role": "system", "content": ""}, USER, ANSWER]}, {"instruction": "", "input": "x", "output": "o"}),
    ("sft", {"messages": [SYSTEM, USER, ANSWER, {"role": "user", "content": "x2"}, {"role": "assistant", "content": "o2"}]},
     {"instruction": "i", "input": "x\no\nx2", "output": "o2"}),
    ("retrieval", {"set": ["q", "p", "p2"]}, RETRIEVAL | {"pos": ["p", "p2"], "neg": []}),
    ("retrieval", {"premise": "q", "entailment": "p", "neutral": "m", "contradiction": ["n1", "n2"]}, RETRIEVAL),
    ("retrieval", {"query_id": "1", "query_text": "q", "positive_document_ids": ["7"], "negative_document_ids": ["8", "9"],
                   "positive_documents": [{"docid": "7", "text": "p"}], "negative_documents": ["n1", "n2"]}, RETRIEVAL),
    ("retrieval", {"query": "q", "pos": ["p"], "neg": ["n1", "n2"], "type": "normal", "pos_scores": [1.0]}, RETRIEVAL),
    ("retrieval", {"query": "q", "pos": "p", "neg": None}, RETRIEVAL | {"neg": []}),
    ("retrieval", {"query": "q", "pos": ["p"], "neg": []}, RETRIEVAL | {"neg": []}),
    ("retrieval", {"query": "q", "pos": ["p"], "neg": ["n1", "n2"], "neg_scores": [2, 1.5]}, RETRIEVAL | {"scores": [2.0, 1.5]}),
    ("retrieval", {"query": "q", "pos": ["p"], "neg": ["n2", "n1"], "scores": [1, 9]}, RETRIEVAL | {"scores": [9.0, 1.0]}),
    ("retrieval", {"query_id": "1", "query": "q", "positive_passages": [{"docid": "1", "title": "", "text": "p"}],
                   "negative_passages": [{"docid": "2", "title": "", "text": "n1"}, {"docid": "3", "title": None, "text": "n2"}]},
     RETRIEVAL),
    ("retrieval", {"query": "q", "positive": ["p"], "negative": ["n1", "n2"]}, RETRIEVAL),
    ("retrieval", {"anchor": "q", "positive": "p", "negative_2": "n2", "negative_1": "n1"}, RETRIEVAL),
    ("retrieval", {"anchor": "q", "positive": "p", **{f"negative_{i}": str(i) for i in (10, 9, 2)}},
     RETRIEVAL | {"neg": ["2", "9", "10"]}),
    ("retrieval", {"anchor": "q", "positive": "p", "negative": "n1", "negative_1": "n2", "negative_2": ""}, RETRIEVAL),
    ("sts", {"sentence1": "a", "sentence2": "b", "score": 2.5}, STS),
    ("sts", {"sentence1": b"a", "sentence2": b"b", "label": "2.5"}, STS),
    ("sts", {"sentence_A": "a", "sentence_B": "b", "relatedness_score": 2.5}, STS),
    ("sts", {"text1": "a", "text2": "a", "score": 5}, {"sentence1": "a", "sentence2": "a", "score": 5.0}),
    ("labelled", {"text": "t", "label": "l"}, {"text": "t", "label": "l"}),
    ("labelled", {"text": "t", "label": 3}, {"text": "t", "label": "3"}),
    ("labelled", {"text": "t", "label": 3, "label_text": "three"}, {"text": "t", "label": "three"}),
]


@pytest.mark.parametrize(("kind", "raw", "record"), ACCEPTED)
def test_accepted_dialects(kind, raw, record):
    parsed = parse(raw, kind)
    assert parsed.record == record
    assert list(parsed.record) == list(KINDS[kind])
    assert parsed.dialect in {d.name for d in DIALECTS[kind]}
    assert not parsed.dropped


REJECTED = [
    ("text", ["a"], "wrong_type"),
    ("text", "a", "wrong_type"),
    ("text", {"txt": "a"}, "missing_field"),
    ("text", {"text": None}, "missing_field"),
    ("text", {"text": None, "content": "c"}, "missing_field"),
    ("text", {"text": ""}, "empty_text"),
    ("text", {"text": " \t\r\n\u3000"}, "empty_text"),
    ("text", {"text": "\u200b\ufeff"}, "empty_text"),
    ("text", {"text": 5}, "wrong_type"),
    ("text", {"text": ["a"]}, "wrong_type"),
    ("text", {"text": "a\0b"}, "nul"),
    ("text", {"text": "a\ud800"}, "invalid_utf8"),
    ("text", {"text": b"a\xff"}, "invalid_utf8"),
    ("sft", {"instruction": "i", "input": "x"}, "missing_field"),
    ("sft", {"instruction": " ", "input": "", "output": "o"}, "empty_text"),
    ("sft", {"instruction": "i", "output": ""}, "empty_text"),
    ("pair", {"query": "q"}, "missing_field"),
    ("pair", {"sentence1": "a", "sentence2": "b", "score": 0.5}, "missing_field"),
    ("pair", {"query": "q", "pos": []}, "missing_field"),
    ("pair", {"query": "q", "pos": [3]}, "wrong_type"),
    ("pair", {"query": "q", "pos": " q\n"}, "positive_equals_query"),
    ("pair", {"query": "q", "title": "t", "text": "x"}, "missing_field"),
    ("pair", {"query": None, "title": "t", "text": "x"}, "missing_field"),
    ("pair", {"query": "q", "pos": {"body": "p"}}, "wrong_type"),
    ("pair", {"set": ["q"]}, "missing_field"),
    ("pair", {"set": "q p"}, "wrong_type"),
    ("pair", {"set": ["q", None]}, "wrong_type"),
    ("pair", {"set": ["q", "q "]}, "positive_equals_query"),
    *[("pair", {"premise": "q", "hypothesis": "p", "label": label}, "not_positive")
      for label in ("neutral", "contradiction", 1, 2, -1, "")],
    ("pair", {"premise": "q", "hypothesis": "p", "gold_label": "neutral"}, "not_positive"),
    ("pair", {"sentence1": "q", "sentence2": "p", "gold_label": "contradiction"}, "missing_field"),
    ("pair", {"sentence1": "q", "sentence2": "p", "is_duplicate": 0}, "missing_field"),
    ("sft", {"messages": []}, "missing_field"),
    ("sft", {"messages": [ANSWER]}, "missing_field"),
    ("sft", {"messages": [USER, ANSWER, USER]}, "missing_field"),
    ("sft", {"messages": [USER, {"role": "assistant", "content": None}]}, "missing_field"),
    ("sft", {"messages": [USER, {"content": "o"}]}, "missing_field"),
    ("sft", {"messages": [USER, {"role": "assistant", "content": " "}]}, "empty_text"),
    ("sft", {"messages": [USER, {"role": "tool", "content": "5"}, ANSWER]}, "wrong_type"),
    ("sft", {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "wrong_type"),
    ("sft", {"messages": [USER, {"role": ["assistant"], "content": "o"}]}, "wrong_type"),
    ("sft", {"messages": "[]"}, "wrong_type"),
    ("retrieval", {"query": "q", "pos": []}, "missing_field"),
    ("retrieval", {"query": "q", "pos": ["p", "q"]}, "positive_equals_query"),
    ("retrieval", {"query": "q", "pos": ["p", ""]}, "empty_text"),
    ("retrieval", {"query": "q", "pos": ["p"], "neg": ["n", ""]}, "empty_text"),
    ("retrieval", {"query": "q", "pos": ["p"], "neg": ["n", None]}, "wrong_type"),
    ("retrieval", {"query": "q", "pos": ["p"], "neg": ["n"], "scores": [1, 2]}, "length_mismatch"),
    ("retrieval", {"query": "q", "pos": ["p"], "neg": ["n"], "scores": [math.nan]}, "wrong_type"),
    ("sts", {"sentence1": "a", "sentence2": "b", "score": math.inf}, "wrong_type"),
    ("sts", {"sentence1": "a", "sentence2": "b", "score": 1e39}, "wrong_type"),
    ("sts", {"sentence1": "a", "sentence2": "b", "score": 10**400}, "wrong_type"),
    ("sts", {"sentence1": "a", "sentence2": "b", "score": True}, "wrong_type"),
    ("sts", {"sentence1": "a", "sentence2": "b", "score": "nan"}, "wrong_type"),
    ("sts", {"sentence1": "a", "sentence2": "b", "score": "high"}, "wrong_type"),
    ("sts", {"sentence1": "a", "sentence2": "b", "score": ""}, "wrong_type"),
    ("labelled", {"text": "t", "label": 1.5}, "wrong_type"),
    ("labelled", {"text": "t", "label": ""}, "empty_text"),
    ("labelled", {"text": "t"}, "missing_field"),
]


@pytest.mark.parametrize(("kind", "raw", "reason"), REJECTED)
def test_rejects_with_their_reason(kind, raw, reason):
    with pytest.raises(Reject) as caught:
        parse(raw, kind)
    assert caught.value.reason == reason
    assert caught.value.detail


def test_every_reason_of_a_parsed_record_is_tried():
    read_only = {"broken_json", "broken_row", "repeated_key", "quoted_cell", "too_long"}
    assert {reason for *_, reason in REJECTED} == set(REASONS) - read_only


def test_pool_entries_that_are_not_negatives_are_left_out_and_counted():
    raw = {"query": "q", "pos": ["p", "p2", "p "], "neg": ["n1", "p", "n2", " q", "n1", "p2"], "scores": [6, 5, 4, 3, 2, 1]}
    record, _, dropped = parse(raw, "retrieval")
    assert record == {"query": "q", "pos": ["p", "p2"], "neg": ["n1", "n2"], "scores": [6.0, 4.0], "instruction": ""}
    assert dropped == {"negative_equals_positive": 2, "negative_equals_query": 1, "repeated_negative": 1, "repeated_positive": 1}


def test_ids_of_documents_say_which_texts_are_missing():
    raw = {"query_id": "1", "query_text": "q", "positive_document_ids": ["7"], "negative_document_ids": []}
    for kind in ("pair", "retrieval"):
        for query in ("query_text", "query"):
            with pytest.raises(Reject, match="(?s)missing_field.*positive_document_ids.*negative_document_ids.*corpus.*positive_passages"):
                parse({query: raw["query_text"], **raw}, kind)
    assert parse(raw | {"text": "p"}, "pair", {"pos": "text"}).record["pos"] == "p"


def test_a_set_as_pair_counts_its_further_texts():
    record, dialect, dropped = parse({"set": ["q", "p", "p2"]}, "pair")
    assert (record["query"], record["pos"], dialect, dropped) == ("q", "p", "set", {"further_positive": 1})


def test_many_columns_are_named_in_a_short_message():
    with pytest.raises(Reject) as caught:
        parse({f"column {i} {'x' * 500}": i for i in range(5000)}, "text")
    assert len(caught.value.detail) < 2000 and "5,000" in caught.value.detail


def test_fields_that_the_dialect_lacks_are_read():
    raw = {"prompt": "i", "completion": "o", "ctx": "x"}
    assert parse(raw, "sft", {"input": "ctx"}).record == {"instruction": "i", "input": "x", "output": "o"}
    raw = {"premise": "q", "hypothesis": "p", "others": ["n1", "n2"]}
    assert parse(raw, "retrieval", {"neg": "others"}).record == RETRIEVAL
    chat = {"messages": [SYSTEM, USER, ANSWER], "answer": "o2"}
    with pytest.raises(Reject, match="missing_field"):
        parse(chat, "sft", {"output": "answer"})
    assert parse(chat, "sft", {"instruction": "messages.1.content", "output": "answer"}).record["output"] == "o2"


def test_a_pair_takes_the_first_positive_and_counts_the_others():
    record, _, dropped = parse({"query": "q", "pos": ["p", "p2", "p3"]}, "pair")
    assert record["pos"] == "p" and dropped == {"further_positive": 2}


def test_fields_map_columns_and_dotted_paths():
    raw = {"id": 1, "question": "q", "answers": {"text": ["p", "p2"], "answer_start": [0, 4]}, "ctxs": [{"title": "t", "text": "n"}]}
    fields = {"query": "question", "pos": "answers.text.0", "neg": "ctxs"}
    assert parse(raw, "retrieval", fields).record == {"query": "q", "pos": ["p"], "neg": ["t n"], "scores": [], "instruction": ""}
    assert parse({"a.b": "x", "a": {"b": "y"}}, "text", {"text": "a.b"}).record == {"text": "x"}
    with pytest.raises(Reject, match="answers.text.5"):
        parse(raw, "pair", {"query": "question", "pos": "answers.text.5"})


@pytest.mark.parametrize(("column", "raw", "text", "left_out"), [
    ("a+b", {"a": "x", "b": "y"}, "x\ny", {}),
    ("b+a+c.d", {"a": b"x", "b": " ", "c": {"d": "z"}}, "x\nz", {}),
    ("a+b", {"a": None, "b": "y"}, "y", {"no_pos:a": 1}),
    ("a+b", {"a+b": "one", "a": "x", "b": "y"}, "one", {}),
    ("C+++a", {"C++": "x", "a": "y"}, "x\ny", {}),
    ("m.C++", {"m": {"C++": "x"}}, "x", {}),
    ("a+b", {"a": {"title": "t", "text": "x"}, "b": "y"}, "t x\ny", {})])
def test_a_text_of_several_columns(column, raw, text, left_out):
    for kind, pos in (("pair", text), ("retrieval", [text])):
        parsed = parse(raw | {"query": "q"}, kind, {"pos": column})
        assert parsed.record["pos"] == pos and parsed.dropped == left_out


@pytest.mark.parametrize(("raw", "reason"), [
    ({}, "missing_field"), ({"a": "", "b": " "}, "empty_text"), ({"a": "x", "b": 1}, "wrong_type"), ({"a": "x", "b": ["y"]}, "wrong_type")])
def test_several_columns_without_a_text(raw, reason):
    with pytest.raises(Reject) as caught:
        parse(raw | {"query": "q"}, "pair", {"pos": "a+b"})
    assert caught.value.reason == reason


def test_fields_may_map_a_part_of_a_dialect():
    raw = {"headline": "q", "pos": ["p"], "neg": ["n"], "query": "other"}
    assert parse(raw, "retrieval", {"query": "headline"}).record["query"] == "q"
    assert parse(raw, "retrieval", {"query": "headline"}).record["neg"] == ["n"]


def test_an_optional_field_that_fields_maps_is_counted_when_absent():
    parsed = parse({"query": "q", "pos": "p", "neg": ["n"]}, "retrieval", {"neg": "negs"})
    assert parsed.record["neg"] == []
    assert parsed.dropped == {"no_neg": 1}


@pytest.mark.parametrize("score", ["1_0", b"1_0", "\uff11", "1,5", "0x1p3", "infinity", "1e999", "", "1 2"])
def test_a_text_that_only_python_reads_as_a_number_is_none(score):
    with pytest.raises(Reject, match="wrong_type"):
        parse({"sentence1": "a", "sentence2": "b", "score": score}, "sts")


@pytest.mark.parametrize(("score", "value"), [(" 1.5 ", 1.5), ("-.5e1", -5.0), (b"+3.", 3.0), (7, 7.0)])
def test_numbers_as_texts(score, value):
    assert parse({"sentence1": "a", "sentence2": "b", "score": score}, "sts").record["score"] == value


@pytest.mark.parametrize(("kind", "fields", "said"), [
    ("pair", {"positive": "x"}, "query, pos, instruction"), ("pairs", {}, "unknown record kind"),
    ("pair", {"query": ""}, "must name a column")])
def test_check_fields_refuses(kind, fields, said):
    with pytest.raises(ConfigError, match=said):
        check_fields(kind, fields)


_names = st.sampled_from(sorted({str(c) for ds in DIALECTS.values() for d in ds for c in d.required.values() if isinstance(c, str)}
                                | {"neg", "scores", "input", "negative_1", "prompt", "messages", "set", "label"}))
_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4) | st.binary(max_size=3)
_values = st.recursive(_scalars, max_leaves=5, extend=lambda v: st.lists(v, max_size=3)
                       | st.dictionaries(st.sampled_from(["text", "title", "x"]), v, max_size=2))


@given(raw=st.dictionaries(_names, _values, max_size=5), kind=st.sampled_from(sorted(KINDS)))
def test_any_record_is_whole_or_rejected(raw, kind):
    try:
        record = parse(raw, kind).record
    except Reject:
        return
    assert list(record) == list(KINDS[kind])
    may_be_empty = {"instruction", "input", "neg", "scores"}
    for name, value in record.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                assert "\0" not in item and item.encode("utf-8").decode("utf-8") == item
                assert name in may_be_empty - {"neg"} or not is_blank(item)
            else:
                assert type(item) is float and math.isfinite(item)
    if kind == "retrieval":
        assert record["pos"] and not set(record["neg"]) & {record["query"], *record["pos"]}
        assert not record["scores"] or len(record["scores"]) == len(record["neg"])
        assert record["scores"] == sorted(record["scores"], reverse=True)
    json.dumps(record, allow_nan=False)
