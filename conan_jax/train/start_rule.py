"""Where a stage starts from: its own last step, the stage before it, another run, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from conan_jax import config
from conan_jax.config_io import from_dict, split_step, to_dict
from conan_jax.errors import CheckpointError
from conan_jax.files import read_json
from conan_jax.stages.base import Params
from conan_jax.train import checkpoint, step_folders, together
from conan_jax.train.state import TrainState

# How the same weights are computed; everything else under `model` decides what they are or mean.
_FREE_MODEL_KEYS = {"max_length", "initializer_range", "embedding_initializer_range", "compute_dtype", "scan_layers", "remat",
                    "attention", "attention_block_size"}
# What may differ besides where the weights of another run are a beginning.
FREE_AT_A_START = {"pooling", "hidden_dropout"}


@dataclass(frozen=True)
class Start:
    """Where a stage begins. `folder` and `step` name the checkpoint, unless it is from scratch.

    `damaged`: newer steps that were set aside, because files of theirs were not as written.
    """

    kind: Literal["resume", "previous", "initial", "scratch"]
    folder: Path | None = None
    step: int = 0
    damaged: tuple[int, ...] = ()
    verified: bool = field(default=False, compare=False, repr=False)

    def __str__(self) -> str:
        aside = f", the damaged step {' and '.join(map(str, self.damaged))} set aside" if self.damaged else ""
        weights = f"weights of {self.folder} (step {self.step})"
        return {"resume": f"resume {self.folder} at step {self.step}", "previous": weights, "initial": f"{weights}, as init_from says",
                "scratch": "from scratch"}[self.kind] + aside


def find_start(folder: Path, previous_folder: Path | None, model: config.Model, tokenizer_sha256: str, fallback: bool = False,
               init_from: str | None = None) -> Start:
    """The start rule: resume own run -> previous stage's weights -> those of `init_from` -> scratch. All processes call it together.

    `init_from`, as `locate` takes it, is for a stage that has none before it, or is trained alone. A damaged step is refused; with `fallback` it is set aside as
    `STEP.damaged` and the newest good one before it is used.
    Raises `CheckpointError` when there is no good one, when it belongs to another tokenizer or model, or when the previous
    stage stopped half-way.
    """
    own, damaged = _good_step(folder, fallback)
    if own is not None:
        check_compatible(folder, checkpoint.read_metadata(folder, own), model, tokenizer_sha256)
        return Start("resume", folder, own, damaged, verified=True)
    previous, damaged = _good_step(previous_folder, fallback) if previous_folder is not None else (None, ())
    if previous is None and init_from is not None:
        place, step = locate(init_from)
        _check_initial(place, step, model, tokenizer_sha256)
        return Start("initial", place, step)
    if previous is None:
        return Start("scratch")
    _check_previous(previous_folder, previous, model, tokenizer_sha256)
    return Start("previous", previous_folder, previous, damaged, verified=True)


def refuse_unfit(previous_folder: Path | None, model: config.Model, tokenizer_sha256: str, init_from: str | None = None) -> None:
    """Raise what `find_start` will raise of a stage without steps of its own, by the metadata alone; one process is enough."""
    previous = checkpoint.latest_step(previous_folder) if previous_folder is not None else None
    if previous is not None:
        _check_previous(previous_folder, previous, model, tokenizer_sha256)
    elif init_from is not None:
        _check_initial(*locate(init_from), model, tokenizer_sha256)


def _check_initial(place: Path, step: int, model: config.Model, tokenizer_sha256: str) -> None:
    if found := mismatch(checkpoint.read_metadata(place, step), model, tokenizer_sha256, FREE_AT_A_START):
        raise CheckpointError(f"{place} {found}; start with --init-from, which takes model and tokenizer from there, give the recipe "
                              "the same ones, or name another run in init_from")


def _check_previous(folder: Path, step: int, model: config.Model, tokenizer_sha256: str) -> None:
    metadata = checkpoint.read_metadata(folder, step)
    check_compatible(folder, metadata, model, tokenizer_sha256)
    if step < metadata["steps"]:
        raise CheckpointError(f"stage {metadata['stage']!r} in {folder} stopped at step {step} of {metadata['steps']}; "
                              "start it again to finish it before the stage that follows")


def _good_step(folder: Path, fallback: bool) -> tuple[int | None, tuple[int, ...]]:
    """The newest step whose files are as written, and the damaged ones after it, set aside. (None, ()) when there are no steps."""
    damaged: dict[int, str] = {}
    while (step := together.from_process_0(step_folders.newest(folder, below=min(damaged, default=None)) or 0)) > 0:
        damage = checkpoint.damage_of(folder, step)
        if not damage:
            checkpoint.on_process_0(f"setting damaged steps of {folder} aside", lambda: step_folders.set_aside(folder, damaged))
            return step, tuple(damaged)
        if not fallback:
            step_folders.refuse_damage(folder, step, damage)
        damaged[step] = damage
    if damaged:
        found = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
        raise CheckpointError(f"every step in {folder} is damaged ({found}), so there is none to fall back to. "
                              "Put the files back from a copy, or train the stage anew with --fresh")
    return None, ()


def check_compatible(folder: Path, metadata: dict[str, Any], model: config.Model, tokenizer_sha256: str) -> None:
    """Raises `CheckpointError` naming both hashes, or the model keys that differ with both values."""
    if found := mismatch(metadata, model, tokenizer_sha256):
        raise CheckpointError(f"{folder} {found}; change the configuration back, or use another output_dir")


def mismatch(metadata: dict[str, Any], model: config.Model, tokenizer_sha256: str, free: Set[str] = frozenset()) -> str:
    """Why the weights of a checkpoint are not those of `model` and a tokenizer, "" when they are. `free`: model keys that may differ."""
    if metadata["tokenizer_sha256"] != tokenizer_sha256:
        return (f"was trained with tokenizer {metadata['tokenizer_sha256']} and this run has tokenizer {tokenizer_sha256}: "
                "the same ids would mean other text")
    # A key that an earlier version did not know had its default there.
    stored, ours = {**to_dict(config.Model()), **metadata["config"]["model"]}, to_dict(model)
    differing = [key for key in sorted(stored.keys() | ours.keys())
                 if key not in _FREE_MODEL_KEYS | free and stored.get(key) != ours.get(key)]
    pairs = ", ".join(f"model.{key} is {stored.get(key)!r} there and {ours.get(key)!r} here" for key in differing)
    return f"holds another model: {pairs}" if pairs else ""


def locate(place: str | Path) -> tuple[Path, int]:
    """(stage folder, step) of what `RUN`, `RUN/STAGE` or `RUN/STAGE@STEP` names: by default the last stage that has steps, and its newest.

    Raises `CheckpointError` when there is no such complete step.
    """
    folder, step = split_step(place)
    if checkpoint.latest_step(folder) is None and (settings := read_json(folder / "config.json")) is not None:
        names = [stage.name for stage in from_dict(settings).stages]
        trained = [folder / name for name in names if checkpoint.latest_step(folder / name) is not None]
        if not trained:
            raise CheckpointError(f"no stage of {folder} has a complete checkpoint; train it first, or name another folder")
        folder = trained[-1]
    if checkpoint.latest_step(folder) is None:
        raise CheckpointError(f"there is no trained model in {folder}, no complete checkpoint: train one with `conan demo` or "
                              "`conan train`, or name its folder")
    return folder, step_folders.existing(folder, step)


def load_start(start: Start, abstract: TrainState, scratch: Callable[[], Params], begin: Callable[[Params], TrainState]) -> TrainState:
    """The first state: resumed whole, or begun from the weights of another stage, or from `scratch()` ones."""
    if start.kind == "resume":
        return checkpoint.restore_state(start.folder, start.step, abstract, start.verified)
    return begin(scratch() if start.folder is None else checkpoint.restore_params(start.folder, start.step, abstract.params, start.verified))
