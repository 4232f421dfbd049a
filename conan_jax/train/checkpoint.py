"""Checkpoints on disk. The only file that knows orbax.

    FOLDER/checkpoints/STEP/params     the weights, alone, so that an encoder reads nothing else
    FOLDER/checkpoints/STEP/train      optimizer state, carry, step, counters
    FOLDER/checkpoints/STEP/metadata   JSON: format, stage, step, steps, tokenizer sha256, the whole configuration
    FOLDER/checkpoints/STEP/manifest.json   bytes and sha256 of all these files, written last (`train/manifest.py`)

A step exists once it has its manifest; what a killed save leaves behind is never listed, and goes when the folder is next
opened for writing. Only then do older steps give way, so the last good one outlives any failure of the next.

A state is restored exactly, bit for bit, onto any mesh and any number of hosts. What follows is bit-identical on the mesh it
was saved from; on another one sums are taken in another order, and the loss differs in about the 7th digit (float32).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from conan_jax import config
from conan_jax.config_io import to_dict
from conan_jax.errors import CheckpointError
from conan_jax.stages.base import Params
from conan_jax.train import manifest, step_folders, together
from conan_jax.train.state import TrainState
from conan_jax.train.step_folders import step_folder

FORMAT = 1
_MEETINGS = itertools.count()  # every meeting of processes has its own name
# Orbax raises what goes wrong in its threads, and we explain it; it logs the traceback as well.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))


def make_metadata(run: config.Run, stage: config.Stage, tokenizer_sha256: str) -> dict[str, Any]:
    """What every checkpoint of a stage says about itself, `step` aside."""
    return {"format": FORMAT, "stage": stage.name, "steps": stage.steps, "tokenizer_sha256": tokenizer_sha256,
            "manifest": "sha256", "config": to_dict(run)}


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    arrays = {name: ocp.StandardCheckpointHandler() for name in ("params", "train")}
    handlers = {**arrays, "metadata": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder.absolute() / "checkpoints", item_handlers=handlers, options=ocp.CheckpointManagerOptions(**options))


@contextlib.contextmanager
def _reader(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """A manager that waits for no other process: each reads what it needs."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"reader{here}")
    with contextlib.closing(_manager(folder, create=False, save_root_metadata=False, multiprocessing_options=alone)) as manager:
        yield manager


@contextlib.contextmanager
def _explained(doing: str, advice: Callable[[], str] = str) -> Iterator[None]:
    """Turn what orbax and the file system raise into one error that says what was being done, and then `advice()`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{doing} failed: {type(error).__name__}: {' / '.join(lines[:6])[:600]}{advice()}") from error


def _first_complaint(text: str) -> str:
    """The `text` of the first process that has any, in all of them. Waits as long as work on many gigabytes may take."""
    ocp.multihost.get_barrier_sync_fn()(key=f"conan checkpoint {next(_MEETINGS)}", timeout_ms=3_600_000)  # a collective gives up sooner
    return together.first_complaint(text)


def _agree(failure: Exception | None) -> None:
    """Raise in every process what went wrong in any."""
    if message := _first_complaint(str(failure or "")):
        raise failure or CheckpointError(message)


def on_process_0(doing: str, action: Callable[[], None], advice: Callable[[], str] = str) -> None:
    """Process 0 alone does it while the others wait; every process raises the `CheckpointError` it ends in."""
    failure = None
    try:
        if jax.process_index() == 0:
            with _explained(doing, advice):
                action()
    except CheckpointError as error:
        failure = error
    _agree(failure)


def write_weights(folder: Path, step: int, params: Params, metadata: dict[str, Any]) -> None:
    """A checkpoint of weights that were not trained here: no optimizer state, so nothing resumes it, and every stage can start from it.

    Raises `CheckpointError` when the disk is too full.
    """
    zero = np.zeros((), np.int32)
    state = TrainState(step=zero + np.int32(step), params=params, opt_state={}, carry={}, skipped=zero, skipped_in_row=zero)
    with contextlib.closing(Checkpoints(folder, keep=1, metadata=metadata)) as checkpoints:
        checkpoints.save(step, state)
        checkpoints.wait()


class Checkpoints:
    """The checkpoints one running stage writes: asynchronous, the newest `keep` stay.

    A save that fails in the background is raised by the next call as `CheckpointError`; the object is then of no further
    use, and a new one is for a new process: orbax may still list the step, and still be writing parts of it.
    Several processes write into one shared folder: they make the object, and call `save` and `wait`, together.
    """

    def __init__(self, folder: Path, keep: int, metadata: dict[str, Any]) -> None:
        self.folder, self._keep, self._metadata = folder, keep, metadata
        self._finisher: threading.Thread | None = None
        self._committed, self._failure = False, None  # of the save in flight: by every process; what went wrong
        opening = f"opening {folder / 'checkpoints'} for writing"
        on_process_0(opening, lambda: step_folders.clear_torn(folder))
        with _explained(opening):
            # Orbax would let older steps go before the new one has its manifest: `_finish` does that instead.
            self._manager = _manager(folder, create=True, enable_async_checkpointing=True)

    def save(self, step: int, state: TrainState) -> None:
        """Start writing `state` under `step`; returns when the arrays may be overwritten. A step already there is kept.

        Raises `CheckpointError` when the disk is too full for it, naming the bytes needed, or when the save before this one failed.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        size = sum(array.nbytes for array in jax.tree.leaves(state))
        needed = size + size // 1000 + 2**20  # names, shapes and shardings take some hundred bytes an array and device
        saving, room = f"saving step {step} in {self.folder}", partial(step_folders.room, self.folder, step, needed)
        on_process_0(saving, lambda: step_folders.refuse_full_disk(self.folder, needed), room)
        items = ocp.args.Composite(params=ocp.args.StandardSave(state.params), train=ocp.args.StandardSave(_train_item(state)),
                                   metadata=ocp.args.JsonSave(dict(self._metadata, step=step)))
        with _explained(saving, room):
            self._manager.save(step, args=items, force=True)
        self._committed = False
        self._finisher = threading.Thread(target=self._finish, args=(step, partial(_explained, saving, room)), name=f"finish-{step}")
        self._finisher.start()

    def _finish(self, step: int, explained: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        """In the background: when every process has committed, process 0 writes the manifest, and only then old steps go."""
        try:
            with explained():
                self._manager.wait_until_finished()
                self._committed = True
                if jax.process_index() == 0:
                    manifest.write(step_folder(self.folder, step), step)
                    step_folders.keep_newest(self.folder, self._keep)
        except Exception as failure:  # the next call raises it
            self._failure = failure

    def wait(self) -> None:
        """Block until what was saved is committed and has its manifest, whichever process writes it."""
        finishing, failure = self._finisher is not None, self._joined()
        if finishing and self._committed:  # in every process, so all of them come here
            _agree(failure)
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait for this process's part, then release the threads. Other processes may be gone: `wait` before to hear of them."""
        failure = self._joined()
        with _explained(f"saving in {self.folder}"):
            self._manager.close()
        if failure is not None:
            raise failure

    def _joined(self) -> Exception | None:
        """Wait for the background; what went wrong there, told once."""
        if self._finisher is not None:
            self._finisher.join()
        failure, self._failure, self._finisher = self._failure, None, None
        try:
            with _explained(f"saving in {self.folder}"):
                self._manager.wait_until_finished()  # orbax tells it once a thread
        except CheckpointError as again:
            failure = failure or again
        return failure


def latest_step(folder: Path) -> int | None:
    """The newest complete step of a stage folder, None when there is none. Its files are not looked into."""
    return step_folders.newest(folder)


def identity(folder: Path, step: int) -> dict[str, Any]:
    """The step, and the sha256 of its manifest, which holds the sha256 of every file: no other checkpoint has the same."""
    return {"step": step, "checkpoint_sha256": manifest.sha256(step_folder(folder, step_folders.existing(folder, step)))}


def damage_of(folder: Path, step: int) -> str:
    """What is wrong with a step, found by all processes together, each looking at its share of the files; "" when all is well."""
    return _first_complaint(manifest.damage(step_folder(folder, step), step, part=jax.process_index(), parts=jax.process_count()))


def read_metadata(folder: Path, step: int | None = None) -> dict[str, Any]:
    """Metadata of a checkpoint (default: the newest).

    Raises `CheckpointError` when there is none, when it is not as it was written, or when its format is unknown.
    """
    step = step_folders.existing(folder, step)
    damage = manifest.damage(step_folder(folder, step), step, items=("metadata",))
    try:
        with _reader(folder) as manager, _explained(f"reading the metadata of {folder} step {step}"):
            metadata = manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]
    except CheckpointError:
        step_folders.refuse_damage(folder, step, damage)
        raise
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{folder} step {step} has checkpoint format {metadata.get('format')!r}; this version reads {FORMAT}")
    step_folders.refuse_damage(folder, step, damage)
    return metadata


def restore_params(folder: Path, step: int | None = None, abstract: Params | None = None, verified: bool = False) -> Params:
    """The weights alone, from the newest step by default.

    `abstract`: `ShapeDtypeStruct`s with the shardings to restore onto, which all processes do together; by default every array
    lands whole on this process's first device, nobody else takes part, and only the files that are read are verified.
    `verified`: the step was found to be whole a moment ago.
    Raises `CheckpointError` naming the file that is not as it was written.
    """
    step = step_folders.existing(folder, step)
    if not verified:
        step_folders.refuse_damage(folder, step, damage_of(folder, step) if abstract is not None else
                                   manifest.damage(step_folder(folder, step), step, items=("params", "metadata")))
    with _reader(folder) as manager, _explained(f"restoring the weights of {folder} step {step}"):
        if abstract is None:
            here = SingleDeviceSharding(jax.local_devices()[0])
            stored = ocp.StandardCheckpointHandler().metadata(step_folder(folder, step).absolute() / "params")  # opens nothing else
            abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), stored)
        return manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract)))["params"]


def restore_state(folder: Path, step: int, abstract: TrainState, verified: bool = False) -> TrainState:
    """The whole state, onto the shardings of `abstract` (of another mesh than it was saved from, if need be), by all processes together.

    `verified`: as above. Raises `CheckpointError` naming the file that is not as it was written, or the arrays whose presence,
    shape or dtype differs.
    """
    if not verified:
        step_folders.refuse_damage(folder, step, damage_of(folder, step_folders.existing(folder, step)))
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
