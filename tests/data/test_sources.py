"""What was built is what is read, from any thread; a shard that is not what the manifest says is refused."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import grain
import pytest

from conan_jax.config import Dataset
from conan_jax.data.convert import build_dataset
from conan_jax.data.sources import open_source
from conan_jax.errors import DataError


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"sentence1": f"a{i}", "sentence2": f"b{i} é", "score": i / 10}) + "\n" for i in range(200)))
    build_dataset(Dataset("d", "sts", str(source)), tmp_path / "out", num_shards=4)
    return tmp_path / "out"


def want(i):
    import numpy as np

    return {"sentence1": f"a{i}", "sentence2": f"b{i} é", "score": float(np.float32(i / 10))}


def test_records_by_number(folder):
    source = open_source(folder)
    assert len(source) == 200 and source.kind == "sts"
    assert [source[i] for i in (0, 49, 50, 199, -1)] == [want(i) for i in (0, 49, 50, 199, 199)]
    assert type(source[0]["sentence1"]) is str and type(source[0]["score"]) is float
    for index in (200, -201):
        with pytest.raises(IndexError):
            source[index]
    assert "d" in repr(source) and repr(source) == repr(open_source(folder))


def test_grain_reads_it(folder):
    data = grain.MapDataset.source(open_source(folder)).seed(3).shuffle()
    assert sorted(int(data[i]["sentence1"][1:]) for i in range(len(data))) == list(range(200))
    batches = data.batch(8).to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8))
    assert sum(len(b["score"]) for b in batches) == 200


def test_many_threads_see_the_same_records(folder):
    source = open_source(folder)
    indices = [(i * 37) % 200 for i in range(2000)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(source.__getitem__, indices)) == [want(i) for i in indices]


def test_a_pickled_source_still_reads(folder):
    source = open_source(folder)
    source[0]
    assert pickle.loads(pickle.dumps(source))[120] == want(120)


def shard(folder, index=2):
    return sorted(folder.glob("*.array_record*"))[index]


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_shard_is_refused(folder, keep):
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=f"{path.name} is truncated: .* build it again"):
        open_source(folder)


def test_an_altered_shard_is_refused_even_at_the_same_size_and_after_a_good_open(folder):
    open_source(folder)
    path = shard(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{path.name} is altered: its sha256"):
        open_source(folder)
    assert len(open_source(folder, hashes=False)) == 200


def test_swapped_shards_are_refused(folder):
    one, two = shard(folder, 0), shard(folder, 3)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second), two.write_bytes(first)
    with pytest.raises(DataError, match=one.name):
        open_source(folder)


def test_a_missing_shard_and_a_longer_one_are_refused(folder):
    path = shard(folder)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match=f"{path.name} is altered: it has"):
        open_source(folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} is missing"):
        open_source(folder)


def test_tfds_metadata_that_disagrees_is_refused(folder):
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"50"', '"40"', 1))
    with pytest.raises(DataError, match="opens with 190 records, the manifest says 200"):
        open_source(folder)
    info.write_text("{")
    with pytest.raises(DataError, match="cannot be opened as a TFDS dataset"):
        open_source(folder)


@pytest.mark.parametrize(("text", "said"), [("{", "cannot be read"), ("[]", "manifest format"), ('{"format": 99}', "manifest format 1"),
                                            ('{"format": 1, "kind": "text"}', "is damaged")])
def test_a_damaged_manifest_is_refused(folder, text, said):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=said):
        open_source(folder)


@pytest.mark.parametrize("name", ["nothing", ".", "a.jsonl"])
def test_a_folder_that_is_no_dataset(folder, name):
    with pytest.raises(DataError, match="conan data build"):
        open_source(folder.parent / name)


def test_several_records_in_one_call_are_those_read_one_by_one(tmp_path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)), encoding="utf-8")
    build_dataset(Dataset("texts", "text", str(file)), tmp_path / "built")
    source = open_source(tmp_path / "built")
    numbers = [3, 0, 19, -1, 3]
    assert source.__getitems__(numbers) == [source[i] for i in numbers]
    with pytest.raises(IndexError):
        source.__getitems__([0, 20])
