"""Refusals, devices and sizes; and a whole check on CPU devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from conan_jax import config, preflight
from conan_jax.errors import ConfigError
from conan_jax.hardware import accelerator
from conan_jax.model import num_params
from conan_jax.preflight import program
from conan_jax.preflight.environment import prepare

MIX = (config.Mix("d"),)
MODEL = config.Model(vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64,
                     compute_dtype="float32")


def run_of(stage, mesh=config.Mesh()):
    return config.Run(name="r", stages=(stage,), datasets=(config.Dataset("d", "pair", "x"),), model=MODEL, mesh=mesh,
                      tokenizer=config.Tokenizer(vocab_size=512))


@pytest.mark.parametrize(("message", "size"), [
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
     int(20.5 * 2**30)),
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (42.78G) exceeds available HBM (15.75G).",
     int(42.78 * 2**30)),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 812.3M of 700.00M hbm.",
     int(812.3 * 2**20)),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.5M of 16.00M vmem.", None),
    ("INTERNAL: Mosaic failed to compile a kernel", None),
])
def test_refusals_say_how_much_was_needed(message, size):
    assert program.refused_bytes(message) == size


@pytest.mark.parametrize(("name", "slices", "words"), [
    ("h100-8", 1, "h100-8 can be compiled for on itself only.*--hbm-gib 79"),
    ("cpu:4", 2, "cpu-4 has no slices"),
    ("cpu:4096", 1, "cpu-4096 needs 4096 CPU devices.*device_count=4096"),
])
def test_what_cannot_be_compiled_for_here(name, slices, words):
    with pytest.raises(ConfigError, match=words):
        program.devices_of(accelerator(name), slices)


def test_pieces_are_saved_once():
    """A matrix split over 4 of 8 devices and copied to the others: all of it once, by the one host there is."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:8])
    tree = {"w": jax.ShapeDtypeStruct((16, 32), np.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))),
            "n": jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))}
    assert program.saved_bytes(tree) == (16 * 32 * 4 + 6, 16 * 32 * 4 + 6)


def test_the_environment_for_a_pod_and_for_cpu_devices(monkeypatch):
    monkeypatch.setattr("os.environ", environ := {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_dump_to=d"})
    prepare(accelerator("v5e-4"))
    assert environ["JAX_PLATFORMS"] == "cpu" and environ["TPU_SKIP_MDS_QUERY"] == "1" and "device_count=8" in environ["XLA_FLAGS"]
    prepare(accelerator("cpu:256"))
    assert environ["XLA_FLAGS"].split() == ["--xla_dump_to=d", "--xla_force_host_platform_device_count=256"]


@pytest.fixture(scope="module")
def weak_report():
    buckets = (config.Bucket(8, 8), config.Bucket(32, 16))
    stage = config.WeakStage(name="weak", steps=100, datasets=MIX, global_batch_size=16, buckets=buckets)
    return preflight.check(run_of(stage, config.Mesh(data=2, fsdp=2)), stage, accelerator("cpu:4"), hbm_bytes=2**30)


def test_a_whole_report(weak_report):
    report, parameters = weak_report, num_params(MODEL)
    assert report.mesh == {"data": 2, "fsdp": 2, "tensor": 1} and report.batch == "16 x 32 + 16 x 16"
    assert report.fits is True and report.peak_bytes_per_device > 3 * 4 * parameters / 2
    norms = 64 * (2 * 2 + 1)  # kept whole on every device
    assert report.memory["parameters"] == 4 * ((parameters - norms) // 2 + norms)
    assert report.memory["optimizer_state"] == 2 * report.memory["parameters"] + 4 * 5  # two counters of the optimizer, three of the state
    assert report.memory["batch"] == 4 * (32 + 16 + 2 + 2 + 2 + 2 + 1) * 4  # 4 rows: tokens, lengths, prompts, hashes, ids
    assert report.checkpoint_bytes == 3 * 4 * parameters + 4 * 5
    assert report.tokens_per_step == 16 * 48 and report.num_examples == {"": 1600}
    assert {t.kind for t in report.collectives} >= {"all-gather", "all-reduce"} and {t.axes for t in report.collectives} >= {"fsdp"}
    assert sum(report.seconds_range) / 2 == report.seconds and report.days == pytest.approx(100 * report.seconds / 86_400)
    assert report.chip_hours == pytest.approx(4 * 100 * report.seconds / 3600)
    assert any("2 buckets" in note for note in report.notes)


def test_no_limit_no_verdict_and_a_small_one_is_missed(weak_report):
    assert dataclasses.replace(weak_report).to_dict()["collectives"][0].keys() >= {"kind", "axes", "count", "bytes_per_device"}
    stage = config.LMStage(name="lm", kind="pretrain", steps=9, datasets=MIX, global_batch_size=4, sequence_length=16)
    report = preflight.check(run_of(stage), stage, accelerator("cpu:2"))
    assert report.fits is None and report.hbm_bytes_per_device is None
    again = preflight.check(run_of(stage), stage, accelerator("cpu:2"), hbm_bytes=report.peak_bytes_per_device - 1)
    assert again.fits is False and again.peak_bytes_per_device == report.peak_bytes_per_device


def test_a_mesh_that_leaves_devices_idle_is_refused():
    stage = config.WeakStage(name="w", steps=9, datasets=MIX, global_batch_size=8, buckets=(config.Bucket(8, 8),))
    with pytest.raises(ConfigError, match="leaves 5 of 8 devices idle"):
        preflight.check(run_of(stage, config.Mesh(fsdp=3)), stage, accelerator("cpu:8"))


@pytest.mark.parametrize(("peaks", "thorough", "efforts", "note"), [
    ([2**20], False, [False], True),  # three lengths, far below the limit
    ([2**30, 2**30 + 1], False, [False, True], False),  # near the limit: asked again
    ([2**20], True, [True], False),
])
def test_little_effort_only_where_it_leaves_no_doubt(monkeypatch, peaks, thorough, efforts, note):
    """On what looks like a TPU with 1 GiB; the compiler is replaced by its answers."""
    asked, answers = [], iter(peaks)

    def compile_step(run, stage, examples, placed, full_effort=True):
        asked.append(full_effort)
        return program.Compiled(text="HloModule m\n", peak=next(answers), arguments=None, seconds=1.0)

    tasks = tuple(config.Task(f"t{n}", "sts", MIX, 8, config.Bucket(n, n)) for n in (8, 16, 32))
    stage = config.SupervisedStage(name="s", steps=9, tasks=tasks)
    monkeypatch.setattr(program, "compile_step", compile_step)
    monkeypatch.setattr(program, "devices_of", lambda *_: jax.devices("cpu")[:4])
    report = preflight.check(run_of(stage), stage, accelerator("v5e-4"), hbm_bytes=2**30, thorough=thorough)
    assert asked == efforts and report.thorough is efforts[-1] and report.peak_bytes_per_device == peaks[-1]
    assert report.fits is (peaks[-1] <= 2**30) and report.compile_seconds == len(peaks)
    assert any("little effort" in line for line in report.notes) is note
