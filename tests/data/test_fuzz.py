"""Any bytes under any name of a data file give a manifest that accounts for every record, or a DataError."""

import bz2
import gzip
import io
import json
import lzma
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from conan_jax.config import Dataset
from conan_jax.data.convert import build_dataset
from conan_jax.data.manifest import REJECTS
from conan_jax.data.schema import KINDS
from conan_jax.errors import DataError

COLUMNS = ["text", "query", "pos", "neg", "scores", "positive", "negative_1", "instruction", "input", "output", "messages", "set",
           "premise", "hypothesis", "label", "sentence1", "sentence2", "score", "query_text", "positive_document_ids", "title", "a+b", ""]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
            ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
SNIPPETS = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n", b"\r\n", b'"', b"\t", b",", b"[", b"{", b"}", b"\\ud800",
            b"\\u0000", b"NaN", b"1e999", b"-", b"null", b"\xe2\x80\xa8", b"&lt;<b>", b"[" * 3000, b"9" * 5000, b"\x1f\x8b", b"PAR1",
            b'{"n": ' + b"9" * 5000 + b"}", b'{"n": ' + b"[" * 5000, b'{"text": "a", "text": "b"}']

texts = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from([
    "q", "p", "entailment", "1.5", " ", "", "<b>x</b> &amp;", "\ufeff"])
turns = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts})
values = st.one_of(texts, st.none(), st.integers(), st.floats(), st.booleans(), st.lists(texts, max_size=3), st.lists(turns, max_size=3),
                   st.dictionaries(st.sampled_from(["text", "title"]), texts, min_size=1), st.lists(st.none() | st.floats(), max_size=2))
whole = st.just({"score": "2.5"} | {name: f"{name} {name}" for name in (
    "text", "query", "pos", "instruction", "output", "label", "sentence1", "sentence2")})
records = st.lists(whole | st.dictionaries(st.sampled_from(COLUMNS), values, max_size=5), min_size=1, max_size=4)
edits = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), st.sampled_from(SNIPPETS)), max_size=2)
fields = st.dictionaries(st.sampled_from(["text", "query", "pos", "label"]),
                         st.sampled_from([*COLUMNS[:-1], "line", "file", "text+query", "+", "set.0", "messages.0.content", "negative*",
                                          "."]), max_size=2)


def parquet(rows):
    columns = dict.fromkeys(name for row in rows for name in row) or ["text"]
    arrays = {}
    for name in columns:
        column = [row.get(name) for row in rows]
        try:
            arrays[name] = pa.array(column)
        except (pa.ArrowException, OverflowError):
            arrays[name] = pa.array([str(value).encode("utf-8", "surrogatepass") for value in column])
    file = io.BytesIO()
    pq.write_table(pa.table(arrays), file)
    return file.getvalue()


@st.composite
def files(draw):
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet"]))
    if suffix == ".parquet":
        data = parquet(draw(records))
    elif suffix in (".csv", ".tsv"):
        rows = draw(records)
        header = list(dict.fromkeys(name for row in rows for name in row)) or draw(st.lists(st.sampled_from(COLUMNS), max_size=3))
        cells = [header, *([str(row.get(name, "")) for name in header] for row in rows)]
        data = "\n".join((",\t"[suffix == ".tsv"]).join(row) for row in cells).encode("utf-8", "surrogatepass")
    else:
        lines = [json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") for row in draw(records)]
        data = b"\n".join(lines + draw(st.lists(st.sampled_from(SNIPPETS), max_size=2)))
    for place, removed, added in draw(edits):
        place = min(place, len(data))
        data = data[:place] + added + data[place + removed:]
    compression = draw(st.sampled_from(list(COMPRESS)))
    data = COMPRESS[compression](data)
    if draw(st.integers(0, 7)) == 0:
        data = data[:draw(st.integers(0, len(data)))]
    return suffix + compression, data


@settings(max_examples=500, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(file=files(), kind=st.sampled_from(sorted(KINDS)), mapped=fields, clean=st.sampled_from([None, "html"]))
def test_each_record_of_any_file_is_built_or_rejected(file, kind, mapped, clean):
    name, data = file
    mapped = {ours: column for ours, column in mapped.items() if ours in KINDS[kind]}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / f"a{name}", Path(folder) / "out"
        source.write_bytes(data)
        try:
            manifest = build_dataset(Dataset("d", kind, str(source), mapped, max_reject_rate=1, clean=clean), out)
        except DataError as error:
            assert str(error) and not out.exists()
            return
        rejects = [json.loads(line) for line in (out / REJECTS).read_text(encoding="utf-8").split("\n")[:-1]]
        assert manifest.read == manifest.records + manifest.rejected and len(rejects) == manifest.rejected
        assert sum(shard.records for shard in manifest.shards) == manifest.records > 0
