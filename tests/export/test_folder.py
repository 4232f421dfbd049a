"""What `conan export` writes, and what it refuses. That PyTorch reads it is shown in tests/extras."""

import dataclasses
import hashlib
import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import yaml
from rich.console import Console
from typer.testing import CliRunner

from conan_jax.cli.main import app
from conan_jax.cli.verify import _print
from conan_jax.errors import CheckpointError, ConfigError, DataError
from conan_jax.export import folder as folder_module
from conan_jax.export.folder import export
from conan_jax.export.verify import Check, Report, verify
from conan_jax.hf import manifest
from conan_jax.inference.encoder import Encoder
from conan_jax.inference.prompts import prompts_of
from conan_jax.model import Embedder
from tests.data.corpus import tokenizer
from tests.export.runs import FIGURES, MODEL, TASK, make_run, save
from tests.model.models import params_of

PROMPT = f"Instruct: {TASK}\nQuery: "
TEXTS = ["the file name", "", "  read and write", "模型 训练", "a\u2581b </s>", "word " * 100]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "tiny"
    export(run.output_dir, out)
    return out


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_an_embedder_is_the_folder_of_sentence_transformers(exported):
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert files == {"README.md", "check.json", "conan.json", "config.json", "config_sentence_transformers.json", "manifest.json",
                     "model.safetensors", "modules.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer.model",
                     "tokenizer_config.json", "1_Pooling/config.json"}
    settings = read(exported / "config.json")
    assert settings["architectures"] == ["LlamaModel"] and settings["model_type"] == "llama"
    assert settings["is_causal"] is False and settings["use_bidirectional_attention"] is True
    assert (settings["pad_token_id"], settings["bos_token_id"], settings["eos_token_id"]) == (0, 2, 3)
    assert "auto_map" not in settings and not list(exported.rglob("*.py"))  # no remote code
    assert [m["type"] for m in read(exported / "modules.json")] == [f"sentence_transformers.models.{kind}" for kind in
                                                                   ("Transformer", "Pooling", "Normalize")]
    pooling = read(exported / "1_Pooling" / "config.json")
    assert pooling["pooling_mode_mean_tokens"] is True and pooling["pooling_mode"] == "mean" and pooling["include_prompt"] is False
    assert sum(value is True for key, value in pooling.items() if key.startswith("pooling_mode_")) == 1
    assert read(exported / "sentence_bert_config.json")["max_seq_length"] == 64
    prompts = read(exported / "config_sentence_transformers.json")["prompts"]
    assert prompts == {"query": PROMPT, "document": "", "pairs": PROMPT, "dev": PROMPT}
    assert (exported / "model.safetensors").stat().st_mode & 0o044 == 0o044  # others may read it, as all other files


def test_the_encoder_gives_the_vectors_of_the_run(run, exported):
    ours, theirs = Encoder.load(run.output_dir), Encoder.load(exported)
    np.testing.assert_allclose(theirs.encode(TEXTS), ours.encode(TEXTS), atol=1e-6)
    np.testing.assert_allclose(theirs.encode_query(TEXTS), ours.encode_query(TEXTS), atol=1e-6)
    assert theirs.identity == ours.identity and theirs.prompts == ours.prompts == {"query": PROMPT, "document": "", **prompts_of(run)}


def test_tokens_are_those_of_training(exported):
    hf = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    for text in TEXTS:
        assert hf.encode(text).ids == [*tokenizer().encode(text), 3]
        assert hf.encode(PROMPT + text).ids == [*tokenizer().encode(PROMPT), *tokenizer().encode(text), 3]


def test_the_manifest_lists_every_file_and_finds_every_change(exported):
    listed = read(exported / "manifest.json")["files"]
    assert set(listed) == {p.relative_to(exported).as_posix() for p in exported.rglob("*") if p.is_file()} - {"manifest.json"}
    for name, facts in listed.items():
        content = (exported / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest.check(exported) == len(listed)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "1_Pooling/config.json"])
@pytest.mark.parametrize("change, words", [
    ("flip", "is not as it was exported"), ("cut", "bytes and manifest.json says"), ("remove", "is missing")])
def test_a_changed_file_is_named(run, tmp_path, name, change, words):
    export(run.output_dir, tmp_path / "e")
    file = tmp_path / "e" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink() if change == "remove" else file.write_bytes(content if change == "flip" else content[:-1])
    with pytest.raises(DataError, match=f"{re.escape(name)}.* {words}"):
        manifest.check(tmp_path / "e")
    with pytest.raises(DataError, match=re.escape(name)):
        verify(tmp_path / "e", jax_only=True)


@pytest.mark.parametrize("entry", [3, {}, {"bytes": "10", "sha256": "ab"}, {"bytes": 10}])
def test_a_manifest_of_another_form_is_named_with_the_entry(exported, tmp_path, entry):
    shutil.copytree(exported, tmp_path / "e")
    listed = read(tmp_path / "e/manifest.json")
    listed["files"]["config.json"] = entry
    (tmp_path / "e/manifest.json").write_text(json.dumps(listed))
    for reads in (manifest.check, Encoder.load):
        with pytest.raises(DataError, match="manifest.json must give `bytes` and `sha256` of 'config.json'"):
            reads(tmp_path / "e")


def conan(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("what", ["altered", "no export", "no texts"])
def test_the_command_prints_its_object_on_an_error_too(run, exported, tmp_path, what):
    export(run.output_dir, tmp_path / "e")
    (tmp_path / "e" / "config.json").write_text("{}" if what == "altered" else (exported / "config.json").read_text())
    folder, more = (tmp_path / "none" if what == "no export" else tmp_path / "e"), ["--texts", tmp_path / "none"] * (what == "no texts")
    result = conan("verify", folder, "--jax-only", "--json", *more)
    found = json.loads(result.stdout)
    assert found["ok"] is False and found["error"] == str(result.exception) and isinstance(result.exception, DataError)
    assert found["min_cosine"] is None and found["checks"] == [] and found["folder"] == str(folder)
    whole = json.loads(conan("verify", exported, "--jax-only", "--json").stdout)
    assert list(found) == list(whole) and whole["ok"] is True and whole["error"] is None
    assert conan("verify", folder, "--jax-only", *more).stdout.strip() == ""


def test_a_check_without_pytorch_says_so(exported, capsys):
    said = conan("verify", exported, "--jax-only").stdout
    assert "verified in JAX alone, PyTorch was not asked: worst cosine 0.99" in said or "not asked: worst cosine 1.0" in said
    assert json.loads(conan("verify", exported, "--jax-only", "--json").stdout)["jax_only"] is True
    _print(Console(), Report("e", checks=[Check("c", 1, 1.0, 0.0, 0.9999)]))
    whole = capsys.readouterr().out
    assert "verified: worst cosine 1.0" in whole and "PyTorch" not in whole


def test_what_is_no_number_is_null():
    nan = Report("e", checks=[Check("c", 1, float("nan"), float("inf"), 0.9999)]).to_dict()
    assert nan["ok"] is False and nan["min_cosine"] is None and nan["checks"][0]["max_abs_diff"] is None


def test_check_vectors_tell_other_weights_apart(run, exported, tmp_path):
    assert verify(exported, jax_only=True).ok
    export(run.output_dir, tmp_path / "e")
    tensors = safetensors.numpy.load_file(tmp_path / "e" / "model.safetensors")
    tensors["layers.1.self_attn.q_proj.weight"] = tensors["layers.1.self_attn.q_proj.weight"][::-1].copy()
    safetensors.numpy.save_file(tensors, tmp_path / "e" / "model.safetensors", metadata={"format": "pt"})
    manifest.write(tmp_path / "e")
    report = verify(tmp_path / "e", jax_only=True)
    assert not report.ok and report.min_cosine < 0.9999


def test_bfloat16_is_the_rounded_float32(run, exported, tmp_path):
    described = export(run.output_dir, tmp_path / "e", dtype="bfloat16")
    for name, array in safetensors.numpy.load_file(tmp_path / "e" / "model.safetensors").items():
        whole = safetensors.numpy.load_file(exported / "model.safetensors")[name]
        np.testing.assert_array_equal(array, whole.astype(ml_dtypes.bfloat16))
    assert described["identity"]["dtype"] == "bfloat16" and read(tmp_path / "e" / "config.json")["dtype"] == "bfloat16"
    assert verify(tmp_path / "e", jax_only=True).ok


def test_the_multiplier_of_the_embeddings_is_in_their_table(tmp_path):
    model = dataclasses.replace(MODEL, embedding_multiplier=4.0)
    run = make_run(tmp_path / "run", model)
    export(tmp_path / "run", tmp_path / "e")
    np.testing.assert_allclose(Encoder.load(tmp_path / "e").encode(TEXTS), Encoder.load(run.output_dir).encode(TEXTS), atol=1e-6)
    export(tmp_path / "run", tmp_path / "lm", stage="pretrain")
    tensors = safetensors.numpy.load_file(tmp_path / "lm" / "model.safetensors")
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], 4 * tensors["lm_head.weight"])
    assert read(tmp_path / "lm" / "config.json")["tie_word_embeddings"] is False
    assert verify(tmp_path / "lm", jax_only=True).ok


def test_a_causal_stage_is_a_language_model(run, tmp_path):
    described = export(run.output_dir, tmp_path / "lm", stage="pretrain")
    files = {path.name for path in (tmp_path / "lm").iterdir()}
    assert "generation_config.json" in files and not files & {"modules.json", "1_Pooling", "config_sentence_transformers.json"}
    settings = read(tmp_path / "lm" / "config.json")
    assert settings["architectures"] == ["LlamaForCausalLM"] and settings["is_causal"] is True and settings["tie_word_embeddings"] is True
    assert described["kind"] == described["mask"] == "causal"
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "lm" / "tokenizer.json"))
    assert hf.encode("the file").ids == tokenizer().encode("the file")  # no EOS: it is to be continued
    assert verify(tmp_path / "lm", jax_only=True).ok


def test_any_step_of_any_stage(run, tmp_path):
    assert export(run.output_dir, tmp_path / "a")["identity"]["stage"] == "supervised"
    weak = export(run.output_dir, tmp_path / "b", stage="weak", step=6)["identity"]
    assert (weak["stage"], weak["step"]) == ("weak", 6)
    assert export(f"{run.output_dir}/weak", tmp_path / "c")["identity"] == weak


# ------------------------------------------------------------------------------------------- refused


def test_a_mask_that_is_not_finished_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="step 3 of 6 the stage 'weak' attends through a mask between causal and bidirectional.*--stage"):
        export(run.output_dir, tmp_path / "e", stage="weak", step=3)
    assert not list(tmp_path.iterdir())


def test_a_pooling_of_its_own_is_refused(tmp_path):
    run = make_run(tmp_path / "run", dataclasses.replace(MODEL, pooling="conan_jax.model.pooling:MeanPooling"), steps=(("weak", 6),))
    with pytest.raises(ConfigError, match="without remote code; train with 'mean' or 'last'"):
        export(run.output_dir, tmp_path / "e")


@pytest.mark.parametrize("options, error, words", [
    ({"dtype": "float16"}, ConfigError, "float32 or bfloat16"), ({"stage": "nope"}, ConfigError, "no stage 'nope'"),
    ({"stage": "weak", "step": 5}, CheckpointError, "5"),
])
def test_what_is_not_there_is_refused(run, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        export(run.output_dir, tmp_path / "e", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_run_is_refused(run, exported, tmp_path):
    with pytest.raises(CheckpointError, match="no trained model"):
        export(tmp_path, tmp_path / "e")
    with pytest.raises(ConfigError, match="is an export already"):
        export(exported, tmp_path / "e")


def test_only_an_export_gives_way_and_only_by_force(run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    export(run.output_dir, mine)  # an empty folder
    with pytest.raises(ConfigError, match="--force"):
        export(run.output_dir, mine)
    (mine / "stray.txt").write_text("x")
    export(run.output_dir, mine, stage="weak", force=True)
    assert read(mine / "conan.json")["identity"]["stage"] == "weak" and not (mine / "stray.txt").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="no export"):
        export(run.output_dir, other, force=True)
    with pytest.raises(ConfigError, match="not a folder"):
        export(run.output_dir, other / "thesis.tex", force=True)
    assert (other / "thesis.tex").read_text() == "years of work"


def test_whole_or_not_at_all(run, tmp_path, monkeypatch):
    export(run.output_dir, tmp_path / "e")
    before = {path: path.read_bytes() for path in (tmp_path / "e").rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module.card, "render", full)
    for out in ("e", "new"):
        with pytest.raises(DataError, match="No space left on device"):
            export(run.output_dir, tmp_path / out, stage="weak", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]
    assert {path: path.read_bytes() for path in (tmp_path / "e").rglob("*") if path.is_file()} == before


def test_pooling_of_the_last_token(tmp_path):
    run = make_run(tmp_path / "run", dataclasses.replace(MODEL, pooling="last"), steps=(("weak", 6),))
    export(run.output_dir, tmp_path / "e")
    pooling = read(tmp_path / "e" / "1_Pooling" / "config.json")
    assert pooling["pooling_mode"] == "lasttoken" and pooling["pooling_mode_lasttoken"] and not pooling["pooling_mode_mean_tokens"]


# ------------------------------------------------------------------------------------------- the card


def test_the_card_says_what_the_run_says(run, exported):
    card = (exported / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "sentence-transformers" and front["pipeline_tag"] == "sentence-similarity"
    assert {"sentence-transformers", "feature-extraction", "llama"} <= set(front["tags"])
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("| ")]
    rows = {cells[0]: cells[1:] for cells in tables}
    for row, figures in FIGURES.items():
        expected = [f"{figures['dev'][m]:.4f}" if m in figures["dev"] else "" for m in ("ndcg@10", "recall@10")]
        assert rows[row] == expected or rows[row][:1] == [row]  # the last row of that name is one of the recipe
        assert not expected[0] or expected[0] in card
    assert "12,345" in card and "some_pairs.jsonl" in card and "0.9999" not in card
    assert rows["weak"][0] == "weak" and rows["supervised"][1:3] == ["3", "8"]
    assert "transformers >= 5.2" in card and "unused" not in card
    count = sum(array.size for array in safetensors.numpy.load_file(exported / "model.safetensors").values())
    assert json.dumps(PROMPT) in card and f"| parameters | {count:,} |" in card


def test_no_path_of_the_machine_is_in_an_export(run, exported, tmp_path_factory):
    places = {str(tmp_path_factory.getbasetemp()), run.output_dir}
    for path in exported.rglob("*"):
        if path.is_file():
            assert not any(place.encode() in path.read_bytes() for place in places), path


def test_figures_of_another_step_are_left_out(tmp_path):
    run = make_run(tmp_path / "run", steps=(("pretrain", 4), ("weak", 6), ("supervised", 2)))
    export(run.output_dir, tmp_path / "e")
    card = (tmp_path / "e" / "README.md").read_text()
    assert "0.4568" not in card and "0.3457" in card and "was not scored itself" in card


def test_a_run_without_figures_has_a_card_without_figures(tmp_path):
    run = make_run(tmp_path / "run", steps=(("weak", 6),))
    for row in FIGURES:
        (tmp_path / "run" / row / "evaluation.json").unlink()
    (tmp_path / "run" / "data" / "pairs" / "manifest.json").unlink()
    export(run.output_dir, tmp_path / "e")
    card = (tmp_path / "e" / "README.md").read_text()
    assert "## Figures" not in card and "Nothing is known here of its quality" in card
    assert "| pairs | pair |  | pretrain, weak | some_pairs.jsonl |" in card


def test_the_export_of_what_was_trained_further_is_another(run, tmp_path):
    """A step that comes later is exported, not one that was looked at before."""
    other = make_run(tmp_path / "run", steps=(("weak", 6),))
    export(other.output_dir, tmp_path / "e")
    first = Encoder.load(tmp_path / "e").encode("the file")
    save(other, "supervised", 3, jax.tree.map(lambda a: a[..., ::-1] * 1.5, params_of(Embedder(MODEL))))
    export(other.output_dir, tmp_path / "e", force=True)
    assert np.abs(Encoder.load(tmp_path / "e").encode("the file") - first).max() > 1e-3
