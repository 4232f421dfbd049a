"""HTML is taken out of texts, and what only looks like it stays."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conan_jax.config import Dataset
from conan_jax.data.convert import build_dataset
from conan_jax.data.markup import strip_html
from conan_jax.data.sources import open_source
from conan_jax.errors import ConfigError


@pytest.mark.parametrize(("text", "clean", "entities", "tags"), [
    ("a &amp; b &#39;x&#x27; &lt;i&gt;", "a & b 'x' <i>", 5, 0),
    ("<p>One</p><a title='a>b' href=x>two</a> <B>bold</B>", "One\ntwo bold", 0, 6),
    ("x<script>var a = '<p>';</script>y<style>p{}</style><!-- c -->z", "xyz", 0, 6),
    ("&amp;lt;b&amp;gt;", "&lt;b&gt;", 2, 0),
])
def test_html_is_taken_out_and_counted(text, clean, entities, tags):
    assert strip_html(text) == (clean, entities, tags)


@pytest.mark.parametrize("text", [
    "a < b and List<int> x</Int>", "AT&T &copy=1 &unknown;", "a <b", "use <script", "a <!-- b", "<![CDATA[x]]> <?php ?> <!foo>", " a  b ", "a<3 && b>2"])
def test_what_only_looks_like_html_stays(text):
    assert strip_html(text) == (text, 0, 0)


@given(st.lists(st.sampled_from(["<", "</", ">", "!--", "-->", "<![", "]", "b", "script", "&", "&lt;", "\"", "=", " ", "?", "/", "doctype"]), max_size=25))
def test_any_text_has_a_clean_form(parts):
    clean = strip_html("".join(parts))
    assert clean.tags or clean.entities or clean.text == "".join(parts)


def test_a_dataset_is_cleaned_before_its_texts_are_compared_and_is_another_dataset(tmp_path):
    rows = [{"query": "a &amp; b", "pos": ["<b>p</b>", "p"], "neg": [{"title": "<i>T</i>", "text": "n"}, "a & b"]},
            {"query": "q", "pos": ["<br>"], "neg": []}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = Dataset("a", "retrieval", str(tmp_path / "a.jsonl"), max_reject_rate=0.5)
    clean = Dataset("a", "retrieval", str(tmp_path / "a.jsonl"), max_reject_rate=0.5, clean="html")
    assert "clean" not in build_dataset(raw, tmp_path / "out").settings  # datasets built before there was the setting stay the same
    manifest = build_dataset(clean, tmp_path / "out")
    assert manifest.settings["clean"] == "html"
    assert manifest.dropped == {"html": 1, "negative_equals_query": 1, "repeated_positive": 1} and manifest.rejects == {"empty_text": 1}
    assert open_source(tmp_path / "out")[0] == {"query": "a & b", "pos": ["p"], "neg": ["T n"], "scores": [], "instruction": ""}
    with pytest.raises(ConfigError, match="clean must be 'html'"):
        Dataset("a", "text", "x", clean="xml")
