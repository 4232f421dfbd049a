"""A step is what its manifest says or it is refused, by the name of the file; with fallback the one before it is used."""

import json
import shutil
import subprocess
import threading

import jax
import pytest

from conan_jax.errors import CheckpointError
from conan_jax.train import checkpoint, manifest, start_rule
from tests.train.test_checkpoint import RUN, STAGE, abstract, make_state, same, save


def place(folder, step):
    return folder / "checkpoints" / str(step)


def data_file(folder, step, item="params"):
    """The file that holds most of an item's numbers."""
    return max((path for path in place(folder, step).glob(f"{item}/**/d/*")), key=lambda path: path.stat().st_size)


def flip(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def add(path):
    path.with_name("another").write_text("a file that nobody wrote")


def start(folder, previous=None, fallback=False):
    return start_rule.find_start(folder, previous, RUN.model, "aaa", fallback)


def resume(folder, **options):
    return start_rule.load_start(start(folder, **options), abstract(make_state(0)), None, None)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_manifest_is_what_sha256sum_finds(tmp_path):
    step = place(save(tmp_path, 4), 4)
    command = ["find", ".", "-type", "f", "-exec", "sha256sum", "{}", "+"]
    listed = subprocess.run(command, cwd=step, capture_output=True, text=True, check=True)
    sums = {name.removeprefix("./"): digest for digest, name in (line.split("  ") for line in listed.stdout.splitlines())}
    sums.pop("manifest.json")
    written = json.loads((step / "manifest.json").read_text())
    assert written == {"step": 4, "files": {n: {"bytes": (step / n).stat().st_size, "sha256": s} for n, s in sums.items()}}
    assert {"_CHECKPOINT_METADATA", "metadata/metadata", "params/manifest.ocdbt"} < sums.keys()


@pytest.mark.parametrize("item", ["params", "train"])
@pytest.mark.parametrize("harm, what", [(flip, "does not have the sha256"), (truncate, "bytes long and was"), (remove, "is missing"),
                                        (add, "another does not belong there")])
def test_a_harmed_file_is_refused_by_name(tmp_path, item, harm, what):
    save(tmp_path / "own", 8)
    file = data_file(tmp_path / "own", 8, item)
    harm(file)
    name = file.relative_to(place(tmp_path / "own", 8)).as_posix()
    name = name.replace(file.name, "another") if harm is add else name
    for use in (lambda: start(tmp_path / "own"), lambda: start(tmp_path / "next", tmp_path / "own"),
                lambda: checkpoint.restore_state(tmp_path / "own", 8, abstract(make_state(0))),
                lambda: checkpoint.restore_params(tmp_path / "own", abstract=abstract(make_state(0)).params)):
        with pytest.raises(CheckpointError) as refused:
            use()
        message = str(refused.value)
        assert name in message and what in message and f"step 8 in {tmp_path / 'own'}" in message and "--fallback" in message
    if item == "params":
        with pytest.raises(CheckpointError, match=what):
            checkpoint.restore_params(tmp_path / "own")
    else:  # an encoder reads nothing of it, and needs it no more
        assert same(checkpoint.restore_params(tmp_path / "own"), make_state(8).params)


def test_every_byte_of_every_file_counts(tmp_path):
    """Also those that orbax does not look at, and the manifest's own."""
    save(tmp_path, 8)
    for file in sorted(path for path in place(tmp_path, 8).rglob("*") if path.is_file()):
        before = file.read_bytes()
        flip(file, at=min(12, len(before) - 1))
        with pytest.raises(CheckpointError) as refused:
            start(tmp_path)
        assert file.name == "manifest.json" or file.relative_to(place(tmp_path, 8)).as_posix() in str(refused.value)
        file.write_bytes(before)
    assert start(tmp_path).step == 8


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"step": 8, "files": []}', '{"step": 8, "files": {"a": {"bytes": 1}}}',
                                     '{"step": 4, "files": {}}', '{"step": 8, "files": {}}'])
def test_a_manifest_that_is_none_is_refused(tmp_path, content):
    (place(save(tmp_path, 8), 8) / "manifest.json").write_text(content)
    empty = content == '{"step": 8, "files": {}}'
    with pytest.raises(CheckpointError, match="does not belong there" if empty else "manifest.json cannot be used"):
        start(tmp_path)


def test_damaged_metadata_is_refused_by_name_before_it_is_believed(tmp_path):
    file = place(save(tmp_path, 8), 8) / "metadata" / "metadata"
    file.write_text(file.read_text().replace('"steps": 8', '"steps": 9'))
    with pytest.raises(CheckpointError, match="metadata/metadata does not have the sha256"):
        checkpoint.read_metadata(tmp_path)
    file.write_text("{")
    with pytest.raises(CheckpointError, match="metadata/metadata is 1 bytes long"):
        checkpoint.read_metadata(tmp_path)


def test_fallback_uses_the_newest_good_step_and_sets_the_damaged_aside(tmp_path):
    save(tmp_path, 2, 4, 6, 8, keep=4)
    flip(data_file(tmp_path, 8))
    truncate(data_file(tmp_path, 6, "train"))
    harmed = {step: data_file(tmp_path, step).relative_to(place(tmp_path, step)) for step in (6, 8)}
    contents = {step: (place(tmp_path, step) / name).read_bytes() for step, name in harmed.items()}
    with pytest.raises(CheckpointError, match="step 8 .*--fallback"):
        resume(tmp_path)
    assert names(tmp_path) == ["2", "4", "6", "8"]

    found = start(tmp_path, fallback=True)
    assert found == start_rule.Start("resume", tmp_path, 4, (8, 6)) and str(found).endswith("at step 4, the damaged step 8 and 6 set aside")
    assert same(start_rule.load_start(found, abstract(make_state(0)), None, None), make_state(4))
    assert names(tmp_path) == ["2", "4", "6.damaged", "8.damaged"] and checkpoint.latest_step(tmp_path) == 4
    for step, name in harmed.items():  # nothing is lost
        assert (place(tmp_path, f"{step}.damaged") / name).read_bytes() == contents[step]

    save(tmp_path, 6, 8, keep=4)  # the way on: the same steps again, and the damaged ones stay where they are
    assert names(tmp_path) == ["2", "4", "6", "6.damaged", "8", "8.damaged"] and same(resume(tmp_path), make_state(8))
    flip(data_file(tmp_path, 8))
    assert start(tmp_path, fallback=True).damaged == (8,) and "8.damaged2" in names(tmp_path)


def test_fallback_changes_nothing_where_all_is_well(tmp_path):
    save(tmp_path, 4, 6)
    assert start(tmp_path, fallback=True) == start_rule.Start("resume", tmp_path, 6) == start(tmp_path)
    assert start(tmp_path / "new", fallback=True).kind == "scratch" and names(tmp_path) == ["4", "6"]


def test_only_damaged_steps_are_an_error_and_stay(tmp_path):
    save(tmp_path, 4, 6)
    flip(data_file(tmp_path, 4))
    flip(data_file(tmp_path, 6))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="every step in .* is damaged .*step 6: .*step 4: .*--fresh"):
            start(tmp_path, fallback=True)
    assert names(tmp_path) == ["4", "6"]


def test_a_previous_stage_whose_end_is_damaged_must_be_finished_again(tmp_path):
    save(tmp_path / "previous", 4, 8)
    flip(data_file(tmp_path / "previous", 8))
    with pytest.raises(CheckpointError, match="step 8 .* is damaged"):
        start(tmp_path / "own", tmp_path / "previous")
    with pytest.raises(CheckpointError, match="stopped at step 4 of 8; start it again"):
        start(tmp_path / "own", tmp_path / "previous", fallback=True)


def test_a_start_is_verified_once(tmp_path, monkeypatch):
    save(tmp_path, 8)
    hashed = []
    monkeypatch.setattr(manifest, "_sha256", lambda path, real=manifest._sha256: hashed.append(path.name) or real(path))
    resume(tmp_path)
    assert sum(name == data_file(tmp_path, 8).name for name in hashed) == sum(data_file(tmp_path, 8).name in str(p)
                                                                              for p in place(tmp_path, 8).rglob("*"))


def test_files_are_divided_so_that_each_is_looked_at_by_one(tmp_path, monkeypatch):
    save(tmp_path, 8)
    step, hashed = place(tmp_path, 8), []
    monkeypatch.setattr(manifest, "_sha256", lambda path, real=manifest._sha256: hashed.append(path) or real(path))
    for part in range(3):
        assert manifest.damage(step, 8, part=part, parts=3) == ""
    assert sorted(hashed) == sorted(path for path in step.rglob("*") if path.is_file() and path.name != "manifest.json")
    flip(data_file(tmp_path, 8))
    assert sum(manifest.damage(step, 8, part=part, parts=3) != "" for part in range(3)) == 1


def test_training_does_not_wait_for_the_hashing(tmp_path, monkeypatch):
    release, hashing, real = threading.Event(), threading.Event(), manifest.write
    monkeypatch.setattr(manifest, "write", lambda *arguments: (hashing.set(), release.wait(60), real(*arguments)))
    checkpoints = checkpoint.Checkpoints(tmp_path, 1, checkpoint.make_metadata(RUN, STAGE, "aaa"))
    checkpoints.save(4, make_state(4))  # returns, though the hashing cannot end
    assert hashing.wait(60) and place(tmp_path, 4).is_dir() and checkpoint.latest_step(tmp_path) is None
    release.set()
    checkpoints.wait()
    assert checkpoint.latest_step(tmp_path) == 4
    checkpoints.close()


def test_a_step_without_manifest_is_none_and_goes(tmp_path):
    """As a kill during the hashing leaves it: committed by orbax, known to nobody."""
    save(tmp_path, 4, 6)
    (place(tmp_path, 6) / "manifest.json").rename(place(tmp_path, 6) / ".manifest.json.123")
    assert checkpoint.latest_step(tmp_path) == 4 and start(tmp_path).step == 4
    for read in (checkpoint.read_metadata, checkpoint.restore_params):
        with pytest.raises(CheckpointError, match="no complete checkpoint of step 6"):
            read(tmp_path, 6)
    save(tmp_path)
    assert names(tmp_path) == ["4"]
    save(tmp_path, 6)
    assert start(tmp_path).step == 6 and names(tmp_path) == ["4", "6"]


def test_an_older_step_goes_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    save(tmp_path, 4, keep=1)

    def full(*_):
        assert names(tmp_path) == ["4", "6"]
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as failed:
        patch.setattr(manifest, "write", full)
        save(tmp_path, 6, keep=1)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(make_state(6)))
    said = int(str(failed.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
    assert needed < said < needed + 2**21 and "No space left" in str(failed.value) and "older steps (4) are intact" in str(failed.value)
    assert checkpoint.latest_step(tmp_path) == 4 and same(resume(tmp_path), make_state(4))
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["6"] and same(resume(tmp_path), make_state(6))


def test_a_failure_is_told_once_by_the_next_call(tmp_path, monkeypatch):
    for call in ("save", "wait", "close"):
        checkpoints = checkpoint.Checkpoints(tmp_path / call, 1, checkpoint.make_metadata(RUN, STAGE, "aaa"))
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "write", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            checkpoints.save(4, make_state(4))
            with pytest.raises(CheckpointError, match="saving step 4 .* failed: OSError: .*Input/output error"):
                getattr(checkpoints, call)(*((5, make_state(5)) if call == "save" else ()))
        checkpoints.close()


def test_a_folder_of_an_earlier_version_is_left_alone(tmp_path):
    """Its steps were whole without a manifest, and nobody meant them to go."""
    step = place(save(tmp_path, 4), 4)
    (step / "manifest.json").unlink()
    file = step / "metadata" / "metadata"
    stored = json.loads(file.read_text())
    del stored["manifest"]
    file.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="step 4 .*earlier version.*--fresh"):
        save(tmp_path, 6)
    assert names(tmp_path) == ["4"]


def test_a_copy_of_a_stage_folder_is_as_good(tmp_path):
    shutil.copytree(save(tmp_path / "here", 8), tmp_path / "there")
    assert same(resume(tmp_path / "there"), make_state(8))
