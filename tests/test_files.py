"""A file of ours is the old one or the new one, never half of one."""

import os

import pytest

from conan_jax.errors import DataError
from conan_jax.files import read_json, replacing, replacing_folder, write_json


def test_what_is_written_is_read_and_nothing_else_lies_there(tmp_path):
    file = tmp_path / "new" / "a.json"
    write_json(file, {"é": [1, None]})
    write_json(file, {"é": 2})
    assert read_json(file) == {"é": 2} and os.listdir(file.parent) == ["a.json"]
    assert read_json(tmp_path / "none.json", {}) == {}


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")
    with pytest.raises(KeyError), replacing(file) as partial:
        partial.write_bytes(b"ne")
        raise KeyError
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(("content", "said"), [("{", "not valid JSON"), ("[1]", "must hold a JSON object")])
def test_a_damaged_file_is_named(tmp_path, content, said):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=f"a.json.*{said}"):
        read_json(tmp_path / "a.json")


def test_a_folder_that_holds_something_gives_way_only_by_force(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with replacing_folder(out) as partial:
        (partial / "a").write_text("first")
    with pytest.raises(DataError, match="cannot be written"), replacing_folder(out) as partial:
        (partial / "a").write_text("second")
    assert (out / "a").read_text() == "first"
    with replacing_folder(out, force=True) as partial:
        (partial / "b").write_text("third")
    assert [path.name for path in out.iterdir()] == ["b"] and [path.name for path in tmp_path.iterdir()] == ["out"]
