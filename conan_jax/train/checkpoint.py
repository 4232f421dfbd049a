"""Checkpoints on disk, and where a stage starts from. The only file that knows orbax.

    FOLDER/checkpoints/STEP/params     the weights, alone, so that an encoder reads nothing else
    FOLDER/checkpoints/STEP/train      optimizer state, carry, step, counters
    FOLDER/checkpoints/STEP/metadata   JSON: format, stage, step, steps, tokenizer sha256, the whole configuration

A step exists once orbax has committed it; what a killed save leaves behind is never listed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from conan_jax import config
from conan_jax.config_io import to_dict
from conan_jax.errors import CheckpointError
from conan_jax.stages.base import Params
from conan_jax.train.state import TrainState

FORMAT = 1
# How the same weights are computed; everything else under `model` decides what they are or mean.
_FREE_MODEL_KEYS = {"max_length", "initializer_range", "embedding_initializer_range", "compute_dtype", "scan_layers", "remat",
                    "attention", "attention_block_size"}


def make_metadata(run: config.Run, stage: config.Stage, tokenizer_sha256: str) -> dict[str, Any]:
    """What every checkpoint of a stage says about itself, `step` aside."""
    return {"format": FORMAT, "stage": stage.name, "steps": stage.steps, "tokenizer_sha256": tokenizer_sha256, "config": to_dict(run)}


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    arrays = {name: ocp.StandardCheckpointHandler() for name in ("params", "train")}
    handlers = {**arrays, "metadata": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder.absolute() / "checkpoints", item_handlers=handlers, options=ocp.CheckpointManagerOptions(**options))


@contextlib.contextmanager
def _reader(folder: Path) -> Iterator[ocp.CheckpointManager]:
    with contextlib.closing(_manager(folder, create=False, save_root_metadata=False)) as manager:
        yield manager


@contextlib.contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Turn what orbax and the file system raise into one error that says what was being done."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{doing} failed: {type(error).__name__}: {' / '.join(lines[:6])[:600]}") from error


class Checkpoints:
    """The checkpoints one running stage writes: asynchronous, the newest `keep` stay.

    A save that fails in the background is raised by the next call as `CheckpointError`; the object is then of no
    further use (the step would still be listed), and a new one must be made.
    """

    def __init__(self, folder: Path, keep: int, metadata: dict[str, Any]) -> None:
        self.folder, self._metadata = folder, metadata
        with _explained(f"opening {folder / 'checkpoints'} for writing"):
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._manager = _manager(folder, max_to_keep=keep, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=True)

    def save(self, step: int, state: TrainState) -> None:
        """Start writing `state` under `step`; returns when the arrays may be overwritten. A step already there is kept."""
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(params=ocp.args.StandardSave(state.params), train=ocp.args.StandardSave(_train_item(state)),
                                   metadata=ocp.args.JsonSave(dict(self._metadata, step=step)))
        with _explained(f"saving step {step} in {self.folder}"):
            self._manager.save(step, args=items)

    def wait(self) -> None:
        """Block until what was saved is committed."""
        with _explained(f"saving in {self.folder}"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then release the threads."""
        with _explained(f"saving in {self.folder}"):
            self._manager.close()


def latest_step(folder: Path) -> int | None:
    """The newest complete step of a stage folder, None when there is none."""
    if not (folder / "checkpoints").is_dir():
        return None
    with _reader(folder) as manager:
        return manager.latest_step()


def _existing_step(folder: Path, step: int | None) -> int:
    found = latest_step(folder) if step is None else step
    if found is None or not (folder / "checkpoints" / str(found)).is_dir():
        raise CheckpointError(f"{folder} holds no complete checkpoint{'' if step is None else f' of step {step}'}; train the stage first")
    return found


def read_metadata(folder: Path, step: int | None = None) -> dict[str, Any]:
    """Metadata of a checkpoint (default: the newest). Raises `CheckpointError` when there is none or its format is unknown."""
    step = _existing_step(folder, step)
    with _reader(folder) as manager, _explained(f"reading the metadata of {folder} step {step}"):
        metadata = manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{folder} step {step} has checkpoint format {metadata.get('format')!r}; this version reads {FORMAT}")
    return metadata


def restore_params(folder: Path, step: int | None = None, abstract: Params | None = None) -> Params:
    """The weights alone, from the newest step by default.

    `abstract`: `ShapeDtypeStruct`s with the shardings to restore onto; by default every array lands whole on the first device.
    """
    step = _existing_step(folder, step)
    with _reader(folder) as manager, _explained(f"restoring the weights of {folder} step {step}"):
        if abstract is None:
            here = SingleDeviceSharding(jax.local_devices()[0])
            stored = manager.item_metadata(step)["params"]
            abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), stored)
        return manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract)))["params"]


def restore_state(folder: Path, step: int, abstract: TrainState) -> TrainState:
    """The whole state, onto the shardings of `abstract` (of another mesh than it was saved from, if need be).

    Raises `CheckpointError` naming the arrays whose presence, shape or dtype differs.
    """
    wanted = {"params": abstract.params, "train": _train_item(abstract)}
    with _reader(folder) as manager, _explained(f"resuming from {folder} step {step}"):
        differing = _differences(manager.item_metadata(step), wanted)
        if differing:
            more = " ..." if len(differing) > 5 else ""
            raise CheckpointError(f"{folder} step {step} does not fit this run: {'; '.join(differing[:5])}{more}. "
                                  "Did the data, the optimizer or the stage change? Change it back, or use another output_dir")
        restored = manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}))
    return TrainState(params=restored["params"], **restored["train"])


def _train_item(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("step", "opt_state", "carry", "skipped", "skipped_in_row")}


def _differences(stored: Mapping[str, Any], wanted: dict[str, Any]) -> list[str]:
    there, here = _described({name: stored[name] for name in wanted}), _described(wanted)
    return [f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
            for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]


def _described(tree: Any) -> dict[str, str]:
    """`{"train.carry.s0": "float32[16]"}`"""
    return {jax.tree_util.keystr(path, simple=True, separator="."): f"{np.dtype(a.dtype).name}{list(a.shape)}"
            for path, a in jax.tree_util.tree_flatten_with_path(tree)[0]}


@dataclass(frozen=True)
class Start:
    """Where a stage begins. `folder` and `step` name the checkpoint, unless it is from scratch."""

    kind: Literal["resume", "previous", "scratch"]
    folder: Path | None = None
    step: int = 0

    def __str__(self) -> str:
        return {"resume": f"resume {self.folder} at step {self.step}", "previous": f"weights of {self.folder} (step {self.step})",
                "scratch": "from scratch"}[self.kind]


def find_start(folder: Path, previous_folder: Path | None, model: config.Model, tokenizer_sha256: str) -> Start:
    """The start rule: resume own run -> previous stage's weights -> scratch.

    Raises `CheckpointError` when the checkpoint belongs to another tokenizer or model, or the previous stage stopped half-way.
    """
    own = latest_step(folder)
    if own is not None:
        check_compatible(folder, read_metadata(folder, own), model, tokenizer_sha256)
        return Start("resume", folder, own)
    previous = latest_step(previous_folder) if previous_folder is not None else None
    if previous is None:
        return Start("scratch")
    metadata = read_metadata(previous_folder, previous)
    check_compatible(previous_folder, metadata, model, tokenizer_sha256)
    if previous < metadata["steps"]:
        raise CheckpointError(f"stage {metadata['stage']!r} in {previous_folder} stopped at step {previous} of {metadata['steps']}; "
                              "start it again to finish it before the stage that follows")
    return Start("previous", previous_folder, previous)


def check_compatible(folder: Path, metadata: dict[str, Any], model: config.Model, tokenizer_sha256: str) -> None:
    """Raises `CheckpointError` naming both hashes, or the model keys that differ with both values."""
    if metadata["tokenizer_sha256"] != tokenizer_sha256:
        raise CheckpointError(f"{folder} was trained with tokenizer {metadata['tokenizer_sha256']} "
                              f"and this run has tokenizer {tokenizer_sha256}: the same ids would mean other text; "
                              "use the tokenizer it was trained with, or another output_dir")
    stored, ours = metadata["config"]["model"], to_dict(model)
    differing = [key for key in sorted(stored.keys() | ours.keys()) if key not in _FREE_MODEL_KEYS and stored.get(key) != ours.get(key)]
    if differing:
        pairs = ", ".join(f"model.{key} is {stored.get(key)!r} there and {ours.get(key)!r} here" for key in differing)
        raise CheckpointError(f"{folder} holds another model: {pairs}; change the configuration back, or use another output_dir")


def load_start(start: Start, abstract: TrainState, scratch: Callable[[], Params], begin: Callable[[Params], TrainState]) -> TrainState:
    """The first state: resumed whole, or begun from the previous stage's weights, or from `scratch()` ones."""
    if start.kind == "resume":
        return restore_state(start.folder, start.step, abstract)
    return begin(restore_params(start.folder, start.step, abstract.params) if start.kind == "previous" else scratch())
