"""`Encoder`: texts in, unit vectors out. What evaluation, search and `conan_jax.Encoder` use."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32
from rich.progress import track

from conan_jax import config, config_io
from conan_jax.data.locations import expand_variables
from conan_jax.data.tokenizer import Tokenizer
from conan_jax.errors import CheckpointError, ConfigError, DataError
from conan_jax.inference.prompts import DOCUMENT, QUERY, prompts_of
from conan_jax.inference.tokens import prompt_tokens, token_rows
from conan_jax.model import Bidirectional, Embedder
from conan_jax.stages import make_stage
from conan_jax.train import checkpoint

DEFAULT_MAX_LENGTH = 512
SMALLEST_BUCKET = 16
TEXTS_PER_ROUND = 8192  # texts that are sorted by length together; bounds the memory of token arrays


@functools.partial(jax.jit, static_argnums=0)
def _embed(embedder: Embedder, params: Any, batch: dict[str, Array], mask: Any) -> Float[Array, "B D"]:
    return embedder.embed(params, batch, mask)


class Encoder:
    """A trained model with its tokenizer and the attention mask it was trained to use.

    Args:
        params: the Embedder's parameter tree.
        model: its configuration.
        tokenizer: the one it was trained with.
        mask: how tokens attend to each other; bidirectional unless the last stage trained says otherwise.
        identity: where the weights come from (run, stage, step, tokenizer sha256); kept beside an index so that a
            query is never encoded by another model than the documents were.
        prompts: what stands before a text, by name: full strings. `encode_query` uses "query", `encode_document` "document".
    """

    def __init__(
        self, params: Any, model: config.Model, tokenizer: Tokenizer, mask: Any = Bidirectional(), identity: dict[str, Any] | None = None,
        prompts: dict[str, str] | None = None,
    ) -> None:
        if tokenizer.vocab_size > model.vocab_size:
            raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} tokens but the model knows {model.vocab_size}")
        self.params, self.model, self.tokenizer, self.mask = params, model, tokenizer, mask
        self.identity = {"tokenizer_sha256": tokenizer.sha256, **(identity or {})}
        self.prompts = {QUERY: "", DOCUMENT: "", **(prompts or {})}
        self._embedder = Embedder(model)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Encoder:
        """Read the newest weights of a stage folder, or of the last trained stage of a run folder.

        The tokenizer is looked for in the folder of the run first, so a run may be moved as a whole.
        Raises `CheckpointError` when there is no complete checkpoint or no tokenizer with the recorded sha256.
        """
        stage_folder = _stage_folder(Path(folder))
        metadata = checkpoint.read_metadata(stage_folder)
        run = config_io.from_dict(metadata["config"])
        stage = run.stage(metadata["stage"])
        mask = make_stage(stage, Embedder(run.model)).mask(stage.steps)
        tokenizer = _find_tokenizer(run, stage_folder, metadata["tokenizer_sha256"])
        identity = {"run": run.name, "stage": stage.name, "step": metadata["step"]}
        return cls(checkpoint.restore_params(stage_folder, metadata["step"]), run.model, tokenizer, mask, identity, prompts_of(run))

    @classmethod
    def untrained(cls, run: config.Run, tokenizer: Tokenizer) -> Encoder:
        """The model of `run` before its first step, with its first stage's mask at step 0: what training is measured against."""
        embedder = Embedder(run.model)
        mask = make_stage(run.stages[0], embedder).mask(0)
        params = jax.jit(embedder.init)(jax.random.key(run.seed))
        return cls(params, run.model, tokenizer, mask, {"run": run.name, "stage": "untrained", "step": 0}, prompts_of(run))

    @property
    def dimension(self) -> int:
        """Width D of the vectors."""
        return self.model.hidden_size

    def encode(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 64,
        max_length: int | None = None,
        show_progress_bar: bool = False,
    ) -> Float32[np.ndarray, "N D"]:
        """One L2-normalised float32 vector a text, in the order of `texts`; a single string gives [D].

        A text is cut to `max_length` tokens, prompt and EOS included (default: 512, or less where the model knows less).
        The model reads `prompt`, or `prompts[prompt_name]`, before the text and pools the text alone (METHODS 1.7). An
        empty text is its EOS token alone. Texts are sorted into row lengths 16, 32, 64 ... `max_length` with a fixed number of
        rows, so that at most one program a row length is compiled.

        Raises `ConfigError` for a `max_length` the model does not know and `DataError` for a text that is no string.
        """
        if isinstance(inputs, str):
            return self.encode([inputs], prompt_name, prompt, batch_size=1, max_length=max_length)[0]
        texts = list(inputs)
        prompt = self._prompt(prompt_name, prompt)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {i} is {type(text).__name__}, not str: {text!r:.80}")
        longest = min(DEFAULT_MAX_LENGTH, self.model.max_length) if max_length is None else max_length
        if not 2 <= longest <= self.model.max_length:
            raise ConfigError(f"max_length must lie in [2, {self.model.max_length}], what the model knows; got {longest}")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be positive, got {batch_size}")
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        rounds = range(0, len(texts), TEXTS_PER_ROUND)
        for start in track(rounds, "encoding", disable=not show_progress_bar):
            chosen = texts[start : start + TEXTS_PER_ROUND]
            vectors[start : start + len(chosen)] = self._encode_round(chosen, prompt, batch_size, longest)
        return vectors

    def encode_query(
        self, inputs: str | Sequence[str], prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Float32[np.ndarray, "N D"]:
        """`encode` of what is searched for, after `prompts["query"]` unless another prompt is given."""
        return self.encode(inputs, prompt_name or QUERY, prompt, **options)

    def encode_document(
        self, inputs: str | Sequence[str], prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Float32[np.ndarray, "N D"]:
        """`encode` of what is searched in, after `prompts["document"]`, which is empty, unless another prompt is given."""
        return self.encode(inputs, prompt_name or DOCUMENT, prompt, **options)

    @staticmethod
    def similarity(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> Float32[np.ndarray, "N M"]:
        """Cosine of every pair; the vectors of `encode` have length 1, so it is their inner product."""
        return np.asarray(a, np.float32) @ np.asarray(b, np.float32).T

    def _prompt(self, name: str | None, prompt: str | None) -> str:
        if prompt is not None or name is None:
            return prompt or ""
        if name not in self.prompts:
            raise ConfigError(f"there is no prompt {name!r}; this model has {', '.join(map(repr, self.prompts))}, or give prompt=")
        return self.prompts[name]

    def _encode_round(self, texts: list[str], prompt: str, batch_size: int, longest: int) -> Float32[np.ndarray, "N D"]:
        prefix = prompt_tokens(self.tokenizer, prompt, longest)
        rows_of_ids = token_rows(self.tokenizer, texts, prefix, longest)
        batch = {"tokens": np.zeros((len(texts), longest), np.int32), "lengths": np.array([len(r) for r in rows_of_ids], np.int32),
                 "prompt_lengths": np.full(len(texts), len(prefix), np.int32)}
        for i, ids in enumerate(rows_of_ids):
            batch["tokens"][i, : len(ids)] = ids
        results: list[tuple[np.ndarray, Array]] = []
        for rows, length in batches(batch["lengths"], batch_size, longest):
            # Results are collected after the last call, so the device works while the host cuts the next batch.
            results.append((rows, _embed(self._embedder, self.params, _take(batch, rows, batch_size, length), self.mask)))
        vectors = np.empty((len(texts), self.dimension), np.float32)
        for rows, result in results:
            vectors[rows] = np.asarray(result)[: len(rows)]
        return vectors


def batches(lengths: np.ndarray, batch_size: int, longest: int) -> list[tuple[np.ndarray, int]]:
    """(rows, row length) of every batch: rows by falling length, `batch_size` each, in the smallest bucket that holds its first row.

    Starting from the longest, a batch that is not full is only ever the last.
    """
    order = np.argsort(-lengths, kind="stable")
    made = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        length = SMALLEST_BUCKET
        while length < lengths[rows[0]]:
            length *= 2
        made.append((rows, min(length, longest)))
    return made


def _take(batch: dict[str, np.ndarray], rows: np.ndarray, batch_size: int, length: int) -> dict[str, np.ndarray]:
    """`batch_size` rows of `length` tokens; rows beyond `rows` are empty."""
    part = {name: np.zeros((batch_size, *batch[name].shape[1:]), np.int32) for name in ("tokens", "lengths", "prompt_lengths")}
    for name, array in part.items():
        array[: len(rows)] = batch[name][rows]
    part["tokens"] = part["tokens"][:, :length]
    return part


def _stage_folder(folder: Path) -> Path:
    """`folder` itself when it holds checkpoints; of a run folder, that of its last stage which has a complete one."""
    if checkpoint.latest_step(folder) is not None:
        return folder
    settings = folder / "config.json"
    if not settings.is_file():
        raise CheckpointError(f"there is no trained model in {folder}; train one with `conan demo` or `conan train`, or name its folder")
    try:
        run = config_io.from_dict(json.loads(settings.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{settings} is not valid JSON ({error})") from error
    names = [stage.name for stage in run.stages]
    trained = [folder / name for name in names if checkpoint.latest_step(folder / name) is not None]
    if not trained:
        raise CheckpointError(f"no stage of {folder} has a complete checkpoint yet; start the same command again to go on training")
    return trained[-1]


def _find_tokenizer(run: config.Run, stage_folder: Path, sha256: str) -> Tokenizer:
    """The tokenizer with the recorded sha256, beside the checkpoints or where the recipe put it."""
    places = [stage_folder.parent / "data" / "tokenizer", Path(run.data_dir) / "tokenizer"]
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
