"""A run of three stages that was never trained: weights in which every part matters, figures and manifests as a run leaves them."""

import json
from pathlib import Path

import jax
import numpy as np

from conan_jax import config, config_io
from conan_jax.model import Embedder
from conan_jax.train import checkpoint
from conan_jax.train.state import TrainState
from tests.data.corpus import tokenizer
from tests.model.models import params_of

MODEL = config.Model(vocab_size=608, hidden_size=32, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64,
                     rope_theta=100.0, compute_dtype="float32", scan_layers=False, remat="none")
TASK = "Find what answers the question"
FIGURES = {
    "untrained": {"dev": {"ndcg@10": 0.11111, "recall@10": 0.2, "queries": 7}},
    "bm25": {"dev": {"ndcg@10": 0.4321}},
    "pretrain": {"dev": {"ndcg@10": 0.2222}},
    "weak": {"dev": {"ndcg@10": 0.34567, "recall@10": 0.5, "by_language": {"en": {"ndcg@10": 0.9999}}}},
    "supervised": {"dev": {"ndcg@10": 0.45678, "recall@10": 0.75}},
}


def recipe(folder: Path, model: config.Model = MODEL) -> config.Run:
    mix, bucket = (config.Mix("pairs"),), config.Bucket(16, 24)
    return config.Run(
        name="tiny", model=model, output_dir=str(folder), tokenizer=config.Tokenizer(vocab_size=600),
        datasets=(config.Dataset("pairs", "pair", f"{folder}/raw/some_pairs.jsonl", instruction=TASK),
                  config.Dataset("unused", "text", f"{folder}/raw/unused.txt")),
        evaluations=(config.Evaluation("dev", "retrieval", f"{folder}/raw/dev", instruction=TASK, main=True),),
        stages=(
            config.LMStage(name="pretrain", kind="pretrain", datasets=mix, steps=4, sequence_length=16, global_batch_size=8),
            config.WeakStage(name="weak", datasets=mix, steps=6, buckets=(bucket,), global_batch_size=8),
            config.SupervisedStage(
                name="supervised", steps=3, matryoshka=config.Matryoshka(dims=(8, 16)),
                tasks=(config.Task("search", "retrieval", mix, 8, bucket),)),
        ),
    )


def make_run(
    folder: Path, model: config.Model = MODEL, steps=(("pretrain", 4), ("weak", 3), ("weak", 6), ("supervised", 3)), reader=None,
) -> config.Run:
    """The folder of the run, with the checkpoints `steps`; weights differ from stage to stage."""
    run = recipe(folder, model)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_io.to_dict(run)))
    reader = reader or tokenizer()
    reader.save(folder / "data" / "tokenizer")
    for i, (name, step) in enumerate(steps):
        save(run, name, step, jax.tree.map(lambda a: a * (1 + 0.1 * i), params_of(Embedder(model))), reader)
    for row, figures in FIGURES.items():
        (folder / row).mkdir(exist_ok=True)
        (folder / row / "evaluation.json").write_text(json.dumps(figures))
    built = folder / "data" / "pairs"
    built.mkdir()
    (built / "manifest.json").write_text(json.dumps({
        "name": "pairs", "kind": "pair", "source": f"{folder}/raw/some_pairs.jsonl", "records": 12_345, "read": 12_345, "shards": [],
        "files": [], "settings": {}, "rejects": {}, "dropped": {}, "dialects": {}, "version": "", "format": 1}))
    return run


def save(run: config.Run, name: str, step: int, params, reader=None) -> None:
    stage, number = run.stage(name), np.int32(step)
    params = jax.device_put(params, jax.devices()[0])
    state = TrainState(step=number, params=params, opt_state=(), carry={}, skipped=number, skipped_in_row=number)
    writer = checkpoint.Checkpoints(Path(run.output_dir) / name, 5, checkpoint.make_metadata(run, stage, (reader or tokenizer()).sha256))
    writer.save(step, state)
    writer.close()
