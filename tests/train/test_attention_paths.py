"""Training with the dense reference and with the attention chosen by default is the same training: 50 steps of the demo's stage 3."""

import dataclasses
import importlib
import random
from pathlib import Path

import jax
import numpy as np

from conan_jax import config, config_io, sharding
from conan_jax.data.pipeline import Pipeline
from conan_jax.model import Embedder
from conan_jax.stages import make_stage
from conan_jax.train import optimizer, state
from conan_jax.train.step import make_train_step
from tests.data.corpus import WORDS, sentences, tokenizer

DEMO = Path(__file__).parents[2] / "configs" / "demo.py"
STEPS, BLOCK = 50, 8  # the demo's rows are 20 and 48 tokens long: 3 and 6 blocks
ATTENTION = importlib.import_module("conan_jax.model.attention")


def train(attention: str, monkeypatch) -> tuple[dict, list[dict[str, float]], set[str]]:
    """Parameters at the end, metrics of every step, and the implementations that were traced."""
    used = set()
    for name in ("dense", "blockwise"):
        real = getattr(ATTENTION, f"{name}_attention")
        monkeypatch.setattr(ATTENTION, f"{name}_attention", lambda *a, name=name, real=real: (used.add(name), real(*a))[1])
    run = config_io.load_run(f"{DEMO}:tiny", [f"weak.steps={STEPS}", f"model.attention={attention}", f"model.attention_block_size={BLOCK}"])
    stage_config = next(stage for stage in run.stages if stage.name == "weak")
    rng = random.Random(0)
    pairs = [{"query": " ".join(rng.choices(WORDS, k=4)), "pos": text, "instruction": ""} for text in sentences(120)]
    pipeline = Pipeline(run, stage_config, tokenizer(), sources={mix.dataset: pairs for mix in stage_config.datasets})
    embedder = Embedder(run.model)
    stage, axes = make_stage(stage_config, embedder), embedder.axes()
    updates = optimizer.make_optimizer(stage_config.optimizer, STEPS, axes)
    mesh = sharding.make_mesh(config.Mesh(1, 1, 1), jax.devices()[:1])
    with sharding.activate(mesh):
        abstract = state.abstract_state(embedder, stage, updates, pipeline.num_examples, mesh)
        current = state.begin(state.scratch_params(embedder, abstract, run.seed), abstract,
                              lambda params: state.fresh_state(params, stage, updates, pipeline.num_examples))
        schedule = optimizer.learning_rate_at(stage_config.optimizer, STEPS)
        step = make_train_step(stage, updates, schedule, run.seed, abstract)
        used.clear()  # parameters are made with the dense one
        curve = []
        for n in range(STEPS):
            current, metrics = step(current, sharding.global_batch(pipeline.batch(n), mesh))
            curve.append({name: float(value) for name, value in metrics.items()})
    return current.params, curve, used


def test_dense_and_default_attention_train_the_same_model(monkeypatch):
    with monkeypatch.context() as patch:
        dense, dense_curve, used = train("dense", patch)
        assert used == {"dense"}
    with monkeypatch.context() as patch:
        default, curve, used = train("auto", patch)
        assert used == {"blockwise"}
    assert [m["alpha"] for m in curve] == [m["alpha"] for m in dense_curve] and curve[0]["alpha"] == 0 and curve[-1]["alpha"] > 0.9
    losses, dense_losses = ([m["loss"] for m in c] for c in (curve, dense_curve))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])  # it is training
    np.testing.assert_allclose(losses, dense_losses, rtol=0, atol=1e-5)
    for got, want in zip(jax.tree.leaves(default), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
