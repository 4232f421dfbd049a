"""A file of ours is the old one or the new one, never half of one."""

import errno
import os
from pathlib import Path

import pytest

from conan_jax import files
from conan_jax.errors import ConfigError, DataError
from conan_jax.files import partial_path, read_json, remove_inside, replacing, replacing_folder, write_json


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


@pytest.mark.parametrize("write", [replacing, replacing_folder])
def test_writers_with_one_process_id_do_not_meet(tmp_path, monkeypatch, write):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in the first process of every container
    out = tmp_path / "out"
    with write(out) as first:
        with write(out) as second:
            assert first != second
            for partial, content in ((first, "one"), (second, "two")):
                (partial if write is replacing else partial / "a").write_text(content)
        read = out if write is replacing else out / "a"
        assert read.read_text() == "two"
        if write is replacing_folder:
            (out / "a").unlink()  # an empty folder gives way
    assert read.read_text() == "one" and os.listdir(tmp_path) == ["out"]


def test_what_killed_processes_left_is_removed_when_it_is_a_day_old(tmp_path):
    kept = [tmp_path / name for name in (".a.x.partial", ".b.0123456789abcdef.partial", ".a")]
    dead, living = partial_path(tmp_path / "a"), partial_path(tmp_path / "a")
    for folder in (dead, living):
        (folder / "in").mkdir(parents=True)
    (living / "in" / "new").touch()  # the folder itself is old, what is written in it is not
    for path in (dead, dead / "in", living, living / "in"):
        os.utime(path, (0, 0))
    for path in kept:
        path.touch()
        os.utime(path, (0, 0))
    write_json(tmp_path / "a", {})
    assert sorted(tmp_path.iterdir()) == sorted([*kept, living, tmp_path / "a"])


@pytest.mark.parametrize("name", ["", ".", "..", "a/..", "a/../..", "../other", "link", "link_inside", "link/x"])
def test_nothing_is_removed_outside_of_the_root(tmp_path, name):
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (root / "a", other / "x"):
        folder.mkdir(parents=True)
    (root / "link").symlink_to(other)
    (root / "link_inside").symlink_to(root / "a")
    with pytest.raises(ConfigError, match="not removed"):
        remove_inside(root / name, root)
    assert (root / "a").is_dir() and (other / "x").is_dir()


def test_a_folder_inside_of_the_root_is_removed(tmp_path):
    (tmp_path / "root" / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "root")
    remove_inside(tmp_path / "link" / "a", tmp_path / "root")
    remove_inside(tmp_path / "root" / "a", tmp_path / "root")  # gone already
    assert not os.listdir(tmp_path / "root")


@pytest.mark.parametrize(("place", "force"), [(".", False), ("../here", False), (".", True), ("mounted", False)])
def test_a_folder_that_cannot_be_renamed_is_filled(tmp_path, monkeypatch, place, force):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    if place == "mounted":
        (here / place).mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == here / place)
    out = Path(place)
    if force:
        (here / "before").touch()
        with pytest.raises(DataError, match=f"{here} cannot be written"), replacing_folder(out) as partial:
            (partial / "a").touch()
    inode = os.stat(out).st_ino
    with pytest.raises(KeyError), replacing_folder(out, force) as partial:
        (partial / "half").touch()
        raise KeyError
    assert os.listdir(out) == ["before"] * force
    with replacing_folder(out, force) as partial:
        (partial / "b").mkdir()
        (partial / "b" / "c").touch()
        (partial / "a").touch()
    assert sorted(os.listdir(out)) == ["a", "b"] and (out / "b" / "c").exists() and os.stat(out).st_ino == inode


def test_a_folder_moved_up_in_part_goes_back(tmp_path, monkeypatch):
    (tmp_path / "before").touch()
    monkeypatch.chdir(tmp_path)
    replace, moved = os.replace, []

    def full(old, new):
        moved.append(Path(new).name)
        if moved.count("b") == 1 and moved[-1] == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(DataError, match="No space"), replacing_folder(Path("."), force=True) as partial:
        (partial / "a").touch()
        (partial / "b").touch()
    assert os.listdir(tmp_path) == ["before"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_place_that_cannot_be_written_is_named(tmp_path, number):
    """A full disk is reported by write(2), without a name."""
    with pytest.raises(OSError) as caught, replacing(tmp_path / "a.json"):
        raise OSError(number, os.strerror(number))
    assert caught.value.filename == str(tmp_path / "a.json") and not os.listdir(tmp_path)
    with pytest.raises(DataError, match=f"out cannot be written: {os.strerror(number)}"), replacing_folder(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
