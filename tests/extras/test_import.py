"""Imported models against transformers: hidden states, logits and token ids, on random models that transformers itself wrote."""

import dataclasses
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import pytest

from conan_jax.config_io import from_dict
from conan_jax.hf.importer import import_folder, read_origin
from conan_jax.hf.weights import read_tensors, to_tensors, write_safetensors
from conan_jax.model import Bidirectional, Causal, Embedder, Layout
from conan_jax.train import checkpoint, start_rule
from tests.data.test_json_tokenizer import MADE, TEXTS

torch = pytest.importorskip("torch", reason="needs the packages of tests/extras/requirements.txt")
transformers = pytest.importorskip("transformers", reason="needs the packages of tests/extras/requirements.txt")

SIZES = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
          "rope_theta": 100.0}
CASES = {
    "llama": ("Llama", {}), "llama-tied-llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "head_dim": 16}),
    "llama-biases": ("Llama", {"attention_bias": True}), "mistral": ("Mistral", {"head_dim": 10, "sliding_window": 64}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}), "qwen2-untied": ("Qwen2", {"num_key_value_heads": 4}),
    "qwen3": ("Qwen3", {"head_dim": 16}), "qwen3-tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
}
IDS = np.random.default_rng(3).integers(0, 400, (2, 50))
LENGTHS = np.array([50, 31])


def torch_model(name, kind="ForCausalLM", **more):
    family, changes = CASES[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes, **more})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():  # biases and gains that matter
            parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in parameter_name))
    return model


def save(model, folder, size="20KB"):
    model.save_pretrained(folder, max_shard_size=size)
    transformers.PreTrainedTokenizerFast(tokenizer_object=MADE, eos_token="<|end|>", pad_token="<|pad|>").save_pretrained(folder)
    return folder


def ours(run, mask):
    folder, step = start_rule.locate(run)
    metadata = checkpoint.read_metadata(folder, step)
    embedder = Embedder(dataclasses.replace(from_dict(metadata["config"]).model, compute_dtype="float32", remat="none", scan_layers=False))
    params = checkpoint.restore_params(folder, step)
    hidden = jax.jit(embedder.hidden)(params, jax.numpy.asarray(IDS), Layout.from_lengths(jax.numpy.asarray(LENGTHS), 50), mask)
    return np.asarray(hidden), np.asarray(embedder.logits(params, hidden)) if mask == Causal() else None


def theirs(model):
    real = torch.arange(50)[None] < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        return model(torch.tensor(IDS), attention_mask=real.long(), output_hidden_states=True)


@pytest.mark.parametrize("name", sorted(CASES))
def test_hidden_states_and_logits_are_those_of_transformers(tmp_path, name):
    model = torch_model(name)
    folder = save(model, tmp_path / "hf")
    assert (folder / "model.safetensors.index.json").is_file()  # several shards
    import_folder(folder, tmp_path / "run")
    hidden, logits = ours(tmp_path / "run", Causal())
    expected = theirs(model)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(hidden[row, :length], expected.hidden_states[-1][row, :length], atol=1e-4)
        np.testing.assert_allclose(logits[row, :length], expected.logits[row, :length], atol=1e-4)
        assert (logits[row, :length].argmax(-1) == expected.logits[row, :length].argmax(-1).numpy()).all()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_bidirectional_model_without_a_head(tmp_path, name):
    model = torch_model(name, "Model", is_causal=False)
    made = import_folder(save(model, tmp_path / "hf", "1GB"), tmp_path / "run")
    assert made.run.stages[0].options["mask"] == "bidirectional" and not made.origin.causal_form
    hidden, _ = ours(tmp_path / "run", Bidirectional())
    expected = theirs(model).last_hidden_state
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(hidden[row, :length], expected[row, :length], atol=1e-4)


@pytest.mark.parametrize("name, dtype", [
    ("llama-tied-llama3", "bfloat16"), ("mistral", "float32"), ("qwen2", "bfloat16"), ("qwen3", "float32")])
def test_transformers_loads_what_is_written_again(tmp_path, name, dtype):
    """export(import(x)) == x: every tensor bit for bit, under the same names, and a config that means the same."""
    model = torch_model(name).to(getattr(torch, dtype))
    folder = save(model, tmp_path / "hf")
    run = import_folder(folder, tmp_path / "run").run
    origin, (stage, step) = read_origin(tmp_path / "run"), start_rule.locate(tmp_path / "run")
    tensors = to_tensors(checkpoint.restore_params(stage, step), run.model, dtype=origin.dtype, causal=origin.causal_form)
    write_safetensors(tmp_path / "back", tensors)
    (tmp_path / "back" / "config.json").write_text(json.dumps(origin.hf_config(run.model)))
    before, after = read_tensors(folder), read_tensors(tmp_path / "back")
    assert set(before) == set(after)
    assert all(before[n].dtype == after[n].dtype and before[n].tobytes() == after[n].tobytes() for n in before)
    model, again = (type(model).from_pretrained(place, dtype="auto") for place in (folder, tmp_path / "back"))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    ignored = {"_name_or_path", "rope_theta", "rope_scaling", "is_causal", "use_bidirectional_attention", "torch_dtype"}
    old, new = (json.loads(m.config.to_json_string(use_diff=False)) for m in (model, again))
    kept = (old.keys() & new.keys()) - ignored
    assert {key: new[key] for key in kept} == {key: old[key] for key in kept}
    expected, found = theirs(model), theirs(again)
    assert torch.equal(expected.logits, found.logits)


def test_token_ids_are_those_of_transformers(tmp_path):
    folder = save(torch_model("qwen2"), tmp_path / "hf")
    tokenizer = import_folder(folder, tmp_path / "run").tokenizer
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in [*TEXTS[:4], "", "  a  b\n\n c", "😀 naïve café", "\u2028 x"]:
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (reference.eos_token_id, reference.pad_token_id)
