"""Results of a run folder over several commands: trained anew, started elsewhere, with another evaluation, after an error."""

import functools
import hashlib
import json
import shlex
import shutil

import jax
import numpy as np
import pytest

from conan_jax import config, config_io
from conan_jax.cli import recipe as recipes
from conan_jax.errors import ConfigError
from conan_jax.eval import stored
from conan_jax.eval.results import data_sha256
from conan_jax.train import checkpoint, start_rule
from conan_jax.train.loop import StageResult
from tests.cli.test_recipe import conan

WORDS = "array sum file read write socket tensor gradient parse date sort key".split()
RECIPE = """
from conan_jax.config import *

def get_config(variant):
    pairs = Dataset("p", "pair", {data!r} + "/p.jsonl")
    tiny = Model(vocab_size=400, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, max_length=32,
                 compute_dtype="float32", scan_layers=False, remat="none")
    common = dict(steps=2, global_batch_size=4, checkpoint_every=1)
    return Run(name="r", data_dir={data!r} + "/prepared", datasets=(pairs,), model=tiny, tokenizer=Tokenizer(vocab_size=300),
               mesh=Mesh(data=1, fsdp=1),
               stages=(LMStage(name="pretrain", kind="pretrain", datasets=(Mix("p"),), sequence_length=16, loss_chunk_size=16, **common),
                       WeakStage(name="weak", datasets=(Mix("p"),), buckets=(Bucket(8, 8),), **common),
                       WeakStage(name="more", datasets=(Mix("p"),), buckets=(Bucket(8, 8),), **common)),
               evaluations=(Evaluation("found", "retrieval", {data!r} + "/beir", max_length=16),
                            Evaluation("similar", "sts", {data!r} + "/sts.jsonl", max_length=16, main=True)))
"""


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)))


@functools.cache
def weights(embedder):
    """Random weights, the same for equal models."""
    return jax.tree.map(np.asarray, jax.jit(embedder.init)(jax.random.key(0)))


def train_stage(run, stage_config, *, embedder, tokenizer_sha256, folder, previous_folder, init_from, console, fallback, **_):
    """A stage that ends at once: it starts as a real one does, and saves weights of its own."""
    start = start_rule.find_start(folder, previous_folder, run.model, tokenizer_sha256, fallback, init_from)
    console.print(f"stage {stage_config.name}\n  start: {start}", highlight=False, markup=False, soft_wrap=True)
    if start.kind != "resume":
        shift = sum(stage_config.name.encode()) / 1e5
        params = jax.tree.map(lambda array: array + np.float32(shift), weights(embedder))
        checkpoint.write_weights(folder, stage_config.steps, params, checkpoint.make_metadata(run, stage_config, tokenizer_sha256))
    return StageResult(folder, stage_config.steps, 0.0, {}, stage_config.steps)


def score_set(encoder, evaluation, dimensions, **_):
    """Scores that follow from the weights, the settings and the data alone."""
    digest = hashlib.sha256(f"{evaluation.max_queries} {data_sha256(evaluation)}".encode())
    for leaf in jax.tree.leaves(encoder.params):
        digest.update(np.asarray(leaf))
    metrics = ("ndcg@10", "recall@10") if evaluation.kind == "retrieval" else ("spearman",)
    return {"figures": dict.fromkeys(metrics, int(digest.hexdigest()[:8], 16) / 2**32), "seconds": 0.1}, None


@pytest.fixture(autouse=True)
def scored(monkeypatch):
    """Stages that end at once, and the list to which the names of sets are added as they are scored."""
    names = []
    monkeypatch.setattr("conan_jax.train.loop.train_stage", train_stage)
    monkeypatch.setattr("conan_jax.eval.results.score_set", lambda encoder, e, *rest, **options: names.append(e.name) or score_set(
        encoder, e, *rest, **options))
    return names


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A recipe file beside its data."""
    data = tmp_path_factory.mktemp("data")
    pairs = [{"query": f"{a} {b}", "pos": f"how to {b} the {a} {i}"} for i, (a, b) in enumerate(zip(WORDS * 3, WORDS[5:] * 6))]
    write(data / "p.jsonl", pairs)
    write(data / "sts.jsonl", [{"sentence1": a, "sentence2": f"the {b}", "score": i % 5} for i, (a, b) in enumerate(zip(WORDS, WORDS[1:]))])
    write(data / "beir/corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": f"the {word}"} for i, word in enumerate(WORDS)])
    write(data / "beir/queries.jsonl", [{"_id": f"q{i}", "text": word} for i, word in enumerate(WORDS[:6])])
    (data / "beir/qrels").mkdir()
    (data / "beir/qrels/dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(6)))
    file = data / "recipe.py"
    file.write_text(RECIPE.format(data=str(data)))
    return file


@pytest.fixture
def train(base, tmp_path, scored, monkeypatch, capsys):
    """`train(ARGUMENTS)` -> exit code, output, errors, in the folder of a complete run, `train.run`."""

    def call(*arguments):
        return conan(monkeypatch, capsys, "train", base, "--set", f"output_dir={call.run}", *arguments)

    call.run, complete = tmp_path / "run", base.parent / "complete"
    if not complete.exists():
        code, _, err = conan(monkeypatch, capsys, "train", base, "--set", f"output_dir={complete}")
        assert code == 0, err
        scored.clear()
    shutil.copytree(complete, call.run)
    return call


def read(file):
    return json.loads(file.read_text())


def edited(file, **changes):
    """Save a config.json with other values."""
    file.write_text(json.dumps({**read(file), **changes}))


def test_the_summary_has_the_main_metric_of_the_main_set_and_the_next_commands_work(train, scored, tmp_path, monkeypatch, capsys):
    names = scored
    code, out, _ = train()
    assert code == 0 and names == [], "nothing has changed"
    summary = read(train.run / "summary.json")
    assert summary["main"] == {"evaluation": "similar", "metric": "spearman"}
    assert summary["spearman"].keys() == {"untrained", "pretrain", "weak", "more"} and "ndcg@10" not in summary
    assert summary["timings"].keys() == {"prepare", "evaluate", "pretrain", "weak", "more"}

    (tmp_path / "in.jsonl").write_text('{"text": "sort a list"}')
    commands = [shlex.split(line)[1:] for line in out.replace("IN.jsonl", f"{tmp_path}/in.jsonl").replace("OUT.npy", f"{tmp_path}/o.npy")
                .partition("next:\n")[2].splitlines()]
    assert [command[0] for command in commands] == ["encode", "search", "eval", "export", "report"]
    for command in commands[:2]:
        code, _, err = conan(monkeypatch, capsys, *command)
        assert code == 0, err


def test_an_edited_evaluation_is_scored_again_and_no_other(train, scored):
    names = scored
    before = {row: read(train.run / row / "evaluation.json") for row in ("untrained", "bm25", "pretrain", "weak", "more")}
    code, _, err = train("--stage", "more", "--set", "evaluations.similar.max_queries=8")
    assert code == 0 and names == ["similar"] * 4, err
    after = {row: read(train.run / row / "evaluation.json") for row in before}
    assert all(after[row]["found"] == before[row]["found"] for row in before)
    assert all(after[row]["similar"] != before[row]["similar"] for row in before if row != "bm25")

    names.clear()
    assert train("--set", "evaluations.found.max_queries=3")[0] == 0 and names == ["found", "similar"] * 4
    assert read(train.run / "bm25/evaluation.json")["found"]["ndcg@10"] == before["bm25"]["found"]["ndcg@10"]


def test_changed_data_is_scored_again_and_a_score_without_its_key_is_not_used(train, scored, base):
    names, sets = scored, base.parent / "sts.jsonl"
    content = sets.read_text()
    (train.run / "weak/evaluation_details.json").unlink()
    edited(train.run / "weak/evaluation.json", found={"ndcg@10": 2.0})
    try:
        sets.write_text(content.replace('"score": 3', '"score": 0.5'))
        assert train()[0] == 0 and names == ["similar", "similar", "found", "similar", "similar"]
    finally:
        sets.write_text(content)
    assert read(train.run / "weak/evaluation.json")["found"]["ndcg@10"] <= 1


def test_a_kill_while_sets_are_scored_leaves_no_old_score(tmp_path):
    sets = [config.Evaluation(name, "sts", str(tmp_path / "s.jsonl")) for name in "ab"]
    write(tmp_path / "s.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 1}])
    stored.update(tmp_path, sets, {"weights": 1}, lambda: lambda e: ({"figures": {"spearman": 0.1}, "seconds": 1}, {"x": 1}))
    asked = []

    def killed(evaluation):
        if evaluation.name == "b":
            raise KeyboardInterrupt
        asked.append(evaluation.name)
        return {"figures": {"spearman": 0.2}}, None

    with pytest.raises(KeyboardInterrupt):
        stored.update(tmp_path, sets, {"weights": 2}, lambda: killed)
    assert read(tmp_path / "evaluation.json") == {"a": {"spearman": 0.2}} and read(tmp_path / "diagnostics.json") == {}
    assert stored.update(tmp_path, sets, {"weights": 2}, lambda: lambda e: asked.append(e.name) or ({"figures": {"spearman": 0.3}}, None))
    assert asked == ["a", "b"] and list(read(tmp_path / "evaluation.json")) == ["a", "b"]
    assert not stored.update(tmp_path, sets, {"weights": 2}, lambda: pytest.fail("scored again"))


def test_trained_anew_nothing_old_is_left(train, scored):
    for name in ("summary.json", "report.html", "searches.json"):
        (train.run / name).write_text("{}")
    (train.run / "index").mkdir()
    (train.run / "notes").mkdir()
    edited(train.run / "timings.json", **{"pretrain": 1000.0, "evaluate/more": 2000.0, "prepare": 3000.0})
    assert train("--from-stage", "more", "--fresh")[0] == 0
    timings = read(train.run / "timings.json")
    assert scored == ["found", "similar"] and timings["pretrain"] >= 1000 and timings["prepare"] >= 3000 and timings["evaluate/more"] < 2000
    assert not (train.run / "index").exists() and not (train.run / "searches.json").exists()

    edited(train.run / "untrained/evaluation.json", found={"ndcg@10": 2.0})
    edited(train.run / "bm25/evaluation.json", found={"ndcg@10": 2.0})
    code, out, err = train("--fresh")
    assert code == 0 and "forgotten: pretrain, weak, more" in out, err
    assert max(read(train.run / "timings.json").values()) < 1000 and (train.run / "notes").is_dir()
    assert read(train.run / "untrained/evaluation.json")["found"]["ndcg@10"] <= 1 >= read(train.run / "bm25/evaluation.json")["found"]["ndcg@10"]


def test_what_cannot_be_trained_anew_is_not_forgotten(train, tmp_path):
    weights = sorted((train.run / "more/checkpoints").rglob("*"))
    code, _, err = train("--fresh", "--set", f"evaluations.similar.path={tmp_path}/absent.jsonl")
    assert code == 78 and "absent.jsonl" in err
    assert sorted((train.run / "more/checkpoints").rglob("*")) == weights and (train.run / "untrained/evaluation.json").exists()


def test_nothing_outside_of_the_run_is_removed(train, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(train.run / "more", outside)
    (train.run / "more").symlink_to(outside)
    code, _, err = train("--from-stage", "more", "--fresh")
    assert code == 78 and str(outside) in err and (outside / "checkpoints/2/manifest.json").is_file()


def test_several_stages_are_trained_in_the_order_of_the_recipe_and_gaps_are_refused(base):
    run = config_io.load_run(str(base))

    def names(*only, **options):
        return [stage.name for stage in recipes.select_stages(run, only, **options)]

    assert names() == ["pretrain", "weak", "more"] and names("more", "weak", "weak") == ["weak", "more"]
    assert names(from_stage="weak") == ["weak", "more"]
    with pytest.raises(ConfigError, match="leaves out weak"):
        names("pretrain", "more")
    with pytest.raises(ConfigError, match="--from-stage"):
        names("more", from_stage="weak")
    with pytest.raises(ConfigError, match="no stage 'moer'"):
        names(from_stage="moer")


def test_several_stages_by_the_command_line(train):
    code, out, err = train("--stage", "more", "--stage", "weak", "--fresh")
    assert code == 0 and "forgotten: weak, more" in out and out.index("stage weak") < out.index("stage more"), err
    shutil.rmtree(train.run / "weak")
    code, _, err = train()
    assert code == 78 and "--fresh --from-stage weak" in err, "more descends from another weak"


def test_stages_are_not_trained_twice_on_the_same_weights_unless_they_are_named(train, tmp_path):
    source, train.run = train.run, tmp_path / "tuned"
    code, _, err = train("--init-from", f"{source}/weak")
    assert code == 78 and "--from-stage more" in err and "--from-stage pretrain" in err and not train.run.exists()

    code, out, err = train("--init-from", f"{source}/weak", "--from-stage", "more")
    assert code == 0 and f"start: weights of {source}/weak (step 2)" in out and f"initial weights ({source}/weak)" in out, err
    summary = read(train.run / "summary.json")
    assert summary["spearman"].keys() == {"initial", "more"} and not (train.run / "untrained").exists()
    assert summary["spearman"]["initial"] != read(source / "summary.json")["spearman"]["untrained"]

    # Later commands need not name the weights again.
    recorded = read(train.run / "config.json")
    code, out, err = train("--from-stage", "more", "--set", "more.log_every=1")
    assert code == 0 and f"init_from: {source}/weak" in out and f"resume {train.run}/more at step 2" in out, err
    assert {**read(train.run / "config.json"), "stages": 0} == {**recorded, "stages": 0}

    code, _, err = train("--init-from", f"{source}/more", "--from-stage", "more")
    assert code == 78 and "init_from" in err
    assert read(train.run / "config.json")["init_from"] == f"{source}/weak"


def test_weights_that_no_stage_would_start_from_are_refused(train, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(train.run, other)
    shutil.rmtree(train.run / "more")
    code, _, err = train("--init-from", other / "pretrain", "--stage", "more")
    assert code == 78 and "starts from stage 'weak'" in err


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_a_command_that_fails_leaves_no_empty_folders(base, tmp_path, monkeypatch, capsys, command):
    run = tmp_path / "new" / "run"
    code, _, err = conan(monkeypatch, capsys, command, base, "--set", f"output_dir={run}", "--set", f"data_dir={run}/data", "--set",
                         f"datasets.p.source={tmp_path}/absent.jsonl")
    assert code == 78 and "absent.jsonl" in err and list(tmp_path.iterdir()) == []
