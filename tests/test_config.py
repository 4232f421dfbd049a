"""Configurations: golden renderings, overrides, refusals with the nearest valid name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conan_jax import config, config_io
from conan_jax.errors import ConfigError

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
SPECS = [f"{name}.py:{variant}" for name in ("conan_v2", "demo", "small_multilingual") for variant in config_io.VARIANTS]


def load(spec: str, *overrides: str) -> config.Run:
    return config_io.load_run(str(ROOT / "configs" / spec), overrides)


@pytest.mark.parametrize("spec", SPECS)
def test_rendering_matches_the_golden_file(spec: str) -> None:
    """A default that moves is seen in review. To accept a change: python -m tests.update_golden."""
    golden = GOLDEN / (spec.replace(".py:", ".") + ".txt")
    assert config_io.render(load(spec)) == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("spec", SPECS)
def test_json_round_trip(spec: str) -> None:
    run = load(spec)
    assert config_io.from_dict(json.loads(json.dumps(config_io.to_dict(run)))) == run


def test_every_rendered_key_can_be_set_to_its_own_value() -> None:
    run = load("conan_v2.py:tiny")
    assignments = [f"{key}={json.dumps(value)}" for key, value in config_io.flatten(run).items()]
    assert config_io.override(run, assignments) == run


def test_overrides_reach_every_depth() -> None:
    run = load("demo.py:tiny", "weak.optimizer.learning_rate=3e-4", "supervised.tasks.sts.weight=0.5",
               "weak.soft_mask.schedule=accelerate", "weak.buckets.0.query_length=30", "datasets.docs.limit=null", "name=mine")
    assert run.stage("weak").optimizer.learning_rate == 3e-4
    assert run.stage("supervised").tasks[-1].weight == 0.5
    assert run.stage("weak").soft_mask.schedule == "accelerate"
    assert run.stage("weak").buckets[0].query_length == 30
    assert run.dataset("docs").limit is None
    assert (run.output_dir, run.data_dir) == ("runs/mine", "runs/mine/data")


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("weak.stepz=3", "did you mean 'steps'"),
        ("weik.steps=3", "did you mean 'weak'"),
        ("weak.steps=three", "weak.steps = 'three'"),
        ("weak.steps=-1", "must be positive"),
        ("weak.steps=true", "weak.steps = True"),
        ("weak.soft_mask.schedule=linaer", "did you mean 'linear'"),
        ("weak.kind=weik", "did you mean 'weak'"),
        ("weak.steps", "KEY=VALUE"),
        ("weak.steps.more=1", "has no key 'more'"),
        ("model.num_heads=3", "multiple of model.num_heads"),
        ("model=3", "must be a mapping"),
        ("supervised.tasks.stz.weight=1", "did you mean 'sts'"),
        ("weak.datasets.0=1", "known: pairs"),
        ("supervised.matryoshka.dims=[64, 4096]", "wider than model.hidden_size"),
        ("tokenizer.vocab_size=999999", "larger than model.vocab_size"),
        ("weak.buckets=[{\"query_length\": 3}]", "lacks passage_length"),
    ],
)
def test_bad_overrides_are_refused(assignment: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load("demo.py:tiny", assignment)
    assert told in str(error.value)


def test_a_file_that_fails_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def get_config(variant):\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match="bad.py could not be read: ZeroDivisionError"):
        config_io.load_run(str(bad))
    with pytest.raises(ConfigError, match="no variant 'huge'"):
        config_io.load_run(f"{bad}:huge")
    with pytest.raises(ConfigError, match="no configuration file"):
        config_io.load_run(str(tmp_path / "absent.py"))


def test_unknown_dataset_in_a_stage_is_refused() -> None:
    run = load("demo.py:tiny")
    weak = dataclasses.replace(run.stage("weak"), datasets=(config.Mix("nothing"),))
    with pytest.raises(ConfigError, match="uses dataset 'nothing'"):
        dataclasses.replace(run, stages=(weak,))


def test_published_size_on_the_command_line() -> None:
    """Acceptance: the full configuration counts exactly the paper's parameters (METHODS 1.1)."""
    from conan_jax.cli.main import app

    result = CliRunner().invoke(app, ["config", "show", str(ROOT / "configs/conan_v2.py"), "--json"])
    assert json.loads(result.output)["parameters"] == 1_502_932_480
