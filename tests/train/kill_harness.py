"""The command that is killed: `python -m tests.train.kill_harness FOLDER PROGRAMS` trains a tiny model by all four stages.

Batches are pure functions of the step, as the contract asks, and come slowly enough for a killer to choose its moment.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"

import jax  # noqa: E402

from conan_jax import config  # noqa: E402
from conan_jax.model import Embedder  # noqa: E402
from conan_jax.stages import make_stage  # noqa: E402
from conan_jax.train import loop  # noqa: E402
from conan_jax.train.step import make_train_step  # noqa: E402
from tests.stages import examples  # noqa: E402

STEPS, CHECKPOINT_EVERY = 10, 3
ORDER = ("pretrain", "sft", "weak", "supervised")


class SlowPipeline:
    def __init__(self, kind):
        self.kind = kind
        self.num_examples = examples.EXAMPLES if kind == "supervised" else {"": examples.EXAMPLES["retrieval"]}

    def batch(self, step):
        return examples.batch_of(self.kind, seed=step)

    def datasets_of(self, batch):
        return {}

    def iterate(self, start):
        while True:
            time.sleep(0.03)
            yield self.batch(start)
            start += 1


def main(folder: Path, programs: str) -> None:
    for name, value in (("dir", programs), ("min_compile_time_secs", 0.0), ("min_entry_size_bytes", -1)):
        jax.config.update("jax_compilation_cache_dir" if name == "dir" else f"jax_persistent_cache_{name}", value)
    optimizer = config.Optimizer(learning_rate=1e-2)
    common = {"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "log_every": 1, "optimizer": optimizer}
    stages = tuple(dataclasses.replace(examples.STAGES[kind], **common) for kind in ORDER)
    model, tokenizer = dataclasses.replace(examples.MODEL, vocab_size=264), config.Tokenizer(vocab_size=264)
    data = (config.Dataset("d", "pair", "unused"),)
    run = config.Run(name="killed", stages=stages, datasets=data, model=model, tokenizer=tokenizer, output_dir=str(folder))
    embedder, previous, train_steps = Embedder(model), None, []
    loop.make_train_step = lambda *arguments: train_steps.append(make_train_step(*arguments)) or train_steps[-1]
    for stage in stages:
        loop.train_stage(run, stage, stage=make_stage(stage, embedder), embedder=embedder, pipeline=SlowPipeline(stage.kind),
                         tokenizer_sha256="aaa", folder=folder / stage.name, previous_folder=previous)
        previous = folder / stage.name
    print("compilations", [step._cache_size() for step in train_steps])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
