"""Models that were imported: out as they came in, or, trained further, with the tokenizer they came with."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers

from conan_jax.data.tokenizer import Tokenizer
from conan_jax.errors import ConfigError
from conan_jax.export.folder import export
from conan_jax.hf import manifest
from conan_jax.hf.importer import import_folder
from conan_jax.hf.weights import read_tensors
from conan_jax.inference.encoder import Encoder
from tests.export.runs import MODEL, TASK, make_run
from tests.hf import folders

PROMPT = f"Instruct: {TASK}\nQuery: "


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("family, dtype", [("llama", "bfloat16"), ("mistral", "float32"), ("qwen2", "bfloat16"), ("qwen3", "float32")])
def test_what_was_imported_comes_out_bit_for_bit(tmp_path, family, dtype):
    source, tensors = folders.write(tmp_path / "source", family, dtype, shards=2)
    import_folder(source, tmp_path / "run")
    described = export(tmp_path / "run", tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name
    before, after = read(source / "config.json"), read(tmp_path / "out" / "config.json")
    assert {key: after[key] for key in before} == before
    assert (described["architecture"], described["kind"], described["dtype"]) == (family, "causal", dtype)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert read(tmp_path / "out" / name) == read(source / name)
    assert manifest.check(tmp_path / "out") > 6
    texts = ["the reader", "a file"]
    np.testing.assert_allclose(Encoder.load(tmp_path / "out").encode(texts), Encoder.load(tmp_path / "run").encode(texts), atol=1e-6)


def test_an_imported_embedder_is_an_embedder(tmp_path):
    source, tensors = folders.write(tmp_path / "source", "llama", causal=False, is_causal=False, architectures=["LlamaModel"])
    import_folder(source, tmp_path / "run")
    described = export(tmp_path / "run", tmp_path / "out")
    assert (described["kind"], described["mask"]) == ("embedder", "bidirectional") and (tmp_path / "out" / "modules.json").is_file()
    assert set(read_tensors(tmp_path / "out")) == set(tensors)
    causal, _ = folders.write(tmp_path / "causal", "llama", causal=False, architectures=["LlamaModel"])
    import_folder(causal, tmp_path / "run2")
    described = export(tmp_path / "run2", tmp_path / "out2")
    assert (described["kind"], described["mask"]) == ("embedder", "causal") and read(tmp_path / "out2" / "config.json")["is_causal"] is True


def test_a_tokenizer_that_was_imported_reads_prompts_apart(tmp_path):
    reader = Tokenizer.load(folders.write(tmp_path / "source")[0])
    run = make_run(tmp_path / "run", dataclasses.replace(MODEL, attention_bias=True), steps=(("weak", 6),), reader=reader)
    described = export(run.output_dir, tmp_path / "out")
    assert described["architecture"] == "llama"  # transformers gives a qwen2 no tokenizer but its own
    assert not read_tensors(tmp_path / "out")["layers.1.self_attn.o_proj.bias"].any()
    joint = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    joint.encode_special_tokens = True
    for text in ("the reader", "", "  a", "</s>", ": b"):
        assert joint.encode(PROMPT + text).ids == [*reader.encode(PROMPT), *reader.encode(text), reader.eos_id]
    assert reader.encode(PROMPT + "the") != [*reader.encode(PROMPT), *reader.encode("the")]  # without the cut they would differ
    settings = read(tmp_path / "out" / "tokenizer_config.json")
    assert (settings["eos_token"], settings["pad_token"]) == ("</s>", "<pad>") and settings["split_special_tokens"] is True
    ours, theirs = Encoder.load(run.output_dir), Encoder.load(tmp_path / "out")
    np.testing.assert_allclose(theirs.encode_query(["the reader", ""]), ours.encode_query(["the reader", ""]), atol=1e-6)
    assert theirs.identity == ours.identity


def test_a_tokenizer_that_marks_the_start_of_a_text_is_refused(tmp_path):
    source, _ = folders.write(tmp_path / "source")
    changed = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    changed.normalizer = normalizers.Prepend("x")
    changed.save(str(source / "tokenizer.json"))
    make_run(tmp_path / "run", steps=(("weak", 6),), reader=Tokenizer.load(source))
    with pytest.raises(ConfigError, match="changes the beginning of every text"):
        export(tmp_path / "run", tmp_path / "out")


def test_the_card_of_an_average_names_what_was_averaged(tmp_path):
    make_run(tmp_path / "a", steps=(("weak", 6),))
    (tmp_path / "a" / "merge.json").write_text(json.dumps({"sources": [
        {"folder": "/some/where/runs/one/weak", "step": 4, "weight": 0.25},
        {"folder": "/some/where/runs/two/weak", "step": 6, "weight": 0.75}]}))
    export(tmp_path / "a", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| average of checkpoints | 0.25 x one/weak, step 4; 0.75 x two/weak, step 6 |" in card and "/some/where" not in card


def test_lower_case_is_exported_as_a_setting(tmp_path):
    """transformers gives a qwen2 or qwen3 a normaliser of its own, so that of tokenizer.json is not enough."""
    source = folders.sentence_files(folders.write(tmp_path / "source", "qwen3", causal=False)[0], transformer={"do_lower_case": True})
    import_folder(source, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    assert read(tmp_path / "out" / "sentence_bert_config.json")["do_lower_case"] is True
