"""An identity tells weights apart that go by the same names, and knows them again in an export."""

import dataclasses
import hashlib

import jax
import numpy as np
import pytest

from conan_jax import config
from conan_jax.export.folder import export
from conan_jax.hf.weights import to_tensors
from conan_jax.inference.encoder import Encoder
from conan_jax.inference.identity import weights_sha256
from conan_jax.model import Embedder
from tests.data.corpus import tokenizer
from tests.export.runs import MODEL, make_run, save
from tests.model.models import params_of


def test_the_digest_is_that_of_the_tensors_of_a_float32_export():
    params = params_of(Embedder(MODEL))
    digest = hashlib.sha256()
    for name, tensor in sorted(to_tensors(params, MODEL).items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode() + tensor.tobytes())
    assert weights_sha256(params, MODEL) == digest.hexdigest()


def test_one_number_of_any_tensor_makes_another_model():
    params = params_of(Embedder(dataclasses.replace(MODEL, attention_bias=True)))
    model, leaves = dataclasses.replace(MODEL, attention_bias=True), jax.tree.leaves(params)
    seen = {weights_sha256(params, model)}
    for i in range(len(leaves)):
        changed = [np.array(leaf) for leaf in leaves]
        changed[i].reshape(-1)[-1] += 1
        seen.add(weights_sha256(jax.tree.unflatten(jax.tree.structure(params), changed), model))
    assert len(seen) == len(leaves) + 1


def test_what_no_vector_follows_from_is_not_part_of_it():
    untied = dataclasses.replace(MODEL, tie_word_embeddings=False)
    params = params_of(Embedder(untied))
    assert weights_sha256(params, untied) == weights_sha256({k: v for k, v in params.items() if k != "output_embedding"}, MODEL)


@pytest.mark.parametrize("changes", [{}, {"embedding_multiplier": 3.0}, {"tie_word_embeddings": False, "qk_norm": True},
                                     {"attention_bias": True, "attention_output_bias": False}])
def test_a_run_and_its_float32_export_have_one_identity_and_a_bfloat16_one_another(tmp_path, changes):
    run = make_run(tmp_path / "run", dataclasses.replace(MODEL, **changes), steps=(("weak", 6),))
    export(run.output_dir, tmp_path / "whole")
    export(run.output_dir, tmp_path / "short", dtype="bfloat16")
    ours, whole, short = (Encoder.load(place).identity for place in (run.output_dir, tmp_path / "whole", tmp_path / "short"))
    assert ours == whole and len(ours["weights_sha256"]) == 64
    assert short["weights_sha256"] != ours["weights_sha256"]


def test_a_pooling_with_numbers_of_its_own_counts(monkeypatch):
    from conan_jax.inference import identity

    params = {**params_of(Embedder(MODEL)), "pooling": {"weight": np.ones(3, np.float32)}}
    model = dataclasses.replace(MODEL, pooling="somewhere:Own")
    other = {**params, "pooling": {"weight": np.zeros(3, np.float32)}}
    assert identity.weights_sha256(params, model) != identity.weights_sha256(other, model)


def test_nothing_is_hashed_until_it_is_asked_for_and_then_once(monkeypatch):
    from conan_jax.inference import encoder as module

    calls = []
    monkeypatch.setattr(module, "weights_sha256", lambda params, model: calls.append(1) or "d")
    encoder = Encoder(params_of(Embedder(MODEL)), MODEL, tokenizer(), identity={"run": "r"})
    assert not calls
    assert encoder.identity == encoder.identity == {"tokenizer_sha256": tokenizer().sha256, "run": "r", "weights_sha256": "d"}
    assert len(calls) == 1
