import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conan_jax.data import packing
from conan_jax.data.packing import best_fit, expand_row, fit_example, open_packed, pack, split_document
from conan_jax.errors import DataError
from tests.data.corpus import sentences, tokenizer

EOS = 3


def rows_of(folder):
    packed = open_packed(folder)
    return [packed[i] for i in range(len(packed))]


def segments_of(rows):
    for row in rows:
        for k in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == k
            yield row["tokens"][here].tolist(), row["positions"][here].tolist(), row["loss_mask"][here].tolist()


@pytest.fixture(scope="module")
def documents():
    return [{"text": text} for text in sentences(150)] + [{"text": " ".join(sentences(40, seed=1))}]


@pytest.fixture(scope="module")
def pretrain(documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "pretrain"
    manifest = pack(documents, tokenizer(), "pretrain", 64, folder, record_kind="text", content="c")
    return folder, manifest


def test_every_token_of_every_document_is_there_once_and_in_order(documents, pretrain):
    """The segments, joined back at EOS, are the documents (an oracle that knows nothing of the packing order)."""
    t = tokenizer()
    expected = sorted(tuple(t.encode(d["text"]) + [EOS]) for d in documents)
    segments = [tuple(tokens) for tokens, _, _ in segments_of(rows_of(pretrain[0]))]
    long = next(e for e in expected if len(e) > 64)
    pieces = [long[i : i + 64] for i in range(0, len(long), 64)]
    for piece in pieces:
        if len(piece) > 1:
            segments.remove(piece)
    chunks = [e[i : i + 64] for e in expected if e != long for i in range(0, len(e), 64)]
    assert sorted(segments) == sorted(c for c in chunks if len(c) > 1)


def test_row_invariants(pretrain):
    for i, row in enumerate(rows_of(pretrain[0])):
        assert row["id"] == i
        assert all(row[name].shape == (64,) for name in ("tokens", "segment_ids", "positions", "loss_mask"))
        assert (row["tokens"].dtype, row["loss_mask"].dtype) == (np.int32, np.float32)
        used = int((row["segment_ids"] > 0).sum())
        assert (row["segment_ids"][used:] == 0).all() and (row["tokens"][used:] == 0).all() and (row["loss_mask"][used:] == 0).all()
        assert set(np.diff(row["segment_ids"][:used])) <= {0, 1} and row["segment_ids"][0] == 1
    for _, positions, mask in segments_of(rows_of(pretrain[0])):
        assert positions == list(range(len(positions)))
        assert mask == [0.0] + [1.0] * (len(mask) - 1)  # the first token is given, never predicted


def test_the_manifest_tells_how_full_the_rows_are(pretrain):
    rows, settings = rows_of(pretrain[0]), pretrain[1].settings
    assert settings["tokens"] == sum(int((row["segment_ids"] > 0).sum()) for row in rows)
    assert settings["targets"] == sum(int(row["loss_mask"].sum()) for row in rows)
    assert settings["fill"] == pytest.approx(settings["tokens"] / (64 * len(rows))) and settings["fill"] > 0.95


def test_the_rows_open_with_tfds_alone(pretrain):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(pretrain[0]).as_data_source("train")
    rows = rows_of(pretrain[0])
    assert len(source) == len(rows)
    stored = source[0]
    used = int((rows[0]["segment_ids"] > 0).sum())
    np.testing.assert_array_equal(stored["tokens"], rows[0]["tokens"][:used])
    assert stored["segment_lengths"].sum() == used


def test_reading_many_rows_equals_reading_each(pretrain):
    packed = open_packed(pretrain[0])
    for one, other in zip(packed.__getitems__([2, 0, 1]), [packed[2], packed[0], packed[1]]):
        assert one["id"] == other["id"]
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
    with pytest.raises(IndexError):
        packed[len(packed)]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_best_fit_packs_each_item_once_as_a_linear_search_does(sizes):
    bins = best_fit(sizes, 30)
    assert sorted(itertools.chain(*bins)) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in members) <= 30 for members in bins)
    rooms = []  # best-fit decreasing by linear search
    for size in sorted(sizes, reverse=True):
        fitting = [r for r in rooms if r >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 30) - size)
    assert len(bins) == len(rooms)


def test_best_fit_chooses_the_tightest_bin():
    assert sorted(map(sorted, best_fit([7, 6, 3], 10))) == [[0, 2], [1]]
    assert sorted(map(sorted, best_fit([7, 6, 4, 3], 10))) == [[0, 3], [1, 2]]


def test_split_document():
    assert [s.tokens.tolist() for s in split_document([5, 6, 7, 8], 3, EOS)] == [[5, 6, 7], [8, EOS]]
    assert [s.tokens.tolist() for s in split_document([5, 6, 7], 3, EOS)] == [[5, 6, 7]]  # EOS alone has no target
    assert split_document([], 3, EOS) == []


@pytest.mark.parametrize("length, tokens, prompt", [
    (20, [10, 11, 12, 13, 9, 20, 21, 22, EOS], 5),  # fits
    (9, [10, 11, 12, 13, 9, 20, 21, 22, EOS], 5),
    (8, [10, 11, 12, 9, 20, 21, 22, EOS], 4),  # the end of the prompt goes first
    (6, [10, 9, 20, 21, 22, EOS], 2),
    (5, [10, 9, 20, 21, 22], 2),  # then the end of the output, and its EOS with it
    (4, [10, 9, 20, 21], 2),
])
def test_fit_example_keeps_the_output_as_long_as_possible(length, tokens, prompt):
    segment = fit_example([10, 11, 12, 13], [9], [20, 21, 22], length, EOS)
    assert (segment.tokens.tolist(), segment.prompt) == (tokens, prompt)


def test_sft_learns_the_output_and_its_eos_only(tmp_path):
    t = tokenizer()
    records = [{"instruction": "read", "input": text, "output": "write " + str(i)} for i, text in enumerate(sentences(30))]
    pack(records, t, "sft", 200, tmp_path / "sft", record_kind="sft", content="c")
    found = sorted(tuple(i for i, m in zip(tokens, mask) if m) for tokens, _, mask in segments_of(rows_of(tmp_path / "sft")))
    assert found == sorted((*t.encode(r["output"]), EOS) for r in records)
    given_ = sorted(tuple(i for i, m in zip(tokens, mask) if not m) for tokens, _, mask in segments_of(rows_of(tmp_path / "sft")))
    assert given_ == sorted((*t.encode("read\n" + r["input"]), *t.encode("\n")) for r in records)


def test_expand_row_by_hand():
    row = expand_row(np.array([5, 6, 7, 8, 9]), np.array([2, 3]), np.array([1, 2]), 7)
    assert row["tokens"].tolist() == [5, 6, 7, 8, 9, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 2, 2, 2, 0, 0]
    assert row["positions"].tolist() == [0, 1, 0, 1, 2, 0, 0]
    assert row["loss_mask"].tolist() == [0, 1, 0, 0, 1, 0, 0]


class Counting(list):
    """A source that counts the records read from it."""

    read = 0

    def __getitem__(self, index):
        Counting.read += 1
        return super().__getitem__(index)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(packing, "_MIN_SHARD_DOCUMENTS", 40)
    Counting.read = 0


def test_workers_do_not_change_the_rows(documents, tmp_path, small_shards):
    manifests = [pack(documents, tokenizer(), "pretrain", 64, tmp_path / str(n), record_kind="text", content="c", num_workers=n)
                 for n in (1, 3)]
    assert [s.sha256 for s in manifests[0].shards] == [s.sha256 for s in manifests[1].shards] and len(manifests[0].shards) == 4


def test_finished_rows_are_used_again_and_anything_else_is_made_anew(documents, tmp_path, small_shards):
    source = Counting(documents)

    def packed(kind="pretrain", length=64, content="c"):
        before = Counting.read
        pack(source, tokenizer(), kind, length, tmp_path / "p", record_kind="text", content=content)
        return Counting.read - before

    assert packed() == len(documents)
    assert packed() == 0
    assert packed(length=32) == len(documents)
    assert packed(length=32, content="other records") == len(documents)
    assert {p.name for p in tmp_path.iterdir()} == {"p", ".p.lock"}  # nothing is left behind


def test_an_interrupted_packing_goes_on_where_it_was(documents, tmp_path, small_shards):
    class Killed(Exception):
        pass

    class Broken(Counting):
        def __getitem__(self, index):
            if index >= 80:
                raise Killed
            return super().__getitem__(index)

    with pytest.raises(Killed):
        pack(Broken(documents), tokenizer(), "pretrain", 64, tmp_path / "p", record_kind="text", content="c", num_workers=1)
    with pytest.raises(DataError):
        open_packed(tmp_path / "p")
    Counting.read = 0
    resumed = pack(Counting(documents), tokenizer(), "pretrain", 64, tmp_path / "p", record_kind="text", content="c")
    assert Counting.read == len(documents) - 80  # two shards of 40 were kept
    straight = pack(documents, tokenizer(), "pretrain", 64, tmp_path / "q", record_kind="text", content="c")
    assert [s.sha256 for s in resumed.shards] == [s.sha256 for s in straight.shards]


def test_a_half_written_shard_of_an_interrupted_packing_is_made_again(documents, tmp_path, small_shards, monkeypatch):
    def stop(*_):  # after the last shard
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "_finish", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(documents, tokenizer(), "pretrain", 64, tmp_path / "p", record_kind="text", content="c")
    monkeypatch.undo()
    monkeypatch.setattr(packing, "_MIN_SHARD_DOCUMENTS", 40)
    [part] = tmp_path.glob(".p.*/000000000040.part")
    part.write_bytes(part.read_bytes()[:100])
    Counting.read = 0
    pack(Counting(documents), tokenizer(), "pretrain", 64, tmp_path / "p", record_kind="text", content="c")
    assert Counting.read == 40


def test_truncated_rows_are_refused_at_open_and_packed_again(documents, tmp_path):
    manifest = pack(documents, tokenizer(), "pretrain", 64, tmp_path / "p", record_kind="text", content="c")
    shard = tmp_path / "p" / manifest.shards[0].file
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match="truncated"):
        open_packed(tmp_path / "p")
    pack(documents, tokenizer(), "pretrain", 64, tmp_path / "p", record_kind="text", content="c")
    assert json.loads((tmp_path / "p" / "manifest.json").read_text())["records"] == len(open_packed(tmp_path / "p"))


def test_what_cannot_be_packed_is_refused(tmp_path):
    with pytest.raises(DataError, match="too short"):
        pack([{"text": "a"}], tokenizer(), "pretrain", 3, tmp_path / "p", record_kind="text", content="c")
    with pytest.raises(DataError, match="no pairs"):
        pack([{"text": "a"}], tokenizer(), "sft", 32, tmp_path / "p", record_kind="text", content="c")
    with pytest.raises(DataError, match="nothing to learn"):
        pack([{"text": ""}], tokenizer(), "pretrain", 32, tmp_path / "p", record_kind="text", content="c")
