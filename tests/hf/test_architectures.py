"""config.json there and back, and what cannot be computed here is refused by key."""

import dataclasses

import pytest

from conan_jax.config import Model, RopeScaling
from conan_jax.errors import ConfigError
from conan_jax.hf.architectures import ARCHITECTURES, architecture_of, from_hf_config, is_causal, to_hf_config
from tests.hf.folders import COMMON, CONFIGS, LLAMA3

SMALL = Model(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, max_length=128)
EXPECTED = {
    "llama": {"rope_theta": 500.0, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16), "attention_head_dim": None},
    "mistral": {"attention_head_dim": 6, "rope_theta": 1e4},
    "qwen2": {"attention_bias": True, "attention_output_bias": False, "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True, "attention_head_dim": 8, "attention_bias": False},
}
# What the stock configuration classes of transformers 5.23 write of themselves, apart from what every model has (id2label and the like).
STOCK = {"architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "hidden_act", "hidden_size",
         "initializer_range", "intermediate_size", "max_position_embeddings", "model_type", "num_attention_heads",
         "num_hidden_layers", "num_key_value_heads", "pad_token_id", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
         "use_cache", "vocab_size"}
OWN = {"llama": {"pretraining_tp", "attention_bias", "mlp_bias", "head_dim"}, "mistral": {"head_dim", "sliding_window"},
       "qwen2": {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
       "qwen3": {"head_dim", "attention_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}}


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_config_is_read_and_written_again(family):
    model = from_hf_config(CONFIGS[family], family)
    found = dataclasses.asdict(model) | {"rope_scaling": model.rope_scaling}
    assert {key: found[key] for key in EXPECTED[family]} == EXPECTED[family]
    assert (model.vocab_size, model.num_layers, model.num_heads, model.num_kv_heads, model.max_length, model.rms_norm_eps) == (
        400, 2, 4, 2, 64, 1e-5)
    written = to_hf_config(model, family, causal=True, pad_token_id=None, bos_token_id=None, eos_token_id=1)
    ours = {key: written[key] for key in CONFIGS[family] if key not in ("transformers_version", "max_window_layers")}
    assert ours == {key: value for key, value in CONFIGS[family].items() if key in ours}
    assert from_hf_config(written, family) == model
    assert STOCK | OWN[family] <= written.keys()
    assert written["is_causal"] is True and is_causal(written) and written["rope_theta"] == written["rope_parameters"]["rope_theta"]


def test_our_own_models_have_an_architecture():
    changed = {"llama": {}, "qwen3": {"qk_norm": True}, "qwen2": {"attention_bias": True}}
    for name, changes in changed.items():
        model = dataclasses.replace(SMALL, **changes)
        assert architecture_of(model) == name
        bare = to_hf_config(model, is_causal=False, dtype="bfloat16")
        assert bare["architectures"] == [ARCHITECTURES[name].class_name(False)] and bare["torch_dtype"] == bare["dtype"] == "bfloat16"
        assert bare["is_causal"] is False and bare["use_bidirectional_attention"] is True and not is_causal(bare)
        assert from_hf_config(bare, name) == dataclasses.replace(model, rope_theta=1e6)
    assert architecture_of(dataclasses.replace(SMALL, attention_bias=True, attention_output_bias=True)) == "llama"
    assert architecture_of(dataclasses.replace(SMALL, qk_norm=True, attention_bias=True, attention_output_bias=True)) == "qwen3"
    assert to_hf_config(dataclasses.replace(SMALL, embedding_multiplier=2.0), causal=True)["tie_word_embeddings"] is False


@pytest.mark.parametrize("changes, architecture, message", [
    ({"attention_output_bias": True}, None, "no Hugging Face architecture holds this model"),
    ({"qk_norm": True}, "llama", "Llama does not normalise q and k.*use the architecture qwen3"),
    ({}, "qwen2", "Qwen2 has no model with attention_bias False"),
    ({"attention_bias": True}, "mistral", "Mistral has no model with attention_bias True"),
    ({}, "gpt2", "architecture 'gpt2' is not known"),
])
def test_a_model_that_does_not_fit_is_refused(changes, architecture, message):
    with pytest.raises(ConfigError, match=message):
        to_hf_config(dataclasses.replace(SMALL, **changes), architecture)


def test_the_spelling_of_version_4_means_the_same():
    old = {key: value for key, value in CONFIGS["llama"].items() if key != "rope_parameters"}
    new = from_hf_config(CONFIGS["llama"], "new")
    assert from_hf_config({**old, "rope_theta": 500.0, "rope_scaling": LLAMA3}, "old") == new
    spelled = {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}
    assert from_hf_config({**old, "rope_theta": 500.0, "rope_scaling": spelled}, "old") == new
    plain = from_hf_config({**old, "rope_theta": 7.0, "rope_scaling": None}, "old")
    assert plain.rope_scaling is None and plain.rope_theta == 7.0 and from_hf_config(old, "old").rope_theta == 10_000.0


@pytest.mark.parametrize("family, changes, expected", [
    ("mistral", {"sliding_window": 4096}, 64), ("mistral", {"sliding_window": 32}, 32), ("mistral", {"sliding_window": None}, 64),
    ("qwen2", {"sliding_window": 32, "use_sliding_window": False, "layer_types": None}, 64),
    ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "layer_types": None, "max_window_layers": 1}, 32),
    ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "layer_types": None, "max_window_layers": 2}, 64),
    ("qwen3", {"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]}, 32),
    ("llama", {"sliding_window": 32}, 64),
])
def test_a_sliding_window_that_cuts_something_off_becomes_the_longest_row(family, changes, expected):
    assert from_hf_config({**CONFIGS[family], **changes}, family).max_length == expected


def test_absent_keys_mean_what_the_family_says():
    bare = {key: COMMON[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    read = {family: from_hf_config({**bare, "model_type": family, "num_attention_heads": heads}, family)
            for family, heads in (("llama", 4), ("mistral", 8), ("qwen2", 32), ("qwen3", 32)) for bare["hidden_size"] in (64,)}
    assert [m.num_kv_heads for m in read.values()] == [4, 8, 32, 32] and [m.head_dim for m in read.values()] == [16, 8, 2, 128]
    assert [m.max_length for m in read.values()] == [2048, 4096, 32_768, 32_768]
    assert not any(m.tie_word_embeddings for m in read.values())


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "gpt2"}, "here: model_type 'gpt2' is none that can be read \\(llama, mistral, qwen2, qwen3\\)"),
    ({"model_type": None}, "model_type None"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": "16"}, "hidden_size must be a number, got '16'"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers must be a whole number"),
    ({"vocab_size": None}, "vocab_size must be a number, and is absent"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' cannot be computed here"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor must be a number, and is absent"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": [1]}, "rope_parameters must be an object"),
    ({"num_key_value_heads": 3}, "must be a multiple of model.num_kv_heads 3"),
    ({"head_dim": 5}, "head_dim 5 must be even"),
])
def test_what_cannot_be_computed_is_refused_by_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_hf_config({**CONFIGS["llama"], **changes}, "here")
