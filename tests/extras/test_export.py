"""Exports in PyTorch: what the stock classes of sentence-transformers and transformers compute is what JAX computes."""

import dataclasses
import gzip
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import safetensors.numpy  # noqa: E402

torch = pytest.importorskip("torch")
sentence_transformers = pytest.importorskip("sentence_transformers")

import transformers  # noqa: E402

from conan_jax.config import RopeScaling  # noqa: E402
from conan_jax.data.tokenizer import Tokenizer  # noqa: E402
from conan_jax.export import torch_side  # noqa: E402
from conan_jax.export.folder import export  # noqa: E402
from conan_jax.hf.sample_texts import PLAIN, TEXTS  # noqa: E402
from conan_jax.export.verify import verify  # noqa: E402
from conan_jax.hf import manifest  # noqa: E402
from conan_jax.hf.importer import import_folder  # noqa: E402
from conan_jax.inference.encoder import Encoder  # noqa: E402
from tests.data.corpus import tokenizer  # noqa: E402
from tests.export.runs import MODEL, TASK, make_run  # noqa: E402
from tests.hf.folders import write as write_folder  # noqa: E402

PROMPT = f"Instruct: {TASK}\nQuery: "
SHARED = Path(os.environ.get("CONAN_DATA", "../shared/data"))
LANGUAGES = ("de", "en", "es", "fr", "it", "ja", "nl", "pl", "pt", "ru", "zh")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An embedder and a language model of one run, with a multiplier that is folded into the table."""
    place = tmp_path_factory.mktemp("run")
    model = dataclasses.replace(MODEL, embedding_multiplier=3.0)
    run = make_run(place / "run", model, steps=(("pretrain", 4), ("weak", 6), ("supervised", 3)))
    export(run.output_dir, place / "embedder")
    export(run.output_dir, place / "lm", stage="pretrain")
    return place / "embedder", place / "lm"


@pytest.fixture(scope="module")
def loaded(folders):
    return sentence_transformers.SentenceTransformer(str(folders[0]), device="cpu", local_files_only=True)


def real_texts() -> list[str]:
    """500 lines in ten languages and more where the shared data is; otherwise the built-in texts."""
    texts: list[str] = []
    for language in LANGUAGES:
        for file in sorted(SHARED.glob(f"sts/*{language}.train.jsonl.gz")):
            with gzip.open(file, "rt", encoding="utf-8") as opened:
                texts += [json.loads(line)["sentence1"] for _, line in zip(range(40), opened)]
    for part in ("lm/multi", "lm/zh", "lm/en"):
        file = SHARED / f"{part}.jsonl.gz"
        if file.is_file():
            with gzip.open(file, "rt", encoding="utf-8") as opened:
                texts += [json.loads(line)["text"] for _, line in zip(range(100), opened)]
    return texts[:500] if len(texts) >= 500 else list(TEXTS)


def cosines(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_an_environment_without_jax_computes_the_vectors_of_jax(folders, tmp_path):
    """The vectors go through a file to a process that cannot import jax or conan_jax: all it has is the folder and the stock classes."""
    texts = real_texts()
    encoder = Encoder.load(folders[0])
    np.savez(tmp_path / "jax.npz", bare=encoder.encode(texts), query=encoder.encode_query(texts))
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = """
        import json, sys

        hidden = ("jax", "jaxlib", "flax", "conan_jax", "sentencepiece")
        sys.modules.update(dict.fromkeys(hidden))  # None: not here, whoever asks
        import numpy as np
        from sentence_transformers import SentenceTransformer

        folder, place = sys.argv[1:]
        texts, expected = json.load(open(place + "/texts.json")), np.load(place + "/jax.npz")
        model = SentenceTransformer(folder, device="cpu", trust_remote_code=False, local_files_only=True)
        worst = {}
        for side, size in (("right", 32), ("left", 32), ("right", 1)):
            model.tokenizer.padding_side = side
            found = {"bare": model.encode(texts, batch_size=size), "query": model.encode(texts, batch_size=size, prompt_name="query")}
            for name, vectors in found.items():
                assert vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
                worst[f"{name} {side} {size}"] = float((vectors * expected[name]).sum(1).min())
        assert all(sys.modules[name] is None for name in hidden)
        print(json.dumps(worst))
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA"))}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(folders[0]), str(tmp_path)], capture_output=True, text=True,
                          cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    worst = json.loads(done.stdout.splitlines()[-1])
    assert len(worst) == 6 and min(worst.values()) > 0.9999, worst


def test_vectors_of_different_texts_differ(folders):
    """Cosines near 1 would say little if all vectors were one."""
    vectors = Encoder.load(folders[0]).encode(PLAIN)
    assert np.median(vectors @ vectors.T) < 0.9


def test_token_ids_are_those_of_sentencepiece(loaded):
    for prompt in ("", PROMPT):
        found = loaded.tokenizer([prompt + text for text in TEXTS])["input_ids"]
        assert found == [[*tokenizer().encode(prompt), *tokenizer().encode(text), 3] for text in TEXTS]


def test_dims_are_cut_and_brought_to_length_one(loaded, folders):
    encoder = Encoder.load(folders[0])
    for dim in (8, 16, 32):
        theirs = loaded.encode(list(TEXTS), truncate_dim=dim, normalize_embeddings=True)
        assert theirs.shape == (len(TEXTS), dim) and np.allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-5)
        assert cosines(theirs, encoder.encode(TEXTS, truncate_dim=dim)).min() > 0.9999


def test_saving_and_loading_again_changes_nothing(loaded, tmp_path):
    loaded.save(str(tmp_path / "again"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "again"), device="cpu", local_files_only=True)
    assert again.tokenizer(list(TEXTS))["input_ids"] == loaded.tokenizer(list(TEXTS))["input_ids"]
    assert again.prompts == loaded.prompts and again.max_seq_length == loaded.max_seq_length == 64
    for name in (None, "query"):
        np.testing.assert_array_equal(again.encode(list(TEXTS), prompt_name=name), loaded.encode(list(TEXTS), prompt_name=name))


def test_eager_and_sdpa_attention_agree(folders, loaded):
    eager = sentence_transformers.SentenceTransformer(str(folders[0]), device="cpu", model_kwargs={"attn_implementation": "eager"})
    np.testing.assert_allclose(eager.encode(list(TEXTS)), loaded.encode(list(TEXTS)), atol=1e-5)


def test_verify_accepts_both_kinds(folders):
    reports = [verify(folder) for folder in folders]
    for report in reports:
        assert report.ok and report.min_cosine > 0.9999 and report.token_rows_that_differ == 0 and not report.problems
        assert [layer.name for layer in report.layers] == ["embeddings", "layer 1", "layer 2"]
    assert {"first 8 of 32", "first 16 of 32", "prompt query, padded left", "one by one"} <= {check.name for check in reports[0].checks}


ROPE = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


@pytest.mark.parametrize("changes", [{"qk_norm": True, "rope_scaling": ROPE}, {"attention_bias": True, "pooling": "last"}],
                         ids=["qwen3", "qwen2, last token"])
def test_other_architectures_and_poolings(tmp_path, changes):
    make_run(tmp_path / "run", dataclasses.replace(MODEL, **changes), steps=(("weak", 6),))
    export(tmp_path / "run", tmp_path / "e")
    assert verify(tmp_path / "e", TEXTS[:2] + TEXTS[-10:]).ok


def test_an_imported_tokenizer(tmp_path):
    """Byte-level BPE that came with a model; its export cuts prompts from texts as training does."""
    reader = Tokenizer.load(write_folder(tmp_path / "source", "qwen2")[0])
    make_run(tmp_path / "run", dataclasses.replace(MODEL, attention_bias=True), steps=(("weak", 6),), reader=reader)
    export(tmp_path / "run", tmp_path / "e")
    assert verify(tmp_path / "e", TEXTS[:2] + TEXTS[-10:]).ok


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_an_imported_model_comes_out_as_it_came_in(tmp_path, family):
    source, _ = write_folder(tmp_path / "source", family)
    import_folder(source, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    ids = torch.tensor([[5, 9, 20, 33, 7]])
    with torch.no_grad():
        before, after = (transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (source, tmp_path / "out"))
    assert torch.equal(before, after)


def test_bfloat16(folders, tmp_path):
    export(folders[0].parent / "run", tmp_path / "e", dtype="bfloat16")
    report = verify(tmp_path / "e", TEXTS[:10])
    assert report.ok and report.min_cosine > 0.9999
    assert {check.name: check.bar for check in report.checks}["as loaded, bfloat16"] == 0.999


# ------------------------------------------------------------------------------------------- what verify must find


def damaged(folders, tmp_path, change):
    """A copy of the embedder with a change, and a manifest that says that nothing happened."""
    out = tmp_path / "damaged"
    export(folders[0].parent / "run", out)
    change(out)
    manifest.write(out)
    return out


def set_key(file, **keys):
    def change(out):
        (out / file).write_text(json.dumps({**json.loads((out / file).read_text()), **keys}))
    return change


def rotate_a_weight(out):
    tensors = safetensors.numpy.load_file(out / "model.safetensors")
    tensors["layers.0.mlp.up_proj.weight"] = np.roll(tensors["layers.0.mlp.up_proj.weight"], 1, axis=0)
    safetensors.numpy.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change, failing", [
    (rotate_a_weight, "check vectors, JAX"),
    (set_key("config.json", is_causal=True, use_bidirectional_attention=False), "batch, padded right"),
    (set_key("config.json", rope_theta=200.0, rope_parameters={"rope_type": "default", "rope_theta": 200.0}), "batch, padded right"),
    (set_key("1_Pooling/config.json", include_prompt=True), "prompt query, padded right"),
    (set_key("1_Pooling/config.json", pooling_mode="lasttoken"), "one by one"),
], ids=["weight", "mask", "rope", "prompt", "pooling"])
def test_verify_finds(folders, tmp_path, change, failing):
    report = verify(damaged(folders, tmp_path, change), TEXTS[:3])
    assert not report.ok and report.min_cosine < 0.9999
    assert failing in [check.name for check in report.checks if not check.ok]


def test_verify_finds_other_token_ids(folders, tmp_path):
    def change(out):
        data = json.loads((out / "tokenizer.json").read_text())
        data["model"]["merges"] = data["model"]["merges"][::-1]
        (out / "tokenizer.json").write_text(json.dumps(data))

    report = verify(damaged(folders, tmp_path, change), TEXTS[:3])
    assert report.token_rows_that_differ > 0 and not report.ok


def test_an_old_transformers_is_named(folders, monkeypatch):
    for version, words in (("5.1.2", "ignores"), ("4.57.0", "ignores"), ("5.2.0", ""), ("5.10.1", ""), ("6.0.0.dev0", "")):
        monkeypatch.setattr(torch_side.metadata, "version", lambda name: version)
        assert words in torch_side.ignores_flags() and bool(words) == bool(torch_side.ignores_flags())


def test_the_command_ends_with_1_and_says_so(folders, tmp_path):
    from typer.testing import CliRunner

    from conan_jax.cli.main import app

    out = damaged(folders, tmp_path, rotate_a_weight)
    texts = tmp_path / "texts.txt"
    texts.write_text("the file\n\nread and write\n")
    result = CliRunner().invoke(app, ["verify", str(out), "--json", "--texts", str(texts)])
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and found["ok"] is False and found["min_cosine"] < 0.9999
    assert {check["name"]: check["vectors"] for check in found["checks"]}["one by one"] == 2
    assert found["versions"]["transformers"] == transformers.__version__


def test_logits_of_a_language_model(folders):
    from conan_jax.inference.load import load
    from conan_jax.model import Causal, Embedder, Layout

    model = transformers.AutoModelForCausalLM.from_pretrained(folders[1])
    assert type(model).__name__ == "LlamaForCausalLM"
    read = transformers.AutoTokenizer.from_pretrained(folders[1])
    loaded = load(folders[1])
    ids = read("the file name is a key")["input_ids"]
    assert ids == tokenizer().encode("the file name is a key")
    embedder = Embedder(loaded.model)
    row = np.array([ids], np.int32)
    layout = Layout.from_lengths(np.array([len(ids)]), len(ids))
    expected = embedder.logits(loaded.params, embedder.hidden(loaded.params, row, layout, Causal()))
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor([ids])).logits[0], expected[0], atol=1e-4)
    assert model.generate(torch.tensor([ids]), max_new_tokens=4).shape[1] > len(ids)


@pytest.mark.parametrize("which", [0, 1], ids=["embedder", "lm"])
def test_the_code_of_the_card_runs(folders, which):
    card = (folders[which] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == (3, 1)[which]
    for block in blocks:
        exec(compile(block.replace("path/to/this/folder", str(folders[which])), "card", "exec"), {})
