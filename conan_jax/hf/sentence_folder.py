"""Rules of a sentence-transformers folder: modules, pooling, prompts, row length. Each is taken over, refused, or noted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from conan_jax.errors import CheckpointError, ConfigError
from conan_jax.files import read_json
from conan_jax.hf.text_settings import TextSettings
from conan_jax.hf.weights import DAMAGED

MODULES, CONFIG = "modules.json", "config_sentence_transformers.json"
# The first that is there counts.
_TRANSFORMER_FILES = tuple(f"sentence_{name}_config.json" for name in (
    "bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"))
_POOLED = {"mean": "mean", "lasttoken": "last", "mean_sqrt_len_tokens": "mean"}  # the last is the mean times a number
_LEGACY = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
           "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
           "pooling_mode_lasttoken": "lasttoken"}
_POOLING_KEYS = {"word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt", *_LEGACY}
_KNOWN = {"__version__", "prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim", "model_type", "requirements"}
_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
# Of the Transformer module: values that are taken over or change no vector. Empty values never do.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "do_lower_case": (True, False), "unpad_inputs": (True, False), "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
}
_WEIGHTS_ONLY = {"torch_dtype", "dtype", "attn_implementation", "low_cpu_mem_usage", "device_map", "trust_remote_code", "use_safetensors"}


@dataclass(frozen=True)
class SentenceFolder:
    """What a sentence-transformers folder says beside its weights.

    Attributes:
        transformer: the folder of config.json, weights and tokenizer.
        pooling: a key of `POOLINGS`.
        lower_case: texts are lowered before they are tokenised.
        notes: what differs here, for people.
    """

    transformer: Path
    pooling: str
    prompts: dict[str, str]
    texts: TextSettings
    lower_case: bool
    notes: tuple[str, ...] = field(default=())


def read_sentence_folder(folder: Path) -> SentenceFolder | None:
    """Read `modules.json` and the files that it leads to; None for a folder of a plain model.

    Raises:
        ConfigError: the folder asks for something that is not computed here; the message names the file and the key.
        DataError: a file is damaged.
    """
    modules = _modules(folder)
    if modules is None:
        return None
    kinds = [kind for kind, _ in modules]
    _refuse_other_modules(folder, kinds)
    transformer = _inside(folder, modules[0][1])
    notes: list[str] = []
    settings, where = _transformer(transformer)
    pooling, include_prompt = _pooling(folder / modules[1][1] / "config.json", notes)
    if "Dropout" in kinds:
        notes.append("its Dropout module changes nothing when texts are encoded; it is left out")
    if "Normalize" in kinds:
        _refuse_other_keys(folder / modules[kinds.index("Normalize")][1] / "config.json",
                           {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"})
    else:
        notes.append("it has no Normalize module: its vectors have lengths of their own, and here they are brought to length 1")
    prompts, default = _prompts(folder, "Normalize" in kinds, notes)
    texts = TextSettings(prompt_joined=True, include_prompt=include_prompt, default_prompt_name=default,
                         max_seq_length=_max_seq_length(transformer, settings, where, notes))
    return SentenceFolder(transformer, pooling, prompts, texts, bool(settings.get("do_lower_case")), tuple(notes))


def _modules(folder: Path) -> list[tuple[str, str]] | None:
    """(class, path) of each module, in order."""
    file = folder / MODULES
    listed = _list(file)
    if listed is None:
        if (folder / "1_Pooling" / "config.json").is_file():
            raise ConfigError(f"{folder} has 1_Pooling/config.json and no {MODULES}, which says how the two belong together; copy the "
                              "folder anew with it, or remove 1_Pooling to import a plain model")
        return None
    found = []
    for i, module in enumerate(listed):
        kind, path = (module.get(key) for key in ("type", "path")) if isinstance(module, Mapping) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise ConfigError(f"{file}: module {i} must have a `type` and a `path`, both strings, got {module!r:.80}")
        if not kind.startswith("sentence_transformers."):
            raise ConfigError(f"{file}: module {i} is {kind}, code of its own, which is not run here")
        found.append((kind.rpartition(".")[2], path))
    return found


def _list(file: Path) -> list[Any] | None:
    """Read a JSON file that holds a list; None when it is not there."""
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); {DAMAGED}") from None
    if not isinstance(value, list):
        raise ConfigError(f"{file} must hold a list, got {type(value).__name__}; {DAMAGED}")
    return value


def _refuse_other_modules(folder: Path, kinds: list[str]) -> None:
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize", "Dropout"):
            raise ConfigError(f"{folder / MODULES}: the module {kind} cannot be computed here, only Transformer, Pooling and Normalize; "
                              "to import the model without it, which gives other vectors, remove its entry there")
    if [kind for kind in kinds if kind != "Dropout"] not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ConfigError(f"{folder / MODULES}: the modules are {', '.join(kinds) or 'none'}; Transformer, Pooling, Normalize in this "
                          "order can be computed here, the last may be absent")
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise ConfigError(f"{folder / MODULES}: a Dropout before the Pooling cannot be taken over; remove its entry there")


def _inside(folder: Path, path: str) -> Path:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise ConfigError(f"{folder / MODULES}: the path {path!r} is outside of the folder; it is not read")
    return folder / path


def _transformer(folder: Path) -> tuple[dict[str, Any], Path]:
    """The settings of the Transformer module, all of them known to change nothing but row length and case."""
    where = next((folder / name for name in _TRANSFORMER_FILES if (folder / name).is_file()), folder / _TRANSFORMER_FILES[0])
    settings = read_json(where, {}, DAMAGED)
    for key, value in settings.items():
        if value in (None, {}, [], "") or value in _HARMLESS.get(key, ()):
            continue
        if key in ("model_args", "model_kwargs") and isinstance(value, Mapping) and set(value) <= _WEIGHTS_ONLY:
            continue
        if key in ("tokenizer_args", "processor_kwargs") and isinstance(value, Mapping) and set(value) <= {"padding_side"}:
            continue
        if key == "processing_kwargs" and not any(value.values() if isinstance(value, Mapping) else [value]):
            continue
        if key == "modality_config" and isinstance(value, Mapping) and value.get("text") == _TEXT:
            continue
        if key == "max_seq_length" and isinstance(value, int) and not isinstance(value, bool) and value >= 2:
            continue
        raise ConfigError(f"{where}: {key} is {value!r}, which cannot be taken over; to import the model without it, remove the key")
    return settings, where


def _max_seq_length(folder: Path, settings: Mapping[str, Any], where: Path, notes: list[str]) -> int:
    """Tokens at which sentence-transformers cuts a row: its own setting, else the least of the tokenizer's and the model's."""
    longest = read_json(folder / "config.json", {}, DAMAGED).get("max_position_embeddings")
    longest = longest if isinstance(longest, int) and longest >= 2 else 2**31
    tokenizer = read_json(folder / "tokenizer_config.json", {}, DAMAGED)
    if tokenizer.get("truncation_side") == "left":
        raise ConfigError(f"{folder / 'tokenizer_config.json'}: truncation_side is 'left', and long texts are cut at their end here; set it "
                          "to 'right' there, which gives other vectors of long texts")
    given, limit = settings.get("max_seq_length"), tokenizer.get("model_max_length")
    if given is None:
        return int(min(longest, limit)) if isinstance(limit, int | float) and limit >= 2 else longest
    if given > longest:
        notes.append(f"max_seq_length of {where.name} is {given:,}; rows are cut to {longest:,} tokens, max_position_embeddings")
    return min(given, longest)


def _pooling(file: Path, notes: list[str]) -> tuple[str, bool]:
    """(pooling, include_prompt), by the rules of sentence-transformers: `pooling_mode` first, then the legacy keys, then the mean."""
    said = read_json(file, {}, DAMAGED)
    if unknown := sorted(set(said) - _POOLING_KEYS):
        raise ConfigError(f"{file}: {unknown[0]} is not known, so it cannot be taken over; to import the model without it, remove the key")
    modes = said.get("pooling_mode") or [mode for key, mode in _LEGACY.items() if said.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLED:
        raise ConfigError(f"{file}: pooling by {' and '.join(map(str, modes))} cannot be computed here, only by "
                          f"{', '.join(_POOLED)}; to import the model with another pooling, which gives other vectors, set pooling_mode "
                          "to \"mean\" or \"lasttoken\" there")
    if modes[0] == "mean_sqrt_len_tokens":
        notes.append("its pooling is the mean times the root of the length, which has the direction of the mean; the mean is taken")
    return _POOLED[modes[0]], bool(said.get("include_prompt", True))


def _prompts(folder: Path, normalised: bool, notes: list[str]) -> tuple[dict[str, str], str | None]:
    """(prompts by name, name of the default), of `config_sentence_transformers.json`."""
    file = folder / CONFIG
    said = read_json(file, {}, DAMAGED)
    if said.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise ConfigError(f"{file}: model_type is {said['model_type']!r}; only a SentenceTransformer gives one vector for each text")
    if said.get("truncate_dim") is not None:
        raise ConfigError(f"{file}: truncate_dim is {said['truncate_dim']!r}, and an import keeps whole vectors; remove the key, and cut "
                          "vectors where they are made (truncate_dim of Encoder.encode)")
    similarity = said.get("similarity_fn_name") or "cosine"
    if similarity != "cosine" and not (similarity == "dot" and normalised):
        raise ConfigError(f"{file}: similarity_fn_name is {similarity!r}, and vectors are compared by their cosine here; to import the "
                          "model all the same, set it to \"cosine\" there")
    for key in sorted(set(said) - _KNOWN):
        notes.append(f"{key} of {CONFIG} is not known here and is left out")
    prompts = said.get("prompts") or {}
    if not isinstance(prompts, Mapping) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise ConfigError(f"{file}: prompts must be an object of strings by name, got {prompts!r:.80}")
    prompts = {"query": "", "document": "", **{name: text or "" for name, text in prompts.items()}}
    default = said.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ConfigError(f"{file}: default_prompt_name is {default!r}, and prompts has {', '.join(map(repr, prompts))}; name one of them")
    return prompts, default


def _refuse_other_keys(file: Path, usual: Mapping[str, Any]) -> None:
    for key, value in read_json(file, {}, DAMAGED).items():
        if value is not None and value != usual.get(key):
            raise ConfigError(f"{file}: {key} is {value!r}, which cannot be taken over; to import the model without it, remove the key")


def refuse_adapter(folder: Path) -> None:
    """Raise `CheckpointError` when the folder holds an adapter, whose weights belong on top of the others."""
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} holds an adapter (adapter_config.json), which is not added to the weights here; merge it with "
                              "merge_and_unload of peft and save the model, or remove adapter_config.json to import the model without it")
