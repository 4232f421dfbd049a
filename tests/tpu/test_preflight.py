"""A preflight for a TPU slice that is not here: memory as its compiler plans it, and a step that does not fit with what makes it fit."""

import dataclasses
import importlib.util
import os

import pytest

from conan_jax import config, preflight
from conan_jax.config_io import override
from conan_jax.hardware import accelerator
from conan_jax.preflight import advice

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # libtpu is not to look for a TPU
pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                reason="nothing compiles for a TPU without libtpu; `make test-tpu` installs it and runs this")

MODEL = config.Model(vocab_size=1024, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2, max_length=512)
V5E = accelerator("v5e:2x2")


def run_of(intermediate_size=512, **stage):
    weak = config.WeakStage(name="weak", steps=10, datasets=(config.Mix("d"),), **stage)
    model = dataclasses.replace(MODEL, intermediate_size=intermediate_size)
    return config.Run(name="r", stages=(weak,), datasets=(config.Dataset("d", "pair", "unused"),), model=model,
                      tokenizer=config.Tokenizer(vocab_size=1000))


def check(run, slices=1):
    return preflight.check(run, run.stage("weak"), V5E, slices=slices)


def test_a_step_that_fits():
    report = check(run_of(global_batch_size=64, buckets=(config.Bucket(128, 256),)))
    assert report.fits is True and report.refused is None
    assert report.memory["parameters"] < report.peak_bytes_per_device < report.hbm_bytes_per_device == V5E.chip.hbm_bytes
    assert {t.link for t in report.collectives} == {"ici"} and set(report.roofline) == {"compute", "hbm", "ici fsdp"}
    assert 0 < report.seconds_range[0] < report.seconds < report.seconds_range[1]


def test_two_slices_exchange_gradients_over_the_network():
    report = check(run_of(global_batch_size=64, buckets=(config.Bucket(128, 128),)), slices=2)
    assert report.devices == 8 and report.mesh["data"] == 2
    assert any(t.link == "dcn" and t.bytes_per_device > 0 for t in report.collectives) and report.roofline["dcn"] > 0


def test_a_step_that_does_not_fit_and_what_makes_it_fit():
    run = run_of(8192, global_batch_size=4096, buckets=(config.Bucket(512, 512),))  # 1 Mi tokens a device x 8192 numbers are 16 GiB
    report = check(run)
    assert report.fits is False and "RESOURCE_EXHAUSTED" in report.refused and report.seconds is None
    assert report.peak_bytes_per_device > report.hbm_bytes_per_device

    def again(changed, stage):
        return preflight.check(changed, stage, V5E)

    fix, _ = advice.prove(run, run.stage("weak"), report, again)
    assert fix.settings[0].startswith("weak.encode_chunk_size=") and fix.peak_bytes_per_device <= report.hbm_bytes_per_device
    assert override(run, fix.settings).stage("weak").encode_chunk_size > 0
