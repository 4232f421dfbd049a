"""The loop as a whole, on a toy stage: start, stop, resume, refuse."""

import dataclasses
import io
import json
import os
import signal

import jax
import numpy as np
import pytest
from rich.console import Console

from conan_jax import config
from conan_jax.errors import ConfigError, Preempted, TrainingError
from conan_jax.train import checkpoint
from conan_jax.train.loop import train_stage
from tests.train.toy_stage import ToyEmbedder, ToyPipeline, ToyStage, toy_run


def train(folder, steps=12, stage=None, pipeline=None, previous=None, stop=None, devices=1, **options):
    run, out = toy_run(steps, **options), io.StringIO()
    result = train_stage(run, run.stages[0], stage=stage or ToyStage(), embedder=ToyEmbedder(), pipeline=pipeline or ToyPipeline(),
                         tokenizer_sha256="aaa", folder=folder, previous_folder=previous, console=Console(file=out, width=200), stop=stop,
                         devices=jax.devices()[:devices])
    return result, out.getvalue()


def files(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_arrays(folder):
    """Every array of the newest checkpoint as bytes, by orbax alone."""
    import orbax.checkpoint as ocp

    step = checkpoint.latest_step(folder)
    arrays = [ocp.StandardCheckpointer().restore(folder.absolute() / "checkpoints" / str(step) / item) for item in ("params", "train")]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(arrays)]


def losses(folder):
    return {line["step"]: line["loss"] for line in files(folder)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "toy"
    result, text = train(folder)
    return folder, result, text


def test_a_stage_runs_to_its_last_step_and_leaves_its_files(uninterrupted):
    folder, result, _ = uninterrupted
    assert (result.step, result.trained_steps, result.folder) == (12, 12, folder) and result.seconds > 0
    assert result.metrics["step"] == 12 and result.metrics["loss"] == losses(folder)[12]
    assert [line["step"] for line in files(folder)] == list(range(1, 13))
    assert checkpoint.latest_step(folder) == 12 and list((folder / "tensorboard").iterdir())
    named = {"loss", "learning_rate", "alpha", "grad_norm", "tokens_per_second", "data_wait", "skipped", "seconds"}
    assert named <= files(folder)[-1].keys()


def test_the_start_says_what_a_person_wants_to_know(uninterrupted):
    *_, text = uninterrupted
    for part in ("start: from scratch", "parameters: 784 (272 outside the embedding table)", "mesh: data 1, fsdp 1, tensor 1",
                 "global batch: 8", "tokens per step: 8"):
        assert part in text


def test_learning_happens_and_the_step_is_the_traced_one(uninterrupted):
    lines = files(uninterrupted[0])
    assert lines[-1]["loss"] < lines[0]["loss"]
    np.testing.assert_allclose([line["alpha"] for line in lines], np.arange(12) / 100, rtol=1e-6)


@pytest.mark.parametrize("at", [1, 6, 8])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, uninterrupted, at):
    polls = iter(range(100))
    with pytest.raises(Preempted, match=f"stopped at step {at} of 12.*same command") as error:
        train(tmp_path / "toy", stop=lambda: next(polls) == at)
    assert error.value.exit_code == 42 and checkpoint.latest_step(tmp_path / "toy") == at
    result, text = train(tmp_path / "toy")
    assert f"at step {at}" in text and result.trained_steps == 12 - at
    assert final_arrays(tmp_path / "toy") == final_arrays(uninterrupted[0])
    assert losses(tmp_path / "toy") == losses(uninterrupted[0])
    assert len(files(tmp_path / "toy")) == 12


def test_a_stop_before_the_first_step_saves_nothing(tmp_path):
    with pytest.raises(Preempted, match="step 0 of 12"):
        train(tmp_path / "toy", stop=lambda: True)
    assert checkpoint.latest_step(tmp_path / "toy") is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_stop_and_are_given_back(tmp_path, number):
    class Pipeline(ToyPipeline):
        def batch(self, step):
            if step == 2:
                os.kill(os.getpid(), number)
            return super().batch(step)

    before = signal.getsignal(number)
    with pytest.raises(Preempted, match="step 3 of 12"):
        train(tmp_path / "toy", pipeline=Pipeline())
    assert signal.getsignal(number) is before
    assert checkpoint.latest_step(tmp_path / "toy") == 3


def test_a_signal_during_the_last_step_is_not_lost(tmp_path, uninterrupted):
    polls = iter(range(100))
    with pytest.raises(Preempted, match="step 12 of 12"):
        train(tmp_path / "toy", stop=lambda: next(polls) == 12)
    assert final_arrays(tmp_path / "toy") == final_arrays(uninterrupted[0])


def test_a_complete_stage_is_not_trained_again(uninterrupted):
    folder, first, _ = uninterrupted
    stage = ToyStage()
    result, text = train(folder, stage=stage)
    assert result.trained_steps == 0 and stage.traces == 0 and "complete at step 12" in text
    assert (result.step, result.metrics) == (12, first.metrics)


def test_the_next_stage_begins_from_the_weights_alone(tmp_path, uninterrupted):
    result, text = train(tmp_path / "next", steps=1, previous=uninterrupted[0])
    assert f"weights of {uninterrupted[0]} (step 12)" in text
    before, after = checkpoint.restore_params(uninterrupted[0]), checkpoint.restore_params(tmp_path / "next")
    change = np.abs(np.asarray(before["map"]) - np.asarray(after["map"])).max()
    assert 0 < change < 2e-2  # one AdamW update at the learning rate 1e-2
    assert result.metrics["alpha"] == 0.0


def test_five_bad_updates_in_a_row_stop_the_run_with_step_and_ids(tmp_path):
    with pytest.raises(TrainingError) as error:
        train(tmp_path / "toy", steps=30, stage=ToyStage(lambda step: step >= 9))
    ids = ToyPipeline().batch(13)["ids"].tolist()
    assert "step 14:" in str(error.value) and str(ids) in str(error.value) and "5 times in a row" in str(error.value)
    assert checkpoint.latest_step(tmp_path / "toy") == 12
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(checkpoint.restore_params(tmp_path / "toy")))
    assert [line["step"] for line in files(tmp_path / "toy")][-1] == 14 and files(tmp_path / "toy")[-1]["loss"] is None


def test_four_bad_updates_in_a_row_do_not(tmp_path):
    result, _ = train(tmp_path / "toy", stage=ToyStage(lambda step: (step >= 3) & (step < 7)))
    assert result.metrics["skipped"] == 4 and result.metrics["skipped_in_row"] == 0


def test_ids_of_sub_batches_are_named(tmp_path):
    class Nested(ToyPipeline):
        def batch(self, step):
            return {"retrieval": super().batch(step), "sts": super().batch(step + 1)}

    class NestedStage(ToyStage):
        def loss(self, params, carry, batch, step, rng):
            return super().loss(params, carry, batch["sts"], step, rng)

    with pytest.raises(TrainingError, match=r"retrieval \[\d.*; sts \[\d"):
        train(tmp_path / "toy", stage=NestedStage(lambda step: True), pipeline=Nested())


def test_a_failing_pipeline_leaves_whole_checkpoints(tmp_path, uninterrupted):
    class Failing(ToyPipeline):
        def batch(self, step):
            if step == 8:
                raise OSError("disk on fire")
            return super().batch(step)

    with pytest.raises(OSError, match="disk on fire"):
        train(tmp_path / "toy", pipeline=Failing())
    assert checkpoint.latest_step(tmp_path / "toy") == 8
    assert [line["step"] for line in files(tmp_path / "toy")] == list(range(1, 9))  # no record is lost that the checkpoint stands for
    train(tmp_path / "toy")
    assert final_arrays(tmp_path / "toy") == final_arrays(uninterrupted[0])


def test_a_run_moves_between_meshes(tmp_path, uninterrupted):
    polls = iter(range(100))
    with pytest.raises(Preempted):
        train(tmp_path / "toy", devices=8, stop=lambda: next(polls) == 6)
    train(tmp_path / "toy", devices=1)
    here, there = losses(tmp_path / "toy"), losses(uninterrupted[0])
    np.testing.assert_allclose([here[s] for s in range(1, 13)], [there[s] for s in range(1, 13)], rtol=1e-4)


def test_a_batch_the_mesh_cannot_split_trains_all_the_same(tmp_path, uninterrupted):
    result, _ = train(tmp_path / "toy", devices=3)
    np.testing.assert_allclose(result.metrics["loss"], uninterrupted[1].metrics["loss"], rtol=1e-5)


def test_old_checkpoints_go_and_the_last_stays(tmp_path):
    train(tmp_path / "toy", steps=11, checkpoint_every=3, keep_checkpoints=2)
    assert sorted(int(p.name) for p in (tmp_path / "toy/checkpoints").iterdir()) == [9, 11]


def test_the_stage_knows_the_learning_rate_it_was_given(uninterrupted):
    from conan_jax.train.optimizer import learning_rate_at

    options = dataclasses.replace(config.Optimizer(), learning_rate=1e-2)
    expected = [float(learning_rate_at(options, 12)(t)) for t in range(12)]
    np.testing.assert_allclose([line["learning_rate"] for line in files(uninterrupted[0])], expected, rtol=1e-6)
