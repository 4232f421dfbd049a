"""A run's weights as a folder that sentence-transformers and transformers load with their stock classes, and no remote code.

An embedder: config.json (bidirectional through flags), model.safetensors, tokenizer.json, the modules of sentence-transformers
(mean or last-token pooling without the prompt, unit length), its prompts. A language model, of a causal stage: config.json,
generation_config.json, model.safetensors, tokenizer.json.

Both keep what conan_jax reads (`conan.json`, `tokenizer.model`), texts with the vectors they must give (`check.json`), the sha256
of every file (`manifest.json`) and a model card.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from conan_jax import __version__, config
from conan_jax.config_io import to_dict
from conan_jax.errors import ConfigError
from conan_jax.export import card, check_vector
from conan_jax.export.form import TRANSFORMERS, Form, form_of
from conan_jax.export.source import Source, open_source
from conan_jax.export.tokenizer_files import write_tokenizer
from conan_jax.files import replacing_folder, write_file, write_json
from conan_jax.hf import manifest
from conan_jax.hf.manifest import OURS, OURS_FORMAT
from conan_jax.hf.weights import from_tensors, read_tensors, write_safetensors
from conan_jax.inference.encoder import default_max_length

DTYPES = ("float32", "bfloat16")
SENTENCE_TRANSFORMERS = "5.2.0"


def export(
    run: str | os.PathLike[str], out: str | os.PathLike[str], *, stage: str | None = None, step: int | None = None,
    dtype: str | None = None, force: bool = False,
) -> dict[str, Any]:
    """Write one step of a run to `out`, whole or not at all; returns what `conan.json` says.

    Args:
        run: the folder of a run, or of one of its stages.
        stage, step: default: the newest step of the last stage that was trained.
        dtype: of the weights in the file, "float32" or "bfloat16"; None: as an imported model had them, else float32.
        force: replace an export that is there.

    Raises:
        ConfigError: no form for this model that stock code computes, an unknown dtype, or something stands at `out`.
        CheckpointError: there is no such step, or it is damaged.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known; use {' or '.join(DTYPES)}")
    out = Path(out)
    _refuse_taken(out, force)
    source = open_source(run, stage, step)
    form = form_of(source, dtype)
    with replacing_folder(out, force) as folder:
        for file in write_safetensors(folder, form.tensors):
            file.chmod(0o644)  # the library writes them for their owner alone
        ours = _describe(source, form)
        write_json(folder / OURS, ours)
        write_json(folder / "config.json", form.hf_config)
        as_it_came = source.causal or source.texts.prompt_joined
        write_tokenizer(folder, source.tokenizer, source.prompts.values(), form.model.max_length, source.causal, as_it_came)
        if source.causal:
            write_json(folder / "generation_config.json", _generation_config(source))
        else:
            _write_modules(folder, source, form.model)
        # Of what was written, not of what was in memory: a check of the names and of the rounding as well.
        params = from_tensors(read_tensors(folder), form.model, str(folder))
        check = check_vector.make(params, form.model, source)
        write_file(folder / "check.json", json.dumps(check, ensure_ascii=False) + "\n")
        write_file(folder / "README.md", card.render(source, ours))
        manifest.write(folder)
    return ours


def _describe(source: Source, form: Form) -> dict[str, Any]:
    identity = source.identity if form.dtype == "float32" else {**source.identity, "dtype": form.dtype}
    return {
        "format": OURS_FORMAT, "conan_jax": __version__, "kind": "causal" if source.causal else "embedder",
        "architecture": form.architecture, "dtype": form.dtype, "mask": source.mask, "model": to_dict(form.model),
        "identity": identity, "prompts": source.prompts, "texts": to_dict(source.texts),
        "max_length": default_max_length(form.model, source.texts), "dims": truncations(source),
    }


def truncations(source: Source) -> list[int]:
    """Widths the stage was trained to be cut to, rising, the full one last (METHODS 1.6)."""
    matryoshka = getattr(source.stage, "matryoshka", config.Matryoshka())
    return sorted({*matryoshka.dims, source.run.model.hidden_size})


def _generation_config(source: Source) -> dict[str, Any]:
    tokenizer = source.tokenizer
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id, "do_sample": False,
            "transformers_version": TRANSFORMERS}


def _write_modules(folder: Path, source: Source, model: config.Model) -> None:
    """What sentence-transformers reads, in the spelling of version 5 and in the one before it."""
    kinds = ("Transformer", "Pooling", "Normalize")
    write_json(folder / "modules.json", [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)])
    write_json(folder / "sentence_bert_config.json", {
        "max_seq_length": default_max_length(model, source.texts), "do_lower_case": source.tokenizer.lower_case})
    chosen = {"mean": "mean_tokens", "last": "lasttoken"}[model.pooling]
    legacy = {f"pooling_mode_{kind}": kind == chosen for kind in
              ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")}
    write_json(folder / "1_Pooling" / "config.json", {
        "word_embedding_dimension": model.hidden_size, **legacy, "pooling_mode": {"mean": "mean", "last": "lasttoken"}[model.pooling],
        "include_prompt": source.texts.include_prompt})
    (folder / "2_Normalize").mkdir()
    write_json(folder / "config_sentence_transformers.json", {
        "model_type": "SentenceTransformer",
        "__version__": {"sentence_transformers": SENTENCE_TRANSFORMERS, "transformers": TRANSFORMERS},
        "prompts": source.prompts, "default_prompt_name": source.texts.default_prompt_name, "similarity_fn_name": "cosine"})


def _refuse_taken(out: Path, force: bool) -> None:
    """Only an export, or an empty folder, ever gives way."""
    if not os.path.lexists(out):
        place = next(path for path in out.absolute().parents if path.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(f"cannot write in {place}; name another folder for the export")
        return
    if out.is_symlink() or not out.is_dir():
        raise ConfigError(f"{out} is not a folder; name another one for the export, or move it away")
    if not any(out.iterdir()):
        return
    if not (out / OURS).is_file():
        raise ConfigError(f"{out} holds files that are no export of `conan export`; name another folder")
    if not force:
        raise ConfigError(f"{out} holds an export already; replace it with --force, or name another folder")
