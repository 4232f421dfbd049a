"""What is saved comes back bit for bit; what does not belong here is refused by name."""

import contextlib
import dataclasses
import io
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from conan_jax import config, sharding
from conan_jax.errors import CheckpointError, Preempted
from conan_jax.train import checkpoint, start_rule
from conan_jax.train.loop import train_stage
from conan_jax.train.state import TrainState
from tests.train.toy_stage import ToyEmbedder, ToyPipeline, ToyStage, toy_run

RUN = toy_run(8)
STAGE = RUN.stages[0]
WEIGHTS = {"w": ("embed", "mlp")}
AXES = TrainState(step=(), params=WEIGHTS, opt_state=(WEIGHTS, ()), carry={"s0": ("examples",)}, skipped=(), skipped_in_row=())


def make_state(step, sizes=(1, 8, 1)):
    mesh = sharding.make_mesh(config.Mesh(*sizes), jax.devices()[: math.prod(sizes)])
    rng = np.random.default_rng(step)
    count, weights, moment = np.int32(step), *rng.normal(size=(2, 16, 8)).astype(np.float32)
    values = TrainState(step=count, params={"w": weights}, opt_state=({"w": moment}, count),
                        carry={"s0": np.array([np.nan, 1.5] * 8, np.float32)}, skipped=np.int32(1), skipped_in_row=np.int32(0))
    return jax.device_put(values, sharding.shardings_for(AXES, values, mesh))


def abstract(state):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def save(folder, *steps, run=RUN, tokenizer="aaa", keep=2, state=None):
    checkpoints = checkpoint.Checkpoints(folder, keep, checkpoint.make_metadata(run, run.stages[0], tokenizer))
    for step in steps:
        checkpoints.save(step, make_state(step) if state is None else state)
    checkpoints.close()
    return folder


def test_a_state_returns_bit_for_bit_onto_any_mesh(tmp_path):
    save(tmp_path, 5)
    for sizes in ((1, 8, 1), (2, 2, 2), (1, 1, 1), (1, 4, 1), (2, 1, 2)):
        target = abstract(make_state(0, sizes))
        back = checkpoint.restore_state(tmp_path, 5, target)
        assert same(back, make_state(5)) and np.isnan(back.carry["s0"][0])
        assert back.params["w"].sharding == target.params["w"].sharding and len(back.params["w"].sharding.device_set) == math.prod(sizes)
        # And from there, as after a restart on yet another number of devices.
        save(tmp_path / str(sizes), 7, state=back)
        assert same(checkpoint.restore_state(tmp_path / str(sizes), 7, abstract(make_state(0))), make_state(5))


def test_weights_alone_return_on_one_device(tmp_path):
    save(tmp_path, 3, 4)
    params = checkpoint.restore_params(tmp_path)
    assert same(params, make_state(4).params) and len(params["w"].sharding.device_set) == 1
    assert same(checkpoint.restore_params(tmp_path, step=3), make_state(3).params)


def test_metadata_says_what_the_checkpoint_is(tmp_path):
    metadata = checkpoint.read_metadata(save(tmp_path, 8))
    assert {"format": 1, "stage": "toy", "step": 8, "steps": 8, "tokenizer_sha256": "aaa"}.items() <= metadata.items()
    assert metadata["config"]["model"]["hidden_size"] == RUN.model.hidden_size
    assert metadata["config"]["stages"][0]["optimizer"]["learning_rate"] == 1e-2


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [3, 4]
    assert checkpoint.latest_step(tmp_path) == 4


def test_a_step_is_not_written_twice(tmp_path):
    save(tmp_path, 4)
    before = (tmp_path / "checkpoints/4/_CHECKPOINT_METADATA").stat().st_mtime_ns
    save(tmp_path, 4)
    assert (tmp_path / "checkpoints/4/_CHECKPOINT_METADATA").stat().st_mtime_ns == before


def start(folder, previous=None, model=RUN.model, tokenizer="aaa"):
    return start_rule.find_start(folder, previous, model, tokenizer)


def test_start_rule_own_run_then_previous_stage_then_scratch(tmp_path):
    own, previous = tmp_path / "own", tmp_path / "previous"
    assert start(own, previous).kind == "scratch" and start(own).kind == "scratch"
    save(previous, 8)
    assert start(own, previous) == start_rule.Start("previous", previous, 8)
    save(own, 2, 4)
    assert start(own, previous) == start_rule.Start("resume", own, 4)


def test_a_previous_stage_that_stopped_half_way_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'toy'.*step 6 of 8.*finish it"):
        start(tmp_path / "own", save(tmp_path / "previous", 6))


def test_a_torn_save_is_never_the_start(tmp_path):
    """A killed save leaves a folder under a temporary name; the step before it counts, and a new run can save the step again."""
    save(tmp_path, 4)
    torn = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "4", torn)
    (torn / "params" / "manifest.ocdbt").unlink()
    assert start(tmp_path).step == 4
    save(tmp_path, 6)
    assert start(tmp_path).step == 6 and not torn.exists()


def test_another_tokenizer_is_refused_with_both_hashes(tmp_path):
    save(tmp_path / "a", 8)
    for own, previous in ((tmp_path / "a", None), (tmp_path / "b", tmp_path / "a")):
        with pytest.raises(CheckpointError, match="tokenizer aaa and this run has tokenizer bbb"):
            start(own, previous, tokenizer="bbb")


def test_a_key_that_an_earlier_version_did_not_know_had_its_default(tmp_path):
    save(tmp_path, 8)
    metadata = checkpoint.read_metadata(tmp_path)
    for key in ("attention_bias", "tie_word_embeddings", "rope_scaling"):
        del metadata["config"]["model"][key]
    start_rule.check_compatible(tmp_path, metadata, RUN.model, "aaa")
    with pytest.raises(CheckpointError, match="model.tie_word_embeddings is True there and False here"):
        start_rule.check_compatible(tmp_path, metadata, dataclasses.replace(RUN.model, tie_word_embeddings=False), "aaa")


def test_init_from_comes_after_the_previous_stage_and_before_scratch(tmp_path):
    own, previous, base = tmp_path / "own", tmp_path / "previous", save(tmp_path / "base", 2, 6)

    def first(previous=None, place=str(base)):
        return start_rule.find_start(own, previous, RUN.model, "aaa", init_from=place)

    assert first() == first(previous) == start_rule.Start("initial", base, 6)  # half-way is as good a beginning as any
    assert first(place=f"{base}@2") == start_rule.Start("initial", base, 2)
    assert str(first()) == f"weights of {base} (step 6), as init_from says"
    target = abstract(make_state(0))
    began = start_rule.load_start(first(place=f"{base}@2"), target, scratch=lambda: None, begin=lambda params: params)
    assert same(began, make_state(2).params)
    save(previous, 8)
    assert first(previous).kind == "previous"
    save(own, 4)
    assert first(previous).kind == "resume"


def test_weights_from_elsewhere_are_a_checkpoint_to_start_from(tmp_path):
    weights = make_state(3).params
    checkpoint.write_weights(tmp_path, 8, weights, checkpoint.make_metadata(RUN, STAGE, "aaa"))
    assert same(checkpoint.restore_params(tmp_path), weights) and start_rule.locate(tmp_path) == (tmp_path, 8)
    assert start_rule.find_start(tmp_path / "own", tmp_path, RUN.model, "aaa") == start_rule.Start("previous", tmp_path, 8)


def test_another_model_is_refused_with_the_keys_that_differ(tmp_path):
    save(tmp_path, 4)
    with pytest.raises(CheckpointError) as error:
        start(tmp_path, model=dataclasses.replace(RUN.model, num_layers=3, rope_theta=1e4))
    assert "model.num_layers is 8 there and 3 here" in str(error.value) and "model.rope_theta" in str(error.value)
    assert "hidden_size" not in str(error.value)
    assert start(tmp_path, model=dataclasses.replace(RUN.model, remat="none", attention="dense", scan_layers=False)).step == 4


def test_a_carry_of_another_size_is_refused(tmp_path):
    save(tmp_path, 4)
    target = abstract(make_state(4))
    wrong = target.replace(carry={"s0": jax.ShapeDtypeStruct((24,), jnp.float32, sharding=target.carry["s0"].sharding)})
    with pytest.raises(CheckpointError, match=r"carry.s0 is float32\[16\] there and float32\[24\] here.*another output_dir"):
        checkpoint.restore_state(tmp_path, 4, wrong)


def test_an_empty_folder_and_an_unknown_format_are_explained(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint.restore_params(tmp_path)
    save(tmp_path, 4)
    file = tmp_path / "checkpoints/4/metadata/metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version reads 1"):
        checkpoint.read_metadata(tmp_path)


def test_a_save_that_fails_in_the_background_is_raised(tmp_path, monkeypatch):
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, checkpoint.make_metadata(RUN, STAGE, "aaa"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", full)
    with pytest.raises(CheckpointError, match=f"saving in {tmp_path} failed.*No space left"):
        checkpoints.wait()


def test_a_folder_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="opening .* for writing failed"):
        save(tmp_path, 1)


def test_training_goes_on_bit_for_bit_on_the_same_mesh_and_closely_on_another(tmp_path):
    """The same numbers and the same batches; only the order of sums differs between meshes."""
    def train(folder, steps, devices):
        run = toy_run(12, checkpoint_every=6)
        stop = iter([False] * (steps + 1) + [True] * 12) if steps < 12 else None
        with contextlib.suppress(Preempted):
            train_stage(run, run.stages[0], stage=ToyStage(), embedder=ToyEmbedder(), pipeline=ToyPipeline(), tokenizer_sha256="aaa",
                        folder=folder, console=Console(file=io.StringIO()), devices=jax.devices()[:devices], stop=stop and stop.__next__)

    def arrays(folder):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoint.restore_params(folder))]

    train(tmp_path / "whole", 12, devices=4)
    for devices in (4, 1):
        folder = tmp_path / str(devices)
        train(folder, 6, devices=4)
        assert 6 <= checkpoint.latest_step(folder) < 12
        train(folder, 12, devices=devices)
        assert checkpoint.latest_step(folder) == 12
        for ours, whole in zip(arrays(folder), arrays(tmp_path / "whole")):
            np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)
            assert devices != 4 or ours.tobytes() == whole.tobytes()
