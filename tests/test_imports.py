"""The rooms of docs/ARCHITECTURE.md: no import points up, heavy data libraries stay in the data room."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "conan_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Later rooms may import earlier ones; within one number only the same room.
FOUNDATION = {"errors", "files", "config", "config_io", "allocator", "hardware", "folder_lock", "versions", "figures", "units"}
LEVEL = dict.fromkeys(FOUNDATION, 0) | {
    "distributed": 1, "launch": 1, "sharding": 2, "data": 2, "losses": 2, "model": 3, "stages": 4, "train": 5, "preflight": 6,
    "hf": 6, "inference": 7, "eval": 8, "export": 8, "cli": 9, "__main__": 10,
}


def imported(file: Path) -> set[str]:
    """Full names of the modules a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(name: str) -> str | None:
    """The room of `conan_jax.ROOM...`; None for other packages and for the package's own name."""
    parts = name.split(".")
    return parts[1] if parts[0] == "conan_jax" and len(parts) > 1 and parts[1] in LEVEL else None


def violations(room: str, names: set[str]) -> list[str]:
    """The imports of `names` that a file of `room` may not have."""
    bad = []
    for name in sorted(names):
        target = room_of(name)
        if target is None or target == room:
            continue
        if room == "losses" or not (LEVEL[target] < LEVEL[room] or {target, room} <= FOUNDATION):
            bad.append(name)
        if room in ("hf", "inference", "eval", "export") and target == "train" and not name.startswith(("conan_jax.train.checkpoint", "conan_jax.train.start_rule")):
            bad.append(f"{name} ({room} may find, read and write checkpoints and know nothing else of train)")
        if room == "train" and target == "stages" and not name.startswith("conan_jax.stages.base"):
            bad.append(f"{name} (train knows stages.base only)")
        if room == "train" and target in ("data", "model", "losses"):
            bad.append(f"{name} (train is handed its model and pipeline)")
        if room == "model" and target == "sharding":
            bad.append(f"{name} (the model knows axis names, never a mesh)")
    return bad


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_arrows_point_down(file):
    relative = file.relative_to(PACKAGE)
    if relative == Path("__init__.py"):
        assert not {room_of(n) for n in imported(file)} & {"cli", "train"}
        return
    room = relative.parts[0].removesuffix(".py")
    assert room in LEVEL, f"{relative} is in no room of docs/ARCHITECTURE.md"
    assert violations(room, imported(file)) == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_data_libraries_stay_in_the_data_room(file):
    roots = {name.split(".")[0] for name in imported(file)}
    if file.relative_to(PACKAGE).parts[0] != "data":
        assert not roots & {"grain", "tensorflow_datasets", "array_record", "tensorflow"}


def test_orbax_stays_in_one_file():
    users = [str(f.relative_to(PACKAGE)) for f in FILES if "orbax" in {n.split(".")[0] for n in imported(f)}]
    assert users == ["train/checkpoint.py"]


@pytest.mark.parametrize("room, name", [
    ("losses", "conan_jax.errors.DataError"), ("model", "conan_jax.stages.base"), ("train", "conan_jax.stages.weak"),
    ("train", "conan_jax.data.pipeline"), ("train", "conan_jax.inference.encoder"), ("data", "conan_jax.losses.lm"),
    ("eval", "conan_jax.train.loop.train_stage"), ("model", "conan_jax.sharding"), ("config", "conan_jax.model"),
])
def test_the_checker_sees_an_arrow_that_points_up(room, name):
    assert violations(room, {name})


@pytest.mark.parametrize("room, name", [
    ("cli", "conan_jax.train.loop.train_stage"), ("eval", "conan_jax.train.checkpoint.restore_params"),
    ("stages", "conan_jax.losses.lm"), ("data", "conan_jax.errors.DataError"), ("train", "conan_jax.sharding"),
])
def test_the_checker_lets_a_good_arrow_pass(room, name):
    assert violations(room, {name}) == []
