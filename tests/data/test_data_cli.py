"""`conan data build` and `conan data inspect`, as a person and as a program would use them."""

import json
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from conan_jax.cli.data import app
from conan_jax.data.sources import open_source
from conan_jax.errors import ConfigError, DataError

CSV = "title,body\nfirst,one\nsecond,two\nthird,three\n"


def conan(*args):
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(CSV)
    return path


def test_build_with_fields_then_inspect(tmp_path, csv):
    out = tmp_path / "my set"
    said = conan("build", csv, "--kind", "pair", "--field", "query=title", "--field", "pos=body", "--out", out)
    assert "3" in said and "pair" in said
    assert open_source(out)[1] == {"query": "second", "pos": "two", "instruction": ""}
    shown = conan("inspect", out, "--head", "2", "--verify")
    assert "second" in shown and "third" not in shown and "shards match" in shown


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_two_columns_of_one_field_as_the_error_says(tmp_path, suffix):
    rows = [{"name": f"n{i}", "the title": f"t{i}", "body": f"b{i}"} for i in range(3)]
    source = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    elif suffix == "csv":
        source.write_text("name,the title,body\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["build", source, "--kind", "pair", "--field", "query=name", "--out", tmp_path / "out"]
    with pytest.raises(ConfigError) as caught:
        conan(*args, "--field", "pos=the title", "--field", "pos=body")
    conan(*args, *shlex.split(str(caught.value)[str(caught.value).index("--field ", 1):]))
    assert [record["pos"] for record in open_source(tmp_path / "out")] == ["t0\nb0", "t1\nb1", "t2\nb2"]


def test_json_is_the_manifest_and_nothing_else(tmp_path, csv):
    manifest = json.loads(conan("build", csv, csv, "--kind", "pair", "--out", tmp_path / "out", "--num-shards", "2", "--json"))
    assert manifest["records"] == 3 and len(manifest["shards"]) == 2 and manifest["dialects"] == {"title-body": 3}
    inspected = json.loads(conan("inspect", tmp_path / "out", "--json", "--head", "1"))
    assert inspected.pop("head") == [{"query": "first", "pos": "one", "instruction": ""}]
    assert inspected.pop("contents")["records"] == 3 and inspected == manifest


def test_rejects_are_pointed_to(tmp_path, csv):
    csv.write_text(CSV + "fourth,\n")
    with pytest.raises(DataError, match="1 of the 4 [^$]* 1 empty_text"):
        conan("build", csv, "--kind", "pair", "--out", tmp_path / "out")
    said = conan("build", csv, "--kind", "pair", "--out", tmp_path / "out", "--max-reject-rate", "0.3")
    assert "1 bad records" in said and "25.00%" in said
    assert conan("build", csv, "--kind", "pair", "--out", tmp_path / "out", "--limit", "2", "--json").count("empty_text") == 0


def test_a_second_build_says_what_became_of_the_first(tmp_path, csv):
    def said(*more):
        return " ".join(CliRunner().invoke(app, ["build", str(csv), "--kind", "pair", "--out", str(tmp_path / "o"), *more]).stderr.split())

    assert "conan:" not in said()
    assert "already built from this source; nothing to do" in said()
    limited = said("--limit", "2")
    assert "its 3 pair records" in limited and "nothing to do" not in limited
    assert "100%" in limited and "2 records" in limited


def test_preset_from_a_file_with_an_override(tmp_path, csv):
    presets = tmp_path / "p.yaml"
    presets.write_text(f"mine: {{kind: pair, source: '{csv}', fields: {{query: body, pos: title}}, limit: 1}}")
    conan("build", "--preset", "mine", "--presets", presets, "--out", tmp_path / "out", "--limit", "2")
    assert [r["query"] for r in open_source(tmp_path / "out")] == ["one", "two"]


@pytest.mark.parametrize(("args", "said"), [
    (["--kind", "pair"], "name at least one SOURCE"), (["a.csv"], "say what the records are"),
    (["a.csv", "--kind", "pears"], "unknown record kind"),
    (["a.csv", "--kind", "pair", "--field", "query"], "must be OURS=COLUMN"),
    (["a.csv", "--kind", "pair", "--field", "q=title"], "fields maps 'q'"),
    (["--preset", "stbs"], "did you mean stsb"), (["a.csv", "--kind", "pair", "--limit", "0"], "limit must be positive"),
    (["a.csv", "--kind", "pair", "--max-reject-rate", "7"], "max_reject_rate")])
def test_mistakes_say_what_to_do(tmp_path, args, said):
    with pytest.raises(ConfigError, match=said):
        conan("build", *args, "--out", tmp_path / "out")


@pytest.mark.parametrize(("command", "example"), [("build", "--field query=title"), ("inspect", "--head 10 --verify")])
def test_help_has_examples(command, example):
    assert example in conan(command, "--help")


def test_inspect_counts_html_duplicates_and_scores(tmp_path):
    rows = [{"query": "a &amp; b &lt;", "pos": ["<b>p</b>", "List<int> && c"], "neg": ["n"], "scores": [1]},
            {"query": "q", "pos": ["p"], "neg": []}]
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows, rows[1], {"query": "q", "pos": ["p2"]}]))
    build = ("build", source, "--kind", "retrieval", "--out", out)
    conan(*build)
    contents = json.loads(conan("inspect", out, "--json"))["contents"]
    assert contents == {"records": 6, "entities": 4, "tags": 4, "with_html": 2, "duplicates": 3, "with_scores": 2}
    assert "--clean html" in conan("inspect", out) and "contents" not in json.loads(conan("inspect", out, "--json", "--no-count"))
    conan(*build, "--clean", "html")
    assert json.loads(conan("inspect", out, "--json"))["contents"] == contents | {"entities": 0, "tags": 0, "with_html": 0}
    assert "--clean html" not in conan("inspect", out)


def test_inspect_of_nothing(tmp_path):
    with pytest.raises(DataError, match="is not a built dataset"):
        conan("inspect", tmp_path / "none")


def test_texts_that_look_like_markup_are_shown_as_they_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "[/red] [bold]x"}')
    conan("build", tmp_path / "a.jsonl", "--kind", "text", "--out", tmp_path / "out")
    assert "[/red] [bold]x" in conan("inspect", tmp_path / "out")
