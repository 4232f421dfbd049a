"""Tensors in, tensors out: nothing changes on the way, and what is not a model's is refused by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from conan_jax.config import Model
from conan_jax.errors import CheckpointError, ConfigError, DataError
from conan_jax.hf.architectures import from_hf_config
from conan_jax.hf.weights import from_tensors, read_tensors, to_tensors, write_safetensors
from conan_jax.launch.estimates import parameters
from conan_jax.model import Embedder, num_params
from tests.hf import folders

FAMILIES = sorted(folders.CONFIGS)


def model_of(family, **changes):
    return from_hf_config({**folders.CONFIGS[family], **changes}, family)


def same(a, b):
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("causal", [True, False])
def test_there_and_back_bit_for_bit(tmp_path, family, dtype, causal):
    folder, tensors = folders.write(tmp_path / "a", family, dtype, causal, shards=2)
    model = model_of(family) if causal else model_of(family, tie_word_embeddings=True)
    params = from_tensors(read_tensors(folder), model)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, jax.eval_shape(Embedder(model).init, jax.random.key(0)))
    assert same(to_tensors(params, model, dtype=dtype, causal=causal), tensors)
    files = write_safetensors(tmp_path / "b", to_tensors(params, model, dtype=dtype, causal=causal))
    assert [f.name for f in files] == ["model.safetensors"] and same(read_tensors(tmp_path / "b"), tensors)
    with safetensors.safe_open(files[0], framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_every_parameter_has_its_tensor():
    """Kernels are transposes, layers are slices: by hand, for one tensor of each kind."""
    tensors, model = folders.random_tensors(folders.CONFIGS["qwen2"]), model_of("qwen2")
    params = from_tensors(tensors, model)
    attention = params["layers"]["attention"]
    np.testing.assert_array_equal(attention["k_proj"]["kernel"][1], tensors["model.layers.1.self_attn.k_proj.weight"].T)
    np.testing.assert_array_equal(attention["k_proj"]["bias"][1], tensors["model.layers.1.self_attn.k_proj.bias"])
    np.testing.assert_array_equal(params["layers"]["mlp"]["down_proj"]["kernel"][0], tensors["model.layers.0.mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(params["layers"]["mlp_norm"]["scale"][0], tensors["model.layers.0.post_attention_layernorm.weight"])
    np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"])
    assert num_params(model) == sum(t.size for t in tensors.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_without_jax_as_with_it(family):
    for model in (model_of(family), model_of(family, attention_bias=True), model_of(family, tie_word_embeddings=True)):
        assert parameters(model) == num_params(model)


def test_the_multiplier_of_embeddings_goes_into_the_input_table():
    model = Model(vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, embedding_multiplier=3.0)
    params = jax.tree.map(np.asarray, Embedder(model).init(jax.random.key(0)))
    bare, causal = to_tensors(params, model), to_tensors(params, model, causal=True)
    np.testing.assert_array_equal(bare["embed_tokens.weight"], params["embedding"] * np.float32(3))
    np.testing.assert_array_equal(causal["model.embed_tokens.weight"], params["embedding"] * np.float32(3))
    np.testing.assert_array_equal(causal["lm_head.weight"], params["embedding"])
    assert "lm_head.weight" not in bare


def test_shards_are_at_most_as_large_as_told(tmp_path):
    tensors = folders.random_tensors(folders.CONFIGS["llama"])
    files = write_safetensors(tmp_path, tensors, largest_file=30_000)
    assert len(files) > 3 and files[-1].name == "model.safetensors.index.json"
    for file in files[:-1]:
        held = load_file(file)
        assert len(held) == 1 or sum(a.nbytes for a in held.values()) <= 30_000
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    assert same(read_tensors(tmp_path), tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f.name for f in files)  # nothing left behind


def test_a_transposed_array_is_written_as_it_reads(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_safetensors(tmp_path, {"a": array})
    np.testing.assert_array_equal(read_tensors(tmp_path)["a"], array)


def broken(change):
    tensors = folders.random_tensors(folders.CONFIGS["llama"])
    change(tensors)
    return tensors


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(Q), f"lacks {Q};"),
    (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
    (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[Q]}), "does not have, model.layers.2.mlp.up_proj.weight"),
    (lambda t: t.update({Q: t[Q][:, :-1]}), f"{Q} has the shape \\[16, 15\\] and the model wants \\[16, 16\\]"),
    (lambda t: t[Q].__setitem__((3, 2), np.nan), f"{Q} holds numbers that are not finite"),
    (lambda t: t[Q].__setitem__((0, 0), np.inf), "not finite"),
    (lambda t: t.update({Q: t[Q].astype(np.int8)}), "holds int8 numbers"),
])
def test_what_is_not_the_models_is_refused_by_name(change, message):
    with pytest.raises(CheckpointError, match=message):
        from_tensors(broken(change), model_of("llama"), "here")


def test_derived_numbers_and_a_head_that_says_the_same_are_let_be():
    tensors = folders.random_tensors(folders.CONFIGS["qwen2"])
    plain = from_tensors(tensors, model_of("qwen2"))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert jax.tree.all(jax.tree.map(np.array_equal, from_tensors(tensors, model_of("qwen2")), plain))
    tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true.*lm_head.weight is not the table"):
        from_tensors(tensors, model_of("qwen2"))


def test_a_pickled_checkpoint_is_refused_with_the_reason(tmp_path):
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pth", "consolidated.00.pt"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(CheckpointError, match="pickled, and to read a pickle is to run what is in it"):
            read_tensors(folder)
    with pytest.raises(CheckpointError, match="holds neither model.safetensors nor"):
        read_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        read_tensors(tmp_path / "none")


def index_of(folder):
    return folder / "model.safetensors.index.json"


def rewrite(folder, change):
    index = json.loads(index_of(folder).read_text())
    change(index["weight_map"])
    index_of(folder).write_text(json.dumps(index))


def first(folder):
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize("breakage, message", [
    (lambda f: first(f).unlink(), "model-00001-of-00002.safetensors is missing"),
    (lambda f: rewrite(f, lambda m: m.pop(Q)), f"holds {Q}, which the index does not place there"),
    (lambda f: rewrite(f, lambda m: m.update(extra=m[Q])), "lacks extra"),
    (lambda f: rewrite(f, lambda m: m.update({Q: "../secret.safetensors"})), "'../secret.safetensors', which is not a plain name"),
    (lambda f: rewrite(f, lambda m: m.update({Q: "/etc/passwd"})), "not a plain name"),
    (lambda f: rewrite(f, lambda m: m.update({Q: ".."})), "not a plain name"),
    (lambda f: rewrite(f, lambda m: m.update({Q: "sub/model.safetensors"})), "not a plain name"),
    (lambda f: rewrite(f, lambda m: m.update({Q: "pytorch_model.bin"})), "pickled"),
    (lambda f: rewrite(f, lambda m: m.update({Q: 3})), "no weight_map"),
    (lambda f: index_of(f).write_text("[]"), "must hold a JSON object"),
    (lambda f: index_of(f).write_text("{"), "not valid JSON"),
    (lambda f: index_of(f).write_text('{"weight_map": {}}'), "no weight_map"),
    (lambda f: first(f).write_bytes(first(f).read_bytes()[:-100]), "cannot be read as safetensors"),
    (lambda f: first(f).write_bytes(b"not safetensors at all"), "cannot be read as safetensors"),
    (lambda f: first(f).write_bytes(b""), "cannot be read as safetensors"),
])
def test_a_broken_folder_is_refused_with_a_reason(tmp_path, breakage, message):
    folder, _ = folders.write(tmp_path / "a", shards=2)
    (tmp_path / "secret.safetensors").write_bytes(b"")
    breakage(folder)
    with pytest.raises((CheckpointError, DataError), match=message):
        read_tensors(folder)


def test_links_out_of_the_folder_are_refused_save_those_of_a_cache(tmp_path):
    folder, tensors = folders.write(tmp_path / "a")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is a link to .*elsewhere, outside of the folder"):
        read_tensors(folder)
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "elsewhere").rename(cache / "blobs" / "c0ffee")
    (cache / "snapshots" / "1" / "model.safetensors").symlink_to("../../blobs/c0ffee")
    assert same(read_tensors(cache / "snapshots" / "1"), tensors)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="is missing"):
        read_tensors(folder)


def test_quantised_numbers_are_refused(tmp_path):
    save_file({"model.embed_tokens.weight": np.zeros((2, 2), np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds I8 numbers.*quantised"):
        read_tensors(tmp_path)


def test_half_precision_is_read_exactly():
    tensors = {name: array.astype(np.float16) for name, array in folders.random_tensors(folders.CONFIGS["llama"]).items()}
    back = to_tensors(from_tensors(tensors, model_of("llama")), model_of("llama"), dtype="float16", causal=True)
    assert same(back, tensors)


def test_what_cannot_be_written_is_refused():
    model = model_of("llama")
    with pytest.raises(ConfigError, match="dtype 'int8' is not known"):
        to_tensors({}, model, dtype="int8")
    pooled = dataclasses.replace(model, pooling="tests.model.test_embedder:WeightedPooling")
    with pytest.raises(ConfigError, match="has parameters of its own"):
        to_tensors({}, pooled)
