"""A corpus is encoded whole or not at all, the same bytes whether or not it was interrupted, in pieces that make the whole."""

import gzip
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from conan_jax.errors import ConfigError, DataError
from conan_jax.folder_lock import FolderInUseError, FolderLock
from conan_jax.inference import corpus
from conan_jax.inference.corpus import Settings, encode_corpus, shard_rows
from conan_jax.inference.precision import quantize, ranges_of
from conan_jax.inference.source import TextSource
from tests.eval.fakes import WordEncoder

WORDS = [f"w{i}" for i in range(10)]


def write(path, count=23, seed=0):
    rng = np.random.default_rng(seed)
    rows = [{"id": f"d{i}", "text": " ".join(rng.choice(WORDS, 8))} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def chunks(monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 5)
    monkeypatch.setattr(corpus, "BLOCK", 4)


@pytest.fixture
def source(tmp_path):
    return TextSource(str(write(tmp_path / "in.jsonl")), id_field="id")


def expected(source):
    return WordEncoder(WORDS).encode([item.text for item in source])


def load(path):
    return np.load(path, allow_pickle=False)


def test_the_vectors_are_those_of_the_encoder_and_are_described(tmp_path, source, chunks):
    seen = []
    encoder = WordEncoder(WORDS)
    meta = encode_corpus(encoder, source, tmp_path / "out.npy", Settings(prompt="p: ", max_length=9), advance=lambda *now: seen.append(now))
    np.testing.assert_array_equal(load(tmp_path / "out.npy"), expected(source))
    assert [len(texts) for texts, _, _ in encoder.calls] == [5, 5, 5, 5, 3] and {c[1:] for c in encoder.calls} == {("p: ", 9)}
    assert seen == [(0, 23), (5, 23), (10, 23), (15, 23), (20, 23), (23, 23)]
    assert [json.loads(line) for line in open(tmp_path / "out.npy.ids.jsonl")] == [f"d{i}" for i in range(23)]
    assert meta == json.loads((tmp_path / "out.npy.json").read_text())
    assert meta["count"] == 23 and meta["encoder"] == encoder.identity and meta["source"][0]["name"] == "in.jsonl"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.npy", "out.npy.ids.jsonl", "out.npy.json"]


class Stop(BaseException):
    """As the signal handler of the command line raises."""


class Interrupted(WordEncoder):
    def __init__(self, calls):
        super().__init__(WORDS)
        self.left = calls

    def encode(self, inputs, *args, **options):
        if not self.left:
            raise Stop
        self.left -= 1
        return super().encode(inputs, *args, **options)


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("precision", ["float32", "uint8", "ubinary"])
def test_an_interrupted_run_goes_on_and_writes_the_same_bytes(tmp_path, source, chunks, suffix, precision):
    settings = Settings(precision=precision)
    encode_corpus(WordEncoder(WORDS), source, tmp_path / f"whole{suffix}", settings)
    out = tmp_path / f"out{suffix}"
    said = []
    for calls in (2, 0, 1):
        with pytest.raises(Stop):
            encode_corpus(Interrupted(calls), source, out, settings, say=said.append)
        assert not out.exists()
    last = Interrupted(99)
    encode_corpus(last, source, out, settings, say=said.append)
    assert said == ["going on after 10 of 23 rows"] * 2 + ["going on after 15 of 23 rows"] and 99 - last.left == 2
    assert out.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_half_a_chunk_of_a_killed_write_is_written_over(tmp_path, source, chunks):
    with pytest.raises(Stop):
        encode_corpus(Interrupted(2), source, tmp_path / "out.npy")
    with open(tmp_path / ".out.npy.partial" / "vectors.npy", "ab") as file:
        file.write(b"half a row")
    encode_corpus(WordEncoder(WORDS), source, tmp_path / "out.npy")
    np.testing.assert_array_equal(load(tmp_path / "out.npy"), expected(source))


class Retrained(WordEncoder):
    """The same names, and weights of its own."""

    def __init__(self, weights):
        super().__init__(WORDS)
        self.identity = {**self.identity, "weights_sha256": weights * 64}


@pytest.mark.parametrize("change, words", [
    ("settings", "max_length 512, now 3"), ("source", "of other texts"), ("model", "by words s step 1 .*, now by other s step 1"),
    ("weights", "by words .*weights unknown.*now by .*weights bbbb")])
def test_what_was_begun_another_way_is_neither_gone_on_with_nor_dropped_unasked(tmp_path, source, chunks, change, words):
    out = tmp_path / "out.npy"
    with pytest.raises(Stop):
        encode_corpus(Interrupted(2), source, out)
    encoder = Retrained("b") if change == "weights" else WordEncoder(WORDS, name="other" if change == "model" else "words")
    settings = Settings(max_length=3 if change == "settings" else None)
    if change == "source":
        write(tmp_path / "in.jsonl", seed=1)
    before = (tmp_path / ".out.npy.partial" / "vectors.npy").read_bytes()
    with pytest.raises(ConfigError, match=rf"10 rows of .*out.npy were begun another way \({words}.*--force"):
        encode_corpus(encoder, source, out, settings)
    assert not encoder.calls and (tmp_path / ".out.npy.partial" / "vectors.npy").read_bytes() == before
    said = []
    encode_corpus(encoder, source, out, settings, force=True, say=said.append)
    assert said == ["what an earlier run left was made another way; starting anew"]
    np.testing.assert_array_equal(load(out), expected(source))


def test_a_damaged_beginning_is_made_anew(tmp_path, source, chunks):
    with pytest.raises(Stop):
        encode_corpus(Interrupted(2), source, tmp_path / "out.npy")
    (tmp_path / ".out.npy.partial" / "vectors.npy").write_bytes(b"")
    said = []
    encode_corpus(WordEncoder(WORDS), source, tmp_path / "out.npy", say=said.append)
    assert said == ["what an earlier run left is damaged; starting anew"]
    np.testing.assert_array_equal(load(tmp_path / "out.npy"), expected(source))


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_what_is_complete_is_left_alone(tmp_path, source, chunks, suffix, precision):
    out, encoder, said = tmp_path / f"out{suffix}", WordEncoder(WORDS), []
    meta = encode_corpus(encoder, source, out, Settings(precision=precision))
    calls, stamp = len(encoder.calls), out.stat().st_mtime_ns
    assert encode_corpus(encoder, source, out, Settings(precision=precision), say=said.append) == meta
    assert said == [f"{out} is complete already; --force makes it again"]
    (tmp_path / f".{out.name}.partial").mkdir()  # a stop between the last two strokes of the work
    (tmp_path / f".{out.name}.partial" / "state.json").write_text(json.dumps({"job": {**meta, "ranges": None}, "done": 23}))
    encode_corpus(encoder, source, out, Settings(precision=precision))
    assert len(encoder.calls) == calls and out.stat().st_mtime_ns == stamp
    encode_corpus(encoder, source, out, Settings(precision=precision), force=True)
    assert len(encoder.calls) == 2 * calls


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_what_is_there_gives_way_to_force_alone(tmp_path, source, chunks, suffix):
    out, other = tmp_path / f"out{suffix}", Settings(truncate_dim=4)
    out.write_bytes(b"years of work")
    with pytest.raises(ConfigError, match="is there already, and not as `conan encode` left it"):
        encode_corpus(WordEncoder(WORDS), source, out)
    assert out.read_bytes() == b"years of work" and sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", out.name]
    encode_corpus(WordEncoder(WORDS), source, out, force=True)
    content = out.read_bytes()
    refused = ((WordEncoder(WORDS), other, "truncate_dim None, now 4"), (Retrained("b"), Settings(), "now by .*weights b"))
    for encoder, settings, words in refused:
        with pytest.raises(ConfigError, match=rf"is there already, made another way \(.*{words}.*--force"):
            encode_corpus(encoder, source, out, settings)
    assert out.read_bytes() == content
    # Replacing it was agreed to once: what is stopped meanwhile goes on without being asked again.
    with pytest.raises(Stop):
        encode_corpus(Interrupted(2), source, out, other, force=True)
    assert out.read_bytes() == content
    assert encode_corpus(WordEncoder(WORDS), source, out, other)["dimension"] == 4
    out.write_bytes(out.read_bytes()[:-50])
    with pytest.raises(ConfigError, match="not as `conan encode` left it"):
        encode_corpus(WordEncoder(WORDS), source, out, other)


def test_ids_of_what_was_replaced_do_not_stay(tmp_path, source, chunks):
    encode_corpus(WordEncoder(WORDS), source, tmp_path / "out.npy")
    encode_corpus(WordEncoder(WORDS), TextSource(source.source), tmp_path / "out.npy", force=True)
    assert not (tmp_path / "out.npy.ids.jsonl").exists()


@pytest.mark.parametrize("settings, ranges, message", [
    (Settings(truncate_dim=11), None, "truncate_dim must be a whole number in .1, 10"),
    (Settings(truncate_dim=4, precision="int8"), np.zeros((2, 10), np.float32), "ranges must have the shape .2, 4."),
])
def test_a_width_that_does_not_fit_is_refused_before_a_file_is_made(tmp_path, source, settings, ranges, message):
    with pytest.raises(ConfigError, match=message):
        encode_corpus(WordEncoder(WORDS), source, tmp_path / "out.npy", settings, ranges=ranges)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_shards_concatenate_to_the_whole(tmp_path, source, chunks, count):
    parts = []
    for i in range(1, count + 1):
        meta = encode_corpus(WordEncoder(WORDS), source, tmp_path / f"{i}.parquet", Settings(shard=(i, count)))
        assert meta["first_row"] == sum(map(len, parts))
        table = pq.read_table(tmp_path / f"{i}.parquet")
        parts.append(table["id"].to_pylist())
        assert len(parts[-1]) == meta["count"] and abs(meta["count"] - 23 / count) < 1
    assert sum(parts, []) == [f"d{i}" for i in range(23)]
    tables = [pq.read_table(tmp_path / f"{i}.parquet") for i in range(1, count + 1)]
    np.testing.assert_array_equal(np.array(pa.concat_tables(tables)["embedding"].to_pylist(), np.float32), expected(source))


def test_shard_rows_are_even_and_in_order():
    for total in (0, 1, 7, 100):
        for count in (1, 3, 8):
            rows = [shard_rows(total, (i, count)) for i in range(1, count + 1)]
            assert [r for part in rows for r in part] == list(range(total)) and max(map(len, rows)) - min(map(len, rows)) <= 1


def test_quantised_by_the_ranges_of_all_vectors_or_of_a_sample(tmp_path, source, chunks):
    vectors = expected(source)
    meta = encode_corpus(WordEncoder(WORDS), source, tmp_path / "a.npy", Settings(precision="int8"))
    np.testing.assert_array_equal(load(tmp_path / "a.npy"), quantize(vectors, "int8"))
    np.testing.assert_array_equal(np.array(meta["ranges"], np.float32), ranges_of(vectors))
    ranges = np.stack([np.zeros(10), np.ones(10)]).astype(np.float32)
    encode_corpus(WordEncoder(WORDS), source, tmp_path / "b.npy", Settings(precision="uint8", shard=(2, 2)), ranges=ranges)
    np.testing.assert_array_equal(load(tmp_path / "b.npy"), quantize(vectors[11:], "uint8", ranges))
    with pytest.raises(ConfigError, match="in shards needs ranges"):
        encode_corpus(WordEncoder(WORDS), source, tmp_path / "c.npy", Settings(precision="uint8", shard=(2, 2)))
    with pytest.raises(ConfigError, match="ranges are for int8"):
        encode_corpus(WordEncoder(WORDS), source, tmp_path / "c.npy", Settings(precision="binary"), ranges=ranges)


def test_truncated_vectors_have_their_width(tmp_path, source, chunks):
    meta = encode_corpus(WordEncoder(WORDS), source, tmp_path / "a.parquet", Settings(truncate_dim=4))
    table = pq.read_table(tmp_path / "a.parquet")
    assert meta["dimension"] == 4 and table.schema.field("embedding").type == pa.list_(pa.float32(), 4)


def test_neither_texts_nor_vectors_are_held(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 200)
    monkeypatch.setattr(corpus, "BLOCK", 200)
    path = tmp_path / "in.jsonl"
    with open(path, "w") as file:
        for i in range(4000):
            file.write(json.dumps({"text": f"{i} " * 500}) + "\n")  # 10 MB of text

    class Wide(WordEncoder):  # 4000 x 1000 floats are 16 MB
        def encode(self, inputs, *args, **options):
            return np.ones((len(inputs), 1000), np.float32)

    tracemalloc.start()
    encode_corpus(Wide([str(i) for i in range(1000)]), TextSource(str(path)), tmp_path / "out.npy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert load(tmp_path / "out.npy").shape == (4000, 1000) and peak < 6e6


def test_one_writer_at_a_time(tmp_path, source):
    with FolderLock(tmp_path / ".out.npy.partial", "x"), pytest.raises(FolderInUseError):
        encode_corpus(WordEncoder(WORDS), source, tmp_path / "out.npy")


@pytest.mark.parametrize("out, message", [("out.txt", "must end in .npy or .parquet"), ("file/out.npy", "cannot write")])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, source, out, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=message):
        encode_corpus(WordEncoder(WORDS), source, tmp_path / out)


# --------------------------------------------------------------------------------------------- sources


def test_every_kind_of_file_gives_its_texts_and_ids(tmp_path):
    rows = [("a", "first text"), ("b", "second, text")]
    lines = "".join(json.dumps({"n": i, "key": key, "body": body}) + "\n" for i, (key, body) in enumerate(rows))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.csv").write_text('key,body\na,first text\nb,"second, text"\n')
    pq.write_table(pa.table({"key": [k for k, _ in rows], "body": [b for _, b in rows]}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("first text\n\nsecond, text\n")
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"):
        assert [(t.id, t.text) for t in TextSource(str(tmp_path / name), "body", "key")] == rows, name
    assert [(t.id, t.text) for t in TextSource(str(tmp_path / "a.txt"))] == [("0", "first text"), ("1", ""), ("2", "second, text")]
    assert [t.id for t in TextSource(str(tmp_path / "a.jsonl"), "body", "n")] == ["0", "1"]
    assert TextSource(str(tmp_path / "a.jsonl"), "body").identity()[0]["bytes"] == len(lines)


@pytest.mark.parametrize("line, message", [
    (b'{"text": 3}', "in.jsonl:2 has int in the field 'text', not text"),
    (b'{"body": "x"}', "in.jsonl:2 has no field 'text'; it has body. Name another with --field"),
    (b'{"text": "x"', "in.jsonl:2: broken_json"),
    (b'"x"', "in.jsonl:2 is str, not an object"),
    (b'{"text": "\xff"}', "in.jsonl:2: invalid_utf8"),
    (b'{"text": "\\ud800"}', "in.jsonl:2 is no valid Unicode"),
])
def test_a_bad_line_is_refused_by_file_and_line_before_anything_is_encoded(tmp_path, line, message):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    encoder = WordEncoder(WORDS)
    with pytest.raises(DataError, match=message):
        encode_corpus(encoder, TextSource(str(tmp_path / "in.jsonl")), tmp_path / "out.npy")
    assert not encoder.calls and not (tmp_path / "out.npy").exists()


# ----------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch):
    import conan_jax.inference.encoder
    from conan_jax.cli.main import app

    encoder = WordEncoder(WORDS)
    encoder.prompts["query"] = "find: "
    monkeypatch.setattr(conan_jax.inference.encoder.Encoder, "load", classmethod(lambda cls, folder: encoder))
    return lambda *arguments: CliRunner().invoke(app, ["encode", *map(str, arguments)])


def test_the_command_encodes_and_describes(tmp_path, command):
    write(tmp_path / "in.jsonl")
    done = command(tmp_path / "in.jsonl", tmp_path / "out.npy", "--model", "m", "--json", "--prompt-name", "query", "--truncate-dim", 4)
    assert done.exit_code == 0, done.output
    meta = json.loads(done.stdout)
    assert meta["prompt"] == "find: " and meta["dimension"] == 4 and load(tmp_path / "out.npy").shape == (23, 4)
    command(tmp_path / "in.jsonl", tmp_path / "sample.npy", "--model", "m")
    piece = command(tmp_path / "in.jsonl", tmp_path / "p.npy", "--model", "m", "--shard", "2/2", "--precision", "int8",
                    "--ranges", tmp_path / "sample.npy")
    assert piece.exit_code == 0 and "12 x 10 int8" in piece.stdout
    np.testing.assert_array_equal(load(tmp_path / "p.npy"), quantize(load(tmp_path / "sample.npy"), "int8")[11:])


def test_the_sample_must_have_the_width_of_this_run(tmp_path, command):
    texts = write(tmp_path / "in.jsonl")
    command(texts, tmp_path / "wide.npy", "--model", "m")
    command(texts, tmp_path / "short.npy", "--model", "m", "--truncate-dim", 4)
    before = sorted(p.name for p in tmp_path.iterdir())
    for sample, more, words in (
        ("wide", ("--truncate-dim", 4), "wide.npy holds vectors of 10 numbers, this run writes 4: encode the sample with --truncate-dim 4"),
        ("short", (), "short.npy holds vectors of 4 numbers, this run writes 10: encode the sample without --truncate-dim")):
        failed = command(texts, tmp_path / "o.npy", "--model", "m", "--precision", "int8", "--ranges", tmp_path / f"{sample}.npy", *more)
        assert words in str(failed.exception) and "encoding" not in failed.output
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_command_replaces_nothing_unless_it_is_forced(tmp_path, command):
    texts = write(tmp_path / "in.jsonl")
    (tmp_path / "out.npy").write_bytes(b"mine")
    failed = command(texts, tmp_path / "out.npy", "--model", "m")
    assert isinstance(failed.exception, ConfigError) and failed.exception.exit_code == 78 and "--force" in str(failed.exception)
    assert command(texts, tmp_path / "out.npy", "--model", "m", "--force").exit_code == 0
    again = command(texts, tmp_path / "out.npy", "--model", "m")
    assert again.exit_code == 0 and "is complete already" in again.output


@pytest.mark.parametrize("arguments, message", [
    (("--shard", "0/2"), "1 <= I <= N"), (("--shard", "3"), "must be I/N"), (("--precision", "float16"), "float16"),
    (("--ranges", "nowhere.npy"), "nowhere.npy cannot be read"), (("--prompt-name", "nothing"), "no prompt 'nothing'"),
])
def test_wrong_options_are_refused(tmp_path, command, arguments, message):
    failed = command(write(tmp_path / "in.jsonl"), tmp_path / "out.npy", "--model", "m", *arguments)
    assert message in str(failed.exception)
