"""What is suggested for a program that is too large, and when a suggestion counts as proved. No program is compiled here."""

import dataclasses

import pytest

from conan_jax import config
from conan_jax.hardware import GIB
from conan_jax.preflight import advice
from conan_jax.preflight.report import Report

MIX = (config.Mix("d"),)
LM = config.LMStage(name="lm", kind="pretrain", steps=9, datasets=MIX, global_batch_size=64, sequence_length=128, loss_chunk_size=512)
WEAK = config.WeakStage(name="weak", steps=9, datasets=MIX, global_batch_size=64, buckets=(config.Bucket(128, 128),))


def run_of(stage, **model):
    model = config.Model(vocab_size=512, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=64, num_layers=2, **model)
    return config.Run(name="r", stages=(stage,), datasets=(config.Dataset("d", "pair", "x"),), model=model,
                      tokenizer=config.Tokenizer(vocab_size=512))


def report(peak, state=2 * GIB, limit=16 * GIB, mesh=(1, 4, 1), fits=False, accelerator="v5e-4"):
    return Report(
        stage="s", kind="weak", accelerator=accelerator, slices=1, devices=4, hosts=1, mesh=dict(zip(("data", "fsdp", "tensor"), mesh)),
        batch="", fits=fits, peak_bytes_per_device=peak, hbm_bytes_per_device=limit,
        memory={"parameters": state, "activations_and_temporaries": peak - state}, tokens_per_step=1, flops_per_step=1.0,
        hardware_flops_per_step=1.0, steps=9, checkpoint_bytes=4 * state, checkpoint_bytes_per_host=state, num_examples={},
        compile_seconds=1.0, thorough=True)


def settings(stage, one, **model):
    return [fix.settings for fix in advice.plans(run_of(stage, **model), stage, one)]


def test_micro_batches_by_how_far_it_is_over():
    """2 GiB of state, 40 GiB of the rest, 0.8 x 16 - 2 = 10.8 GiB free: 3.7 times too large, so 4 micro-batches; at most 16."""
    found = settings(LM, report(42 * GIB))
    assert found[0] == ("lm.gradient_accumulation_steps=4",)
    assert found[1] == ("lm.gradient_accumulation_steps=16",)
    assert found[2] == ("lm.gradient_accumulation_steps=16", "lm.loss_chunk_size=128")
    assert found[-1] == ("lm.gradient_accumulation_steps=1", "lm.loss_chunk_size=128", "lm.global_batch_size=16")


def test_chunks_by_how_far_it_is_over():
    """16 queries and 16 passages a device: 32 texts in all, 3.7 times too large: 8, then 2."""
    found = settings(WEAK, report(42 * GIB))
    assert found[:2] == [("weak.encode_chunk_size=8",), ("weak.encode_chunk_size=2",)]


def test_chunks_go_on_from_those_there_are():
    found = settings(dataclasses.replace(WEAK, encode_chunk_size=4), report(42 * GIB))
    assert found[0] == ("weak.encode_chunk_size=1",)


def test_remat_comes_first_and_is_kept():
    found = settings(WEAK, report(42 * GIB), remat="none")
    assert found[:2] == [("model.remat=full",), ("model.remat=full", "weak.encode_chunk_size=8")]


def test_a_mesh_that_copies_parameters_is_named():
    assert any("mesh.data=1" in fix and "mesh.fsdp=-1" in fix for fix in settings(WEAK, report(42 * GIB, mesh=(4, 1, 1))))
    assert not any("mesh.data=1" in fix for fix in settings(WEAK, report(42 * GIB)))


def test_nothing_is_left_of_a_stage_at_its_smallest():
    smallest = dataclasses.replace(WEAK, global_batch_size=4, encode_chunk_size=1)
    assert settings(smallest, report(42 * GIB)) == []


def test_every_plan_is_a_setting_that_the_recipe_takes():
    for stage in (LM, WEAK):
        for fix in advice.plans(run_of(stage, remat="none"), stage, report(42 * GIB, mesh=(2, 2, 1))):
            changed = advice.override(run_of(stage, remat="none"), fix.settings)
            assert changed != run_of(stage, remat="none")


class Compiler:
    """Fits below so many texts a device."""

    def __init__(self, largest):
        self.largest, self.asked = largest, []

    def __call__(self, run, stage):
        self.asked.append(stage.encode_chunk_size)
        fits = stage.encode_chunk_size is not None and stage.encode_chunk_size <= self.largest
        return report(10 * GIB if fits else 20 * GIB, fits=fits)


def test_the_first_that_fits_is_proved_by_its_peak():
    compiler = Compiler(largest=8)
    fix, tried = advice.prove(run_of(WEAK), WEAK, report(42 * GIB), compiler)
    assert fix.settings == ("weak.encode_chunk_size=8",) and fix.peak_bytes_per_device == 10 * GIB
    assert tried == () and compiler.asked == [8]


def test_what_was_tried_in_vain_is_kept():
    fix, tried = advice.prove(run_of(WEAK), WEAK, report(42 * GIB), Compiler(largest=2))
    assert fix.settings[0] == "weak.encode_chunk_size=2"
    assert [one.settings[0] for one in tried][0] == "weak.encode_chunk_size=8" and tried[0].peak_bytes_per_device == 20 * GIB


def test_compilations_are_bounded():
    compiler = Compiler(largest=0)
    fix, tried = advice.prove(run_of(WEAK, remat="none"), WEAK, report(42 * GIB, mesh=(2, 2, 1)), compiler)
    assert fix is None and len(compiler.asked) == len(tried) == advice.MAX_PROOFS


@pytest.mark.parametrize(("state_gib", "here", "name"), [
    (2, "v5e-4", "v5e-8"),  # 8 GiB would fit before too: what is left over was too little
    (100, "v5e-4", "v5e-64"),  # 400 GiB: 64 x 15.75 GiB x 0.6 is the least of these chips that holds it
    (2000, "v5e-256", "v5p-512"),  # 8000 GiB are too much for any v5e; 256 x 95.7 GiB x 0.6 on v5p (whose name counts cores)
])
def test_the_smallest_accelerator_that_could_hold_the_state(state_gib, here, name):
    assert advice.larger_accelerator(report(42 * GIB, state=state_gib * GIB, accelerator=here)) == name


def test_no_accelerator_holds_what_is_too_large_for_all():
    assert advice.larger_accelerator(report(42 * GIB, state=10**6 * GIB)) is None
