"""Our decoder as a `config.json` of Hugging Face, and back: Llama, Mistral, Qwen2, Qwen3. Nothing is imported from transformers.

The four are one decoder with other settings: Qwen2 has biases on q, k and v, Qwen3 normalises each head of q and k before
RoPE, Llama may have biases on all four maps of attention, Mistral has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conan_jax import config
from conan_jax.config_io import to_dict
from conan_jax.errors import ConfigError


@dataclass(frozen=True)
class Architecture:
    """What sets one family apart. `defaults`: what a key that is absent from a `config.json` means to it."""

    name: str
    qk_norm: bool = False
    biases: tuple[tuple[bool, bool], ...] = ((False, False),)  # (attention_bias, attention_output_bias) that it can hold
    defaults: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)  # keys of its own that its configuration class writes

    def class_name(self, causal: bool) -> str:
        """The model class: with a head that predicts tokens, or without."""
        return f"{self.name}{'ForCausalLM' if causal else 'Model'}"


_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False, "hidden_act": "silu", "initializer_range": 0.02}
_WINDOWED = {"use_sliding_window": False, "sliding_window": None}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("Llama", biases=((False, False), (True, True)),
                          defaults={**_COMMON, "max_position_embeddings": 2048, "num_key_value_heads": None},
                          extra={"pretraining_tp": 1, "mlp_bias": False}),
    "mistral": Architecture("Mistral", defaults={**_COMMON, "max_position_embeddings": 131_072, "num_key_value_heads": 8,
                                                 "sliding_window": 4096},
                            extra={"sliding_window": None}),
    "qwen2": Architecture("Qwen2", biases=((True, False),),
                          defaults={**_COMMON, "max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096},
                          extra=_WINDOWED),
    "qwen3": Architecture("Qwen3", qk_norm=True, biases=((False, False), (True, True)),
                          defaults={**_COMMON, "max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096,
                                    "head_dim": 128},
                          extra=_WINDOWED),
}
# What other versions of these models can do and this decoder cannot; the value that means "not used".
_UNUSED = {"mlp_bias": False, "attention_multiplier": 1.0, "logit_scale": 1.0, "residual_multiplier": 1.0, "embedding_multiplier": 1.0,
           "partial_rotary_factor": 1.0, "pretraining_tp": 1, "quantization_config": None}


def architecture_of(model: config.Model) -> str:
    """The family whose stock code computes `model`: "qwen3" with `qk_norm`, "qwen2" with biases on q, k and v, else "llama".

    Raises `ConfigError` when there is none.
    """
    for name in ("llama", "qwen2", "qwen3"):
        if not _misfit(model, name):
            return name
    raise ConfigError("no Hugging Face architecture holds this model: " + "; ".join(_misfit(model, name) for name in ARCHITECTURES))


def to_hf_config(
    model: config.Model, architecture: str | None = None, *, causal: bool = False, is_causal: bool = True, dtype: str = "float32",
    pad_token_id: int | None = 0, bos_token_id: int | None = 2, eos_token_id: int | None = 3,
) -> dict[str, Any]:
    """The `config.json` of `model`, with every key that the stock configuration class writes.

    RoPE and the dtype are written in both spellings, that of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and that
    of 5 (`rope_parameters`, `dtype`).

    Args:
        architecture: a key of `ARCHITECTURES`; None: `architecture_of(model)`.
        causal: the model with its head (`LlamaForCausalLM`), not the bare one (`LlamaModel`).
        is_causal: whether tokens see only what stands before them. False turns stock models of transformers >= 5.2 bidirectional.

    Raises:
        ConfigError: the architecture is unknown or cannot hold the model.
    """
    architecture = architecture_of(model) if architecture is None else architecture
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"architecture {architecture!r} is not known; use {', '.join(ARCHITECTURES)}")
    if misfit := _misfit(model, architecture):
        raise ConfigError(f"{misfit}; use the architecture {architecture_of(model)}")
    family = ARCHITECTURES[architecture]
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        rope = {"rope_type": "llama3", **to_dict(model.rope_scaling)}
    data = {
        "architectures": [family.class_name(causal)],
        "model_type": architecture,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_length,
        "initializer_range": model.initializer_range,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
        "attention_bias": model.attention_bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_word_embeddings and model.embedding_multiplier == 1,
        "use_cache": True,
        "pad_token_id": pad_token_id,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": dtype,
        "dtype": dtype,
        "is_causal": is_causal,
        "use_bidirectional_attention": not is_causal,
        **family.extra,
    }
    if "use_sliding_window" in family.extra:
        data |= {"max_window_layers": model.num_layers, "layer_types": ["full_attention"] * model.num_layers}
    if architecture in ("mistral", "qwen2"):  # what has none, or always has them, knows no such key
        del data["attention_bias"]
    return data


def from_hf_config(data: Mapping[str, Any], where: str) -> config.Model:
    """The model that a `config.json` describes. `where` names the file in errors.

    A sliding window that would cut rows short of `max_position_embeddings` becomes `max_length`: up to there nothing is cut.

    Raises:
        ConfigError: another architecture, a value of the wrong type, or something that this decoder cannot compute.
    """
    architecture = data.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"{where}: model_type {architecture!r} is none that can be read ({', '.join(ARCHITECTURES)})")
    family = ARCHITECTURES[architecture]
    read = _Reader({**family.defaults, **data}, where)
    for key, unused in _UNUSED.items():
        if data.get(key) not in (unused, None):
            raise ConfigError(f"{where}: {key} is {data[key]!r}, and only {unused!r} can be computed here")
    if read.data["hidden_act"] not in ("silu", "swish"):
        raise ConfigError(f"{where}: hidden_act is {read.data['hidden_act']!r}, and only 'silu' can be computed here")
    heads = read.integer("num_attention_heads")
    rope_theta, scaling = _rope(read)
    biases = {"qwen2": (True, False), "mistral": (False, False)}.get(architecture, (bool(data.get("attention_bias")),) * 2)
    return config.Model(
        vocab_size=read.integer("vocab_size"), hidden_size=read.integer("hidden_size"), intermediate_size=read.integer("intermediate_size"),
        num_layers=read.integer("num_hidden_layers"), num_heads=heads,
        num_kv_heads=heads if read.data["num_key_value_heads"] is None else read.integer("num_key_value_heads"),
        attention_head_dim=_head_dim(read, heads), max_length=_max_length(read, architecture),
        rope_theta=rope_theta, rope_scaling=scaling, rms_norm_eps=read.number("rms_norm_eps"), qk_norm=family.qk_norm,
        attention_bias=biases[0], attention_output_bias=biases[1], tie_word_embeddings=bool(read.data["tie_word_embeddings"]),
        initializer_range=read.number("initializer_range"))


def is_causal(data: Mapping[str, Any]) -> bool:
    """Whether the model of a `config.json` sees only what stands before a token."""
    return data.get("is_causal") is not False and not data.get("use_bidirectional_attention")


class _Reader:
    """Values of one file, with errors that name it."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def number(self, key: str) -> float:
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.where}: {key} must be a number, " + ("and is absent" if value is None else f"got {value!r}"))
        return float(value)

    def integer(self, key: str) -> int:
        if self.number(key) != int(self.number(key)):
            raise ConfigError(f"{self.where}: {key} must be a whole number, got {self.data[key]!r}")
        return int(self.number(key))


def _head_dim(read: _Reader, heads: int) -> int | None:
    """None where it is what it would be anyway, so that equal models have equal configurations."""
    if read.data.get("head_dim") is None:
        return None
    given = read.integer("head_dim")
    return None if given * heads == read.integer("hidden_size") else given


def _max_length(read: _Reader, architecture: str) -> int:
    longest, data = read.integer("max_position_embeddings"), read.data
    windowed = architecture == "mistral" or (architecture != "llama" and bool(data.get("use_sliding_window")))
    if isinstance(data.get("layer_types"), list):
        windowed = "sliding_attention" in data["layer_types"]
    elif windowed and architecture != "mistral":
        windowed = data.get("max_window_layers", 0) < read.integer("num_hidden_layers")
    return min(longest, read.integer("sliding_window")) if windowed and data.get("sliding_window") is not None else longest


def _rope(read: _Reader) -> tuple[float, config.RopeScaling | None]:
    """`rope_parameters` as transformers 5 writes it, else `rope_theta` and `rope_scaling` of version 4."""
    rope = read.data.get("rope_parameters") or read.data.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{read.where}: rope_parameters must be an object, got {rope!r}")
    rope = _Reader({"rope_theta": read.data["rope_theta"], **rope}, f"{read.where}: rope_parameters")
    kind = rope.data.get("rope_type", rope.data.get("type", "default"))
    if rope.data.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError(f"{rope.where}: partial_rotary_factor is {rope.data['partial_rotary_factor']!r}; whole heads are turned here")
    if kind == "default":
        return rope.number("rope_theta"), None
    if kind != "llama3":
        raise ConfigError(f"{rope.where}: rope_type {kind!r} cannot be computed here, only 'default' and 'llama3'. If it only serves rows "
                          "longer than max_position_embeddings, as yarn and linear scaling often do, remove it from the file")
    return rope.number("rope_theta"), config.RopeScaling(
        factor=rope.number("factor"), low_freq_factor=rope.number("low_freq_factor"), high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"))


def _misfit(model: config.Model, architecture: str) -> str:
    """Why the stock code of `architecture` does not compute `model`; "" when it does."""
    family = ARCHITECTURES[architecture]
    biases = (model.attention_bias, model.attention_output_bias)
    if model.qk_norm != family.qk_norm:
        return f"{family.name} {'normalises' if family.qk_norm else 'does not normalise'} q and k, and model.qk_norm is {model.qk_norm}"
    if biases not in family.biases:
        return f"{family.name} has no model with attention_bias {biases[0]} and attention_output_bias {biases[1]}"
    if architecture == "llama" and model.hidden_size % model.num_heads:
        return f"Llama wants a hidden_size ({model.hidden_size}) that is a multiple of num_heads ({model.num_heads})"
    return ""
