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
        ("weak.stepz=3", "did you mean 'weak.steps'"),
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
        ("supervised.tasks.stz.weight=1", "did you mean 'supervised.tasks.sts'"),
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
    with pytest.raises(ConfigError, match="bad.py:2 could not be read: ZeroDivisionError"):
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


def parts_of(value: object) -> list[object]:
    """A configuration and every dataclass in it."""
    if isinstance(value, tuple):
        return [part for item in value for part in parts_of(item)]
    if not dataclasses.is_dataclass(value):
        return []
    return [value, *(part for field in dataclasses.fields(value) for part in parts_of(getattr(value, field.name)))]


def test_every_number_is_finite_and_in_range() -> None:
    """Each number of every dataclass, set to what a checked field of its type cannot hold."""
    parts = {type(part): part for part in parts_of(load("small_multilingual.py:full"))}
    parts[config.RopeScaling] = config.RopeScaling(8.0, 1.0, 4.0, 8192)
    tried = 0
    for part in parts.values():
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            wrong = [float("inf"), float("nan"), 1e300] if isinstance(value, float) else [2**63, -(2**70)] if type(value) is int else []
            for bad in wrong:
                with pytest.raises(ConfigError, match=field.name):
                    dataclasses.replace(part, **{field.name: bad})
                tried += 1
    assert tried > 100


@pytest.mark.parametrize("assignment", [
    "weak.optimizer.learning_rate=Infinity", "weak.optimizer.weight_decay=Infinity", "weak.contrastive.false_negative_margin=NaN",
    "model.rope_theta=1e999", "weak.steps=2147483648", "weak.contrastive.temperature=1e-60", "seed=99999999999999999999", "seed=-1",
    "seed=4294967296", "stages=[]", 'name="a\\u0000b"', 'datasets.docs.source="\\ud800"', 'datasets.docs={"name": "docs", "name": "x"}',
    "tokenizer.datasets=[1e5]", "name=" + "n" * 200,
])
def test_values_that_would_fail_later_are_refused(assignment: str) -> None:
    with pytest.raises(ConfigError):
        load("demo.py:tiny", assignment)


def test_a_text_field_takes_the_text_as_it_was_written() -> None:
    run = load("demo.py:tiny", "name=1e5", "datasets.docs.source=0x10", "datasets.docs.fields.text=007", "tokenizer.datasets=[\"docs\"]")
    assert (run.name, run.dataset("docs").source, run.dataset("docs").fields) == ("1e5", "0x10", {"text": "007"})
    assert load("demo.py:tiny", "name=true").name == "true"
    assert load("demo.py:tiny", 'name="1e5"').name == "1e5"


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/tmp/x", ".lock", ".peers-3", "data", "Data", "untrained", "bm25", "eval", "index",
                                  "EXPORT", "checkpoints", "tensorboard", "config.json", "Prepared.JSON", "model", "a b", "a\\b", "weak:2"])
def test_one_rule_for_names_of_stages(name: str) -> None:
    with pytest.raises(ConfigError, match="stage"):
        dataclasses.replace(load("demo.py:tiny").stage("weak"), name=name)


@pytest.mark.parametrize("assignment", [
    "supervised.tasks.sts.name=a/b", "datasets.docs.name=packed", "datasets.docs.name=../x", "datasets.docs.name=Tokenizer",
    "evaluations.held_out_modules.name=a/b", "name=../other", "name=a b", "weak.name=Supervised", "datasets.docs.name=Pairs",
])
def test_one_rule_for_the_other_names(assignment: str) -> None:
    with pytest.raises(ConfigError, match=assignment.rpartition("=")[2].rpartition("/")[2]):
        load("demo.py:tiny", assignment)


def test_two_main_sets_are_refused() -> None:
    run = load("small_multilingual.py")
    with pytest.raises(ConfigError, match="retrieval_zh"):
        config_io.override(run, ["evaluations.retrieval_zh.main=true"])
    assert config_io.override(run, ["evaluations.retrieval_en.main=false", "evaluations.sts_en.main=true"])


UNREAD = [
    "supervised.tasks.retrieval.num_negatives=3", "supervised.tasks.sts.num_negatives=7", "supervised.tasks.sts.positives=label",
    "supervised.tasks.retrieval.positives=example", "supervised.tasks.sts.in_batch_negatives=false", "supervised.hard_negatives.every=5",
    "supervised.hard_negatives.every=100", "weak.optimizer.schedule=constant weak.optimizer.final_fraction=0.2",
    "supervised.hard_negatives.rule=v1 supervised.hard_negatives.low_score=0.3",
    "supervised.hard_negatives.rule=off supervised.hard_negatives.ceiling=0.3", "weak.soft_mask.schedule=constant weak.soft_mask.steps=3",
    "weak.soft_mask.schedule=constant weak.soft_mask.apply=multiply", "datasets.docs.instruction=read",
    "tokenizer.path=tokenizer", 'tokenizer={"path":"t","vocab_size":300}', 'tokenizer={"path":"t","datasets":["docs"]}',
    "supervised.tasks.sts=null supervised.cosent_temperature=0.1", "supervised.tasks.sts=null",
    "supervised.tasks.retrieval=null", "supervised.tasks.retrieval.in_batch_negatives=false supervised.contrastive.symmetric=true",
    "supervised.matryoshka.dims=[] supervised.matryoshka.weights=[1.0]",
    'evaluations.s={"kind":"sts","path":"x","split":"test"}', 'evaluations.s={"kind":"sts","path":"x","train_path":"y"}',
]


@pytest.mark.parametrize("assignments", UNREAD)
def test_options_that_nothing_reads_are_refused(assignments: str) -> None:
    with pytest.raises(ConfigError):
        load("demo.py:tiny", *assignments.split())


def test_options_take_the_default_of_their_kind() -> None:
    run = load("demo.py:tiny", "supervised.hard_negatives.rule=v1", 'tokenizer={"path": "t"}', "weak.soft_mask.schedule=constant",
               "weak.optimizer.schedule=constant")
    supervised = run.stage("supervised")
    assert [(t.in_batch_negatives, t.num_negatives, t.positives) for t in supervised.tasks] == [
        (True, None, None), (False, 3, "label"), (None, None, None)]
    assert (supervised.hard_negatives.every, supervised.hard_negatives.low_score, run.tokenizer.vocab_size) == (100, None, None)
    assert (run.stage("weak").soft_mask.apply, run.stage("weak").optimizer.final_fraction) == (None, None)


def test_a_saved_configuration_of_an_earlier_version_is_read_and_equal() -> None:
    """Every default was written out, and options that nothing read were accepted."""
    run = load("demo.py:tiny")
    saved = json.loads(json.dumps(config_io.to_dict(run)))
    for task in saved["stages"][3]["tasks"]:
        written = {"in_batch_negatives": True, "num_negatives": 7, "positives": "label"}
        task |= {key: written[key] for key, value in task.items() if value is None}
    saved["stages"][3]["tasks"][2] |= {"num_negatives": 2, "in_batch_negatives": False}
    saved["stages"][3]["hard_negatives"] |= {"every": 100}
    assert config_io.from_dict(saved) == run
    saved["stages"][3]["tasks"][0]["name"] = "search (en)"
    saved["evaluations"].append({**saved["evaluations"][0], "name": "a/b"})
    assert [e.name for e in config_io.from_dict(saved).evaluations if e.main] == ["held_out_modules", "a/b"]
    with pytest.raises(ConfigError):
        config_io.override(config_io.from_dict(saved), [])


def test_the_order_of_overrides_does_not_matter() -> None:
    sets = ["name=x", "data_dir=/shared", "datasets.notes.limit=5", 'datasets.notes={"kind":"pair","source":"n.jsonl"}',
            'weak.datasets.notes={"weight": 1}', "weak.steps=3",
            'stages.more={"kind":"weak","datasets":[{"dataset":"notes"}],"steps":1,"buckets":[{"query_length":8,"passage_length":8}]}',
            "more.steps=2", "stages.pretrain=null", "supervised.tasks.sts.weight=0.5"]
    run = load("demo.py:tiny", *sets)
    assert run == load("demo.py:tiny", *reversed(sets))
    assert (run.name, run.output_dir, run.data_dir) == ("x", "runs/x", "/shared")
    assert [s.name for s in run.stages] == ["sft", "weak", "supervised", "more"] and run.stage("more").steps == 2
    assert run.dataset("notes").limit == 5 and run.stage("weak").datasets[-1] == config.Mix("notes", 1.0)
    kept = ["name=y", "data_dir=runs/demo_tiny/data"]  # said, and so not derived from the name
    assert load("demo.py:tiny", *kept).data_dir == load("demo.py:tiny", *reversed(kept)).data_dir == "runs/demo_tiny/data"
    with pytest.raises(ConfigError, match="dropped"):
        load("demo.py:tiny", "weak.steps=3", "weak=null")


def test_members_are_added_and_dropped() -> None:
    run = load("demo.py:tiny", 'evaluations.sts_en={"kind":"sts","path":"x.jsonl"}', "evaluations.sts_en.max_length=32",
               'weak.buckets.1={"query_length":8,"passage_length":9}', "weak.datasets.cloze=null", "supervised.tasks.classification=null",
               "supervised.matryoshka.dims.0=8")
    assert run.evaluations[-1].name == "sts_en" and run.evaluations[-1].max_length == 32
    assert len(run.stage("weak").buckets) == 2 and len(run.stage("weak").datasets) == 2 and len(run.stage("supervised").tasks) == 2
    assert run.stage("supervised").matryoshka.dims == (8, 32)
    assert load("demo.py:tiny", "evaluations.held_out_modules=null").evaluations == ()
    for assignment in ("datasets.pairs=null", 'datasets.a={"name":"b","kind":"text","source":"x"}', "datasets.a=3",
                       'weak.buckets.7={"query_length":8,"passage_length":9}', "weak.datasets=[]"):
        with pytest.raises(ConfigError):
            load("demo.py:tiny", assignment)


@pytest.mark.parametrize(("key", "near"), [
    ("weak.lr", "weak.optimizer.learning_rate"), ("weak.alpha", ""), ("num_layerz", "model.num_layers"),
    ("weak.temperatur", "weak.contrastive.temperature"), ("seeds", "seed"),
])
def test_the_nearest_key_is_found_across_levels(key: str, near: str) -> None:
    with pytest.raises(ConfigError) as error:
        load("demo.py:tiny", f"{key}=1")
    assert (f"'{near}'" in str(error.value)) if near else ("did you mean" not in str(error.value))


def test_a_dataset_twice_in_one_mixture_keeps_both_weights() -> None:
    run = load("demo.py:tiny")
    weak = dataclasses.replace(run.stage("weak"), datasets=(config.Mix("pairs", 1.0), config.Mix("pairs", 2.0)))
    run = dataclasses.replace(run, stages=(weak,))
    assert sorted(v for k, v in config_io.flatten(run).items() if k.startswith("weak.datasets.") and k.endswith("weight")) == [1.0, 2.0]
    assert config_io.override(run, []) == run


def test_a_recipe_names_its_variants(tmp_path: Path) -> None:
    from conan_jax.cli.main import app

    file = tmp_path / "own.py"
    file.write_text(f"import runpy\nVARIANTS = {{'small': 'a few steps', 'wide': 'wide rows'}}\n"
                    f"get_config = lambda variant: runpy.run_path({str(ROOT / 'configs/demo.py')!r})['get_config']('tiny')\n")
    listed = CliRunner().invoke(app, ["config", "list", str(file)]).output
    assert [line.split("  ") for line in listed.splitlines()] == [[f"{file}:small", "a few steps"], [f"{file}:wide", "wide rows"]]
    assert config_io.load_run(f"{file}:wide") == config_io.load_run(str(file))
    with pytest.raises(ConfigError, match="small, wide"):
        config_io.load_run(f"{file}:full")
    file.write_text("VARIANTS = ['full']\ndef get_config(variant): pass\n")
    with pytest.raises(ConfigError, match="VARIANTS"):
        config_io.load_run(str(file))
    (tmp_path / "a:b.py").write_text(f"exec(open({str(ROOT / 'configs/demo.py')!r}).read())\n")
    assert config_io.load_run(str(tmp_path / "a:b.py")).name == "demo"


@pytest.mark.parametrize(("body", "line"), [
    ("from conan_jax.config import Bucket\n\ndef get_config(variant):\n    return Bucket(3)\n", 4),
    ("from conan_jax.config import Bucket\ndef get_config(variant):\n    pass\nBucket('3', 4)\n", 4),
    ("from conan_jax.config import Bucket\ndef get_config(variant):\n    return Bucket(0, 4)\n", 3),
    ("def get_config(variant):\n\n    return (\n", 3),
])
def test_an_error_in_a_recipe_names_file_and_line(tmp_path: Path, body: str, line: int) -> None:
    file = tmp_path / "own.py"
    file.write_text(body)
    with pytest.raises(ConfigError, match=f"own.py:{line}"):
        config_io.load_run(str(file))


def test_a_place_may_hold_an_at_sign(tmp_path: Path) -> None:
    assert config_io.split_step(tmp_path / "run" / "weak@12") == (tmp_path / "run" / "weak", 12)
    (tmp_path / "run@12").mkdir()
    assert config_io.split_step(tmp_path / "run@12") == (tmp_path / "run@12", None)
    assert config_io.split_step(f"{tmp_path}/run@12@3") == (tmp_path / "run@12", 3)
