"""Each format yields its records with their places, and says what is wrong with a file that cannot be read."""

import bz2
import datetime
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conan_jax.data import readers
from conan_jax.data.schema import Reject
from conan_jax.errors import DataError


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(source, fields=None):
    return list(readers.read(readers.expand(str(source)), fields))


def raws(source, fields=None):
    return [item.raw for item in read(source, fields)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.ndjson"])
def test_jsonl(tmp_path, name):
    path = write(tmp_path / name, '\ufeff{"text": "a"}\r\n\n{"text": "b\\u0000"}\n  \n{"text": "日本"}')
    items = read(path)
    assert [i.raw for i in items] == [{"text": "a"}, {"text": "b\0"}, {"text": "日本"}]
    assert [i.location for i in items] == [f"{path}:1", f"{path}:3", f"{path}:5"]
    assert items[-1].done == path.stat().st_size


@pytest.mark.parametrize(("line", "reason"), [
    (b'{"a": ', "broken_json"), (b"nonsense", "broken_json"), (b'{"a": "\xff"}', "invalid_utf8"), (b'{"a": "\0"}', "nul"),
    (b"[" * 100_000, "broken_json"), (b'{"a": ' + b"9" * 5000 + b"}", "broken_json"), (b'{"a": 1} {"b": 2}', "broken_json")])
def test_a_bad_line_is_one_reject_and_reading_goes_on(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", b'{"n": 1}\n' + line + b'\n{"n": 3}\n')
    first, bad, last = read(path)
    assert (first.raw, last.raw) == ({"n": 1}, {"n": 3})
    assert isinstance(bad.raw, Reject) and bad.raw.reason == reason and bad.location == f"{path}:2"
    assert bad.raw.raw.startswith(line[:3].decode("utf-8", "replace"))


def test_an_overlong_line_is_skipped_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 100)
    path = write(tmp_path / "a.jsonl", json.dumps({"t": "x" * 1000}) + '\n{"t": "ok"}\n')
    long, ok = read(path)
    assert long.raw.reason == "too_long" and ok.raw == {"t": "ok"} and ok.location == f"{path}:2"


def test_a_truncated_gzip_is_an_error_with_its_place(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", "".join(json.dumps({"n": i}) + "\n" for i in range(5000)))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is truncated or damaged after line [1-9]"):
        read(path)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match="truncated or damaged after line 0"):
        read(path)


def zstd(data):
    return pa.Codec("zstd").compress(data).to_pybytes()


@pytest.mark.parametrize(("suffix", "compress"), [
    (".gz", gzip.compress), (".GZ", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)])
def test_compressed_files(tmp_path, suffix, compress):
    lines = "".join(json.dumps({"n": i}) + "\n" for i in range(3000)).encode()
    path = tmp_path / f"a.JSONL{suffix}"
    path.write_bytes(compress(b"\xef\xbb\xbf" + lines) + compress(lines))
    items = read(tmp_path)
    assert [item.raw["n"] for item in items] == [*range(3000), *range(3000)]
    assert items[-1].done == path.stat().st_size and items[3000].location == f"{path}:3001"
    for damaged in (compress(lines)[:-20], b"not compressed", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged|empty"):
            read(path)
    plain = tmp_path / "b.csv"
    plain.write_bytes(compress(lines))
    with pytest.raises(DataError, match=rf"b\.csv{suffix.lower()}"):
        read(plain)


def test_only_line_feeds_end_a_line(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    assert raws(write(tmp_path / "a.txt", f"{text}\r\n{text}"), {"text": "line"}) == [{"line": text}] * 2
    assert raws(write(tmp_path / "a.jsonl", json.dumps({"t": text}, ensure_ascii=False) + "\n")) == [{"t": text}]
    assert raws(write(tmp_path / "a.csv", f"t,u\n{text},1\n")) == raws(write(tmp_path / "a.tsv", f"t\tu\n{text}\t1\n")) == [{"t": text, "u": "1"}]


@pytest.mark.parametrize(("line", "key"), [('{"a": 1, "b": 2, "a": 3}', "a"), ('{"x": [{"c": 1, "c": 1}]}', "c")])
def test_a_key_given_twice_is_a_reject_that_names_it(tmp_path, line, key):
    _, bad = raws(write(tmp_path / "a.jsonl", f'{{"a": 1}}\n{line}\n'))
    assert bad.reason == "repeated_key" and repr(key) in bad.detail


def test_a_quoted_tsv_is_read_with_its_quotes_or_not_at_all(tmp_path):
    assert raws(write(tmp_path / "a.tsv", '"a"\t"b"\n"x\ty"\t"say ""hi"""\n1\t2\n')) == [{"a": "x\ty", "b": 'say "hi"'}, {"a": "1", "b": "2"}]
    first, second, third = raws(write(tmp_path / "b.tsv", 'a\tb\n"say ""hi"""\ty\n"x, y"\tz\n"x" or "y"\tz"\n'))
    assert (first.reason, second.reason) == ("quoted_cell", "quoted_cell")
    assert third == {"a": '"x" or "y"', "b": 'z"'}


def test_arrays_on_lines_are_rejects_of_their_own_and_not_one_json_array(tmp_path):
    assert raws(write(tmp_path / "a.jsonl", '["q", "p"]\n["q2", "p2"]\n')) == [["q", "p"], ["q2", "p2"]]
    for whole in ('[{"a": 1}, {"a": 2}]', '[\n{"a": 1},\n{"a": 2}\n]', "[]"):
        with pytest.raises(DataError, match=r"jq -c '\.\[\]'"):
            read(write(tmp_path / "a.json", whole))
    with pytest.raises(DataError, match=r"jq -c \. "):
        read(write(tmp_path / "a.json", '{\n"a": 1\n}\n'))


@pytest.mark.parametrize(("data", "said"), [
    (b'[{"a": 1}]', "jq -c"), ("é".encode("utf-16"), "iconv -f UTF-16"), ("é".encode("utf-32"), "iconv -f UTF-32")])
def test_other_encodings_and_json_arrays_say_how_to_convert(tmp_path, data, said):
    with pytest.raises(DataError, match=said):
        read(write(tmp_path / "a.jsonl", data))


def test_csv(tmp_path):
    path = write(tmp_path / "a.csv.gz", '\ufefftitle,body\r\n"a, ""b""","x\ny"\r\nc,d\r\n\r\ne\r\nf,g\r\n')
    items = read(path)
    assert [i.raw for i in items if not isinstance(i.raw, Reject)] == [
        {"title": 'a, "b"', "body": "x\ny"}, {"title": "c", "body": "d"}, {"title": "f", "body": "g"}]
    assert [i.location.rsplit(":", 1)[1] for i in items] == ["2", "4", "6", "7"]
    assert items[2].raw.reason == "broken_row" and items[2].raw.raw == "e"


def test_csv_with_bad_bytes_leaves_them_to_the_schema(tmp_path):
    from conan_jax.data.schema import parse

    bad, good = raws(write(tmp_path / "a.csv", b"text\na\xff\nb\n"))
    with pytest.raises(Reject, match="invalid_utf8"):
        parse(bad, "text")
    assert parse(good, "text").record == {"text": "b"}


def test_csv_with_an_unclosed_quote_does_not_swallow_the_file(tmp_path):
    with pytest.raises(DataError, match="quote opened at or after line 3"):
        read(write(tmp_path / "a.csv", 'a,b\n1,2\n"3,4\n5,6\n7,8\n'))


@pytest.mark.parametrize(("data", "said"), [("", "empty"), ("a,a\n1,2\n", "twice")])
def test_tables_need_a_good_header(tmp_path, data, said):
    with pytest.raises(DataError, match=said):
        read(write(tmp_path / "a.csv", data))


def test_tsv_has_no_quotes(tmp_path):
    assert raws(write(tmp_path / "a.tsv", 'a\tb\n"x\ty"\n')) == [{"a": '"x', "b": 'y"'}]


@pytest.mark.parametrize(("unit", "texts", "lines"), [
    (None, ["one\ntwo", "  three", "four"], [1, 5, 7]),
    ("paragraph", ["one\ntwo", "  three", "four"], [1, 5, 7]),
    ("line", ["one", "two", "  three", "four"], [1, 2, 5, 7]),
    ("file", ["one\ntwo\n\n \n  three\n\nfour"], [1])])
def test_plain_text_units(tmp_path, unit, texts, lines):
    path = write(tmp_path / "a.txt", "one\r\ntwo\n\n \n  three\n\nfour")
    items = read(path, {"text": unit} if unit else None)
    assert [i.raw for i in items] == [{unit or "paragraph": text} for text in texts]
    assert [i.location for i in items] == [f"{path}:{n}" for n in lines]


def test_plain_text_refuses_other_columns_and_overlong_paragraphs(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "ab\ncd\n\nef\n")
    with pytest.raises(DataError, match="paragraph, line, file"):
        read(path, {"text": "body"})
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 5)
    long, ok = raws(path)
    assert long.reason == "too_long" and ok == {"paragraph": "ef"}


def test_parquet(tmp_path):
    rows = [{"text": f"t{i}", "tags": ["x", "y"][: i % 3], "n": i} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    items = read(tmp_path / "a.parquet")
    assert [i.raw for i in items] == rows
    assert items[1499].location.endswith("a.parquet:1500")
    assert items[-1].done == (tmp_path / "a.parquet").stat().st_size
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"b\.parquet is not a readable parquet"):
        read(tmp_path / "b.parquet")


def test_parquet_with_bad_utf8_rejects_that_row_only(tmp_path):
    text = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    first, bad, last = raws(tmp_path / "a.parquet")
    assert (first, last) == ({"text": "a"}, {"text": "c"})
    assert bad.reason == "invalid_utf8"


def test_parquet_that_python_cannot_hold(tmp_path):
    two = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(two, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column twice: a$"):
        read(tmp_path / "a.parquet")
    pq.write_table(pa.table({"a": pa.array([0, 2**62], pa.timestamp("us"))}), tmp_path / "b.parquet")
    good, bad = raws(tmp_path / "b.parquet")
    assert good == {"a": datetime.datetime(1970, 1, 1)} and bad.reason == "broken_row"


def test_links_are_followed_and_no_file_is_read_twice(tmp_path):
    source = tmp_path / "source"
    for name in ("source/b/own.jsonl", "elsewhere/x.jsonl", "elsewhere/deep/y.jsonl"):
        write(tmp_path / name, '{"name": "' + name + '"}\n')
    (source / "a").symlink_to(tmp_path / "elsewhere")
    (source / "b/again").symlink_to(tmp_path / "elsewhere/deep")
    (source / "b/loop").symlink_to(source)
    (tmp_path / "elsewhere/up").symlink_to(tmp_path)
    (source / "alias.jsonl").symlink_to(source / "b/own.jsonl")
    whole = {"source/b/own.jsonl", "elsewhere/x.jsonl", "elsewhere/deep/y.jsonl"}
    for pattern in (source, f"{source}/**/*.jsonl"):
        assert sorted(raw["name"] for raw in raws(pattern)) == sorted(whole)
    assert readers.expand(str(source)).files[0] == source / "a/deep/y.jsonl"
    (source / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    for pattern in (source, f"{source}/*.jsonl"):
        with pytest.raises(DataError, match=r"gone\.jsonl is a link to .*nowhere"):
            read(pattern)


def test_what_is_left_out_is_said(tmp_path):
    for name in ("a.jsonl", "b.jsonl.lz4", "README", "sub/c.jsonl"):
        write(tmp_path / "data" / name, '{"n": 1}\n')
    assert readers.expand(str(tmp_path / "data")).left_out == (tmp_path / "data/README", tmp_path / "data/b.jsonl.lz4")
    assert "b.jsonl.lz4" in readers.expand(str(tmp_path / "data")).note
    assert readers.expand(f"{tmp_path}/data/[as]*").left_out == (tmp_path / "data/sub",)
    assert readers.expand(f"{tmp_path}/data/**/*.jsonl").note == ""


def test_names_with_signs_of_the_syntax(tmp_path):
    for name in ("a;b.jsonl", "$HOME.jsonl", "[x].jsonl"):
        write(tmp_path / name, json.dumps({"n": name}))
    assert raws(tmp_path / "a;b.jsonl") == [{"n": "a;b.jsonl"}]
    assert raws(f"{tmp_path}/[x].jsonl;{tmp_path}/a;b.jsonl;{tmp_path}/$HOME.jsonl") == [{"n": n} for n in ("[x].jsonl", "a;b.jsonl", "$HOME.jsonl")]


def test_order_of_files_is_by_name_and_none_is_read_twice(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl", "a/b.jsonl.gz", "c.txt", ".hidden/x.jsonl", "notes.md"):
        write(tmp_path / name, '{"text": "' + name + '"}' if "jsonl" in name else "text")
    names = [file.relative_to(tmp_path).as_posix() for file in readers.expand(str(tmp_path)).files]
    assert names == ["a/b.jsonl.gz", "a/z.jsonl", "b.jsonl", "c.txt"]
    plan = readers.expand(f"{tmp_path}/b.jsonl; {tmp_path}/**/*.jsonl")
    assert [file.name for file in plan.files] == ["b.jsonl", "z.jsonl"]
    items = list(readers.read(plan))
    assert [i.raw["text"] for i in items] == ["b.jsonl", "a/z.jsonl"]
    assert items[-1].done == plan.total_bytes == sum(f.stat().st_size for f in plan.files)


def test_variables(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", '{"text": "a"}')
    monkeypatch.setenv("CORPUS", str(tmp_path))
    assert raws("$CORPUS/a.jsonl") == raws("${CORPUS}/a.jsonl") == [{"text": "a"}]
    monkeypatch.delenv("CORPUS")
    with pytest.raises(DataError, match="environment variable CORPUS, which is not set"):
        readers.expand("$CORPUS/a.jsonl")


@pytest.mark.parametrize(("source", "said"), [
    ("{dir}/no.jsonl", "no file matches"), ("{dir}/no*.jsonl", "no file matches"), ("{dir}/a.md", "no known type"),
    ("{dir}/empty", "no file of a known"),
    ("{dir}/built", "already"), ("{dir}", "already"), ("", "source is empty"), (" ; ", "source is empty")])
def test_sources_that_stand_for_nothing(tmp_path, source, said):
    write(tmp_path / "a.md", "x")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "built/x-train.array_record-00000-of-00001", "x")
    with pytest.raises(DataError, match=said):
        readers.expand(source.format(dir=tmp_path))
