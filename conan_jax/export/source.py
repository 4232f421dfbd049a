"""What is exported: one step of one stage of a run, with its tokenizer and the mask it was trained under."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from conan_jax import config, config_io
from conan_jax.errors import CheckpointError, ConfigError
from conan_jax.files import read_json
from conan_jax.hf.importer import Origin, read_origin
from conan_jax.hf.manifest import OURS
from conan_jax.hf.text_settings import TextSettings
from conan_jax.inference.load import load, settled
from conan_jax.model import Causal, Embedder, SoftMask
from conan_jax.model.pooling import POOLINGS
from conan_jax.stages import make_stage
from conan_jax.stages.imported import KIND as IMPORTED
from conan_jax.train import checkpoint, start_rule


@dataclass(frozen=True)
class Source:
    """`params` is the Embedder's tree.

    `mask`: "causal" or "bidirectional"; `causal`: to be written as a language model; `origin`: what an imported model was, None for
    one that was trained here.
    """

    folder: Path  # of the run
    run: config.Run
    stage: config.Stage
    step: int
    params: Any
    tokenizer: Any
    prompts: dict[str, str]
    texts: TextSettings
    mask: str
    causal: bool
    origin: Origin | None

    @property
    def identity(self) -> dict[str, Any]:
        """Where the weights come from; `Encoder.identity` adds the sha256 of what was written."""
        return {"tokenizer_sha256": self.tokenizer.sha256, "run": self.run.name, "stage": self.stage.name, "step": self.step}


def open_source(folder: str | os.PathLike[str], stage: str | None = None, step: int | None = None) -> Source:
    """The step `step` (default: the newest) of the stage called `stage` (default: the last that was trained) of a run.

    `folder` is that of a run, or of one of its stages.

    Raises:
        CheckpointError: there is no such step, or it is damaged.
        ConfigError: the model has no form that PyTorch users can load: an unfinished mask, or a pooling of its own.
    """
    folder = Path(folder)
    if (folder / OURS).is_file():
        raise ConfigError(f"{folder} is an export already; name the folder of the run that it was made from")
    place, found = start_rule.locate(_place(folder, stage, step))
    loaded = load(f"{place}@{found}")
    metadata = checkpoint.read_metadata(place, found)
    run = config_io.from_dict(metadata["config"])
    stage_config, step = run.stage(metadata["stage"]), metadata["step"]
    mask = settled(make_stage(stage_config, Embedder(run.model)).mask(step))
    origin = read_origin(place.parent) if stage_config.kind == IMPORTED else None
    causal = isinstance(mask, Causal) and (origin is None or (origin.causal_form and not origin.embedder))
    if isinstance(mask, SoftMask):
        _refuse_unfinished_mask(mask, stage_config, step)
    if not causal:
        _refuse_pooling(run.model)
    return Source(place.parent, run, stage_config, step, loaded.params, loaded.tokenizer, loaded.prompts, loaded.texts,
                  "causal" if isinstance(mask, Causal) else "bidirectional", causal, origin)


def _place(folder: Path, stage: str | None, step: int | None) -> str:
    """What `start_rule.locate` finds them by."""
    if stage is not None and checkpoint.latest_step(folder / stage) is None:
        known = read_json(folder / "config.json")
        if known is None:
            raise CheckpointError(f"{folder} is no run: it has no config.json; name the folder that `conan train` wrote")
        config_io.from_dict(known).stage(stage)  # names the stages there are
        raise CheckpointError(f"stage {stage!r} of {folder} has no complete checkpoint; train it first, or leave --stage out")
    place = folder if stage is None else folder / stage
    return str(place) if step is None else f"{start_rule.locate(place)[0]}@{step}"


def _refuse_unfinished_mask(mask: SoftMask, stage: config.Stage, step: int) -> None:
    lowest = float(mask.weights(jnp.arange(2), jnp.array([2, 2])).min())
    raise ConfigError(
        f"at step {step} of {stage.steps} the stage {stage.name!r} attends through a mask between causal and bidirectional (it gives "
        f"the last token a weight of {lowest:.3g}), which no stock architecture has. Finish the stage (`conan train` goes on where it "
        "stopped), train the stage after it, or name a stage that is complete with --stage")


def _refuse_pooling(model: config.Model) -> None:
    if model.pooling not in POOLINGS:
        raise ConfigError(f"model.pooling {model.pooling!r} has no counterpart in sentence-transformers without remote code; "
                          f"train with {' or '.join(repr(name) for name in POOLINGS)} to export")
