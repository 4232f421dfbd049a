"""A folder -> an encoder: of a run, of one of its stages, or of an export."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conan_jax import config, config_io
from conan_jax.data.locations import expand_variables
from conan_jax.data.prepared import tokenizer_places
from conan_jax.data.tokenizer import AnyTokenizer, Tokenizer
from conan_jax.errors import CheckpointError, ConfigError, DataError
from conan_jax.files import read_json
from conan_jax.hf.manifest import OURS, OURS_FORMAT, refuse_altered
from conan_jax.hf.text_settings import TextSettings
from conan_jax.hf.weights import DAMAGED, from_tensors, read_tensors
from conan_jax.inference.prompts import prompts_of
from conan_jax.model import Bidirectional, Causal, Embedder, Mask
from conan_jax.stages import make_stage
from conan_jax.stages.imported import KIND as IMPORTED
from conan_jax.train import checkpoint, start_rule


class Loaded(NamedTuple):
    """What an `Encoder` is made of, in the order of its arguments."""

    params: Any
    model: config.Model
    tokenizer: AnyTokenizer
    mask: Mask
    identity: dict[str, Any]
    prompts: dict[str, str]
    texts: TextSettings = TextSettings()


def load(folder: str | os.PathLike[str]) -> Loaded:
    """Read an export of `conan export`, or weights: `RUN`, `RUN/STAGE` or `RUN/STAGE@STEP`, by default the last stage's newest.

    Raises:
        CheckpointError: there is no complete checkpoint, no tokenizer with the recorded sha256, or a file of an export is not as
            it was written.
        ConfigError: `folder` is no path.
        DataError: the description of an export cannot be read.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ConfigError(f"name the folder of a run, of a stage or of an export, got {folder!r:.80}")
    folder = Path(folder)
    return _load_export(folder) if (folder / OURS).is_file() else _load_stage(*start_rule.locate(folder))


def untrained(run: config.Run, tokenizer: AnyTokenizer) -> Loaded:
    """The model of `run` before its first step, with its first stage's mask at step 0: what training is measured against."""
    embedder = Embedder(run.model)
    params = jax.jit(embedder.init)(jax.random.key(run.seed))
    identity = {"run": run.name, "stage": "untrained", "step": 0}
    return Loaded(params, run.model, tokenizer, make_stage(run.stages[0], embedder).mask(0), identity, prompts_of(run))


def _load_stage(folder: Path, step: int) -> Loaded:
    metadata = checkpoint.read_metadata(folder, step)
    run = config_io.from_dict(metadata["config"])
    stage = run.stage(metadata["stage"])
    mask = settled(make_stage(stage, Embedder(run.model)).mask(stage.steps))
    tokenizer = find_tokenizer(run, folder, metadata["tokenizer_sha256"])
    identity = {"run": run.name, "stage": stage.name, "step": metadata["step"]}
    options = stage.options if stage.kind == IMPORTED else {}
    texts, prompts = config_io.build(TextSettings, options.get("texts", {}), "texts"), options.get("prompts") or prompts_of(run)
    return Loaded(checkpoint.restore_params(folder, step), run.model, tokenizer, mask, identity, prompts, texts)


def settled(mask: Mask) -> Mask:
    """A soft mask that hides nothing any more as what it has become, `Bidirectional`, which takes less time."""
    lowest = float(mask.weights(jnp.arange(2), jnp.array([2, 2])).min())  # M is smallest at the last token, whatever the length
    return Bidirectional() if lowest >= 1 else mask


def _load_export(folder: Path) -> Loaded:
    described = read_json(folder / OURS, advice=DAMAGED)
    if described.get("format") != OURS_FORMAT:
        raise CheckpointError(f"{folder / OURS} has format {described.get('format')!r}; this version reads {OURS_FORMAT}")
    refuse_altered(folder, _is_read)
    try:
        model = config_io.build(config.Model, described["model"], "model")
        mask = {"causal": Causal(), "bidirectional": Bidirectional()}[described["mask"]]
        identity, prompts = dict(described["identity"]), dict(described["prompts"])
        texts = config_io.build(TextSettings, described.get("texts", {}), "texts")
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / OURS} is damaged ({type(error).__name__}: {error}); export the run again") from error
    return Loaded(from_tensors(read_tensors(folder), model, str(folder)), model, Tokenizer.load(folder), mask, identity, prompts, texts)


def _is_read(name: str) -> bool:
    """Whether this file of an export is read here; the others are for other readers."""
    return name.endswith(".safetensors") or name in (OURS, "tokenizer.model", "tokenizer.json", "conan_tokenizer.json")


def find_tokenizer(run: config.Run, stage_folder: Path, sha256: str) -> AnyTokenizer:
    """The tokenizer with the recorded sha256: where `prepared.json` or the recipe says, or anywhere in the prepared data.

    Raises `CheckpointError` when there is none.
    """
    places = tokenizer_places(stage_folder.parent, run)
    seen = []
    if run.tokenizer.path is not None:
        try:
            places.insert(0, Path(expand_variables(run.tokenizer.path)))
        except DataError as error:
            seen.append(str(error))
    for place in places:
        try:
            tokenizer = Tokenizer.load(place)
        except DataError as error:
            seen.append(str(error))
            continue
        if tokenizer.sha256 == sha256:
            return tokenizer
        seen.append(f"{place} has sha256 {tokenizer.sha256}")
    raise CheckpointError(f"{stage_folder} was trained with the tokenizer {sha256}, which is not there: {'; '.join(seen)}")
