"""The tokenizer of an export: for the stock classes, and for conan_jax."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from conan_jax.data.json_tokenizer import CONFIG_FILE, JSON_FILE, JsonTokenizer
from conan_jax.data.tokenizer import MODEL_FILE, AnyTokenizer, Tokenizer
from conan_jax.errors import ConfigError
from conan_jax.files import write_file, write_json
from conan_jax.hf.tokenizer_json import prompt_split, tokenizer_config, tokenizer_json

OWN_FOLDER = "tokenizer"  # an imported tokenizer as it came, where the one that stands outside is changed
_TEXTS = ("a", " a", "Query", ": the end", "模型")


def write_tokenizer(folder: Path, tokenizer: AnyTokenizer, prompts: Iterable[str], max_length: int, language_model: bool, as_it_came: bool) -> None:
    """Write tokenizer.json and tokenizer_config.json, and what `Encoder.load` reads.

    An embedder's tokenizer.json puts every text in its frame (of ours: ends it in EOS) and cuts a prompt from its text before anything
    is merged. `as_it_came`: an imported tokenizer is left as it is, for a language model, or for prompts joined with their texts.

    Raises `ConfigError` when an imported tokenizer cannot read a prompt and its text apart.
    """
    prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt]
    if isinstance(tokenizer, Tokenizer):
        write_file(folder / MODEL_FILE, tokenizer.model_bytes)
        content = tokenizer_json(tokenizer, prompts, add_eos=not language_model)
        write_json(folder / JSON_FILE, content)
        write_json(folder / CONFIG_FILE, tokenizer_config(tokenizer, content, max_length))
    elif as_it_came:
        tokenizer.save(folder)
    else:
        tokenizer.save(folder / OWN_FOLDER)
        content = _imported(tokenizer, prompts)
        tokenizer.rewritten(content, tokenizer_config(tokenizer, content, max_length)).save(folder)


def _imported(tokenizer: JsonTokenizer, prompts: list[str]) -> dict[str, Any]:
    content = tokenizer.content()
    if prompts:
        steps = [prompt_split(prompts)] + ([content["pre_tokenizer"]] if content.get("pre_tokenizer") else [])
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    reader = tokenizers.Tokenizer.from_str(json.dumps(content))
    reader.encode_special_tokens = not tokenizer.reads_special
    for prompt in ("", *prompts):
        for text in _TEXTS:
            apart = [*tokenizer.prefix_ids, *(tokenizer.encode(prompt) if prompt else []), *tokenizer.encode(text),
                     *tokenizer.suffix_ids]
            if reader.encode(prompt + text).ids != apart:
                raise ConfigError(f"the imported tokenizer changes the beginning of every text, so the prompt {prompt!r} and a text cannot "
                                  "be joined to one with the ids they were trained with; train without instructions, or use "
                                  "conan_jax.Encoder on the run")
    return content
