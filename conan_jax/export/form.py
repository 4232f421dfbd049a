"""Which stock architecture holds a model, with which weights and which config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from conan_jax import config
from conan_jax.export.source import Source
from conan_jax.hf.architectures import architecture_of, to_hf_config
from conan_jax.hf.weights import DTYPES, Tensors, to_tensors

TRANSFORMERS = "5.2.0"  # the first that reads `is_causal: false`


@dataclass(frozen=True)
class Form:
    """`model` is the configuration that reads `tensors`; `hf_config` the content of config.json."""

    architecture: str
    dtype: str
    model: config.Model
    tensors: Mapping[str, np.ndarray]
    hf_config: dict[str, Any]


def form_of(source: Source, dtype: str | None = None) -> Form:
    """The form in which a model is written. `dtype`: of the weights; None: as an imported model had them, else float32.

    An imported model that was not trained further keeps its family, its names, dtypes and config.json. What was trained here is a
    Llama, or a Qwen3 with `qk_norm`. The biases of Qwen2 become those of a Llama whose output bias is zero: transformers gives every
    `qwen2` the tokenizer class of Qwen2, which would not cut prompts from their texts.

    Raises `ConfigError` when no stock architecture computes the model.
    """
    return _trained(source, dtype or "float32") if source.origin is None else _imported(source, dtype or source.origin.dtype)


def _imported(source: Source, dtype: str) -> Form:
    origin, model = source.origin, replace(source.run.model, hidden_dropout=0.0)
    tensors = to_tensors(source.params, model, dtype=dtype, causal=origin.causal_form)
    described = {**origin.hf_config(model), "dtype": dtype, "torch_dtype": dtype}
    if dtype == origin.dtype:
        tensors = _with_dtypes(tensors, origin.other_dtypes, source, origin.causal_form)
    return Form(origin.architecture, dtype, model, tensors, described)


def _trained(source: Source, dtype: str) -> Form:
    model, params = source.run.model, source.params
    if model.attention_bias and not model.attention_output_bias and not source.causal:
        model = replace(model, attention_output_bias=True)
        params = _with_output_bias(params, model)
    tensors = to_tensors(params, model, dtype=dtype, causal=source.causal)
    # The multiplier of the embeddings is in their table now, and without a head there is none to be untied.
    tied = not source.causal or (model.tie_word_embeddings and model.embedding_multiplier == 1)
    written = replace(model, embedding_multiplier=1.0, tie_word_embeddings=tied, hidden_dropout=0.0)
    tokenizer = source.tokenizer
    described = to_hf_config(written, causal=source.causal, is_causal=source.mask == "causal", dtype=dtype, pad_token_id=tokenizer.pad_id,
                             bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    return Form(architecture_of(written), dtype, written, tensors, {**described, "transformers_version": TRANSFORMERS})


def _with_dtypes(tensors: Tensors, dtypes: Mapping[str, str], source: Source, causal: bool) -> Tensors:
    """Some tensors in dtypes of their own."""
    others = {name: dtype for name, dtype in dtypes.items() if name in tensors.shapes}
    by_dtype = {dtype: to_tensors(source.params, source.run.model, dtype=dtype, causal=causal) for dtype in set(others.values())}
    return Tensors(tensors.shapes, {**tensors.dtypes, **{name: DTYPES[dtype] for name, dtype in others.items()}},
                   lambda name: by_dtype[others[name]][name] if name in others else tensors[name])


def _with_output_bias(params: Any, model: config.Model) -> Any:
    layers, attention = params["layers"], params["layers"]["attention"]
    zeros = np.zeros((model.num_layers, model.hidden_size), np.float32)
    return {**params, "layers": {**layers, "attention": {**attention, "o_proj": {**attention["o_proj"], "bias": zeros}}}}
