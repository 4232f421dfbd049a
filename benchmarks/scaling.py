"""What a device holds and exchanges as devices go 1, 8, 64, 256, and whether the input pipeline feeds a host of them.

    python benchmarks/scaling.py [--only PART ...] [--json] [--check]

Two whole updates of one model (2 layers x 1024, float32), compiled and not run, with the batch of a device the same on any number
of them: `lm`, 4 rows x 1024 tokens a device in 2 micro-batches, and `contrastive`, 4 pairs of 512-token texts a device in 2
chunks. They are compiled for v5e where libtpu is installed, else for as many CPU devices, each number in a process of its own.

    temporary memory  must not grow from 8 devices on: the bar is 1.1 of that at 8. From 1 to 8 it shrinks, since gradients are
                      split. What grows by design is small: the vectors of the global batch, 4 D bytes a text.
    all-gather        no result may be as large as a block's input for the tokens of one device, tokens x D numbers. Gathered are
                      weights a layer at a time, token ids, and the vectors of the global batch.
    all-to-all        no result may be larger than that: the rows of the embedding table, which devices look up in columns, are.

`input` makes the batches of a `pretrain` and of a `weak` stage by the real pipeline, from the sources of Python's own library,
prepared on the spot; only real tokens count, and nothing but the pipeline runs. A v5e host drives 4 chips. Those consume about
78,000 tokens/s of the full model: 4 x 197 TFLOP/s at 60 % of peak, over 6 GFLOP a token (962M parameters outside the table, rows of
512). The bar is five times that on whatever machine this is; a host of four v5e has 112 virtual cores.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conan_jax import config, hardware

ACCELERATORS = {"tpu": {1: "v5e-1", 8: "v5e-8", 64: "v5e-64", 256: "v5e-256"}, "cpu": {n: f"cpu-{n}" for n in (1, 8, 64, 256)}}
STEPS = ("lm", "contrastive")
MEMORY_BAR, INPUT_BAR = 1.1, 5 * 78_000
SECONDS = 10.0  # of batches, after those made ahead


def recipe(what: str, devices: int) -> tuple[config.Run, config.AnyStage]:
    """The update `what` with the batch of `devices` devices."""
    model = config.Model(vocab_size=1024, hidden_size=1024, intermediate_size=1024, num_layers=2, num_heads=8, num_kv_heads=4,
                         max_length=1024, compute_dtype="float32")
    common: dict[str, Any] = {"name": what, "steps": 10, "datasets": (config.Mix("data"),), "global_batch_size": 4 * devices}
    stage: config.AnyStage = config.LMStage(kind="pretrain", sequence_length=1024, gradient_accumulation_steps=2, **common)
    if what == "contrastive":
        stage = config.WeakStage(buckets=(config.Bucket(512, 512),), encode_chunk_size=4, **common)
    return config.Run(name="scaling", stages=(stage,), datasets=(config.Dataset("data", "pair", "unused"),), model=model,
                      tokenizer=config.Tokenizer(vocab_size=1000)), stage


def compile_here(what: str, devices: int, name: str) -> dict[str, float]:
    """Of one update, on one device: bytes of temporary arrays and of arguments, of the largest results of both kinds, bytes sent."""
    from conan_jax.preflight import collectives, environment

    accelerator = hardware.accelerator(name)
    environment.prepare(accelerator)
    from conan_jax.preflight import program

    from conan_jax.data.shapes import batch_shapes
    from conan_jax.model import Embedder
    from conan_jax.sharding import make_mesh
    from conan_jax.stages import make_stage
    from conan_jax.train.abstract import lower_step

    run, stage = recipe(what, devices)
    embedder, mesh = Embedder(run.model), make_mesh(run.mesh, program.devices_of(accelerator, 1))
    compiled = lower_step(run, stage, stage=make_stage(stage, embedder), embedder=embedder, batch=batch_shapes(stage),
                          num_examples={"": 1}, mesh=mesh).compile()
    found = collectives.read(compiled.as_text()).collectives
    largest = {kind: max((c.bytes * len(c.group) / (len(c.group) - 1) for c in found if c.kind == kind), default=0.0)
               for kind in ("all-gather", "all-to-all")}
    memory = compiled.memory_analysis()
    return {"temporary": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes, "gathered": largest["all-gather"],
            "exchanged": largest["all-to-all"], "sent": float(sum(c.bytes * c.times for c in found))}


def compile_apart(what: str, devices: int, name: str) -> dict[str, float]:
    """`compile_here` in a process of its own: jax makes its devices once."""
    done = subprocess.run([sys.executable, __file__, "--compile", what, str(devices), name], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what} on {name} was not compiled (exit status {done.returncode})")
    return json.loads(done.stdout.splitlines()[-1])


def measure_step(what: str, platform: str) -> Iterator[Any]:
    """The figures of one update over all numbers of devices."""
    from timing import at_most, plain

    rows, length = (4, 1024) if what == "lm" else (8, 512)
    block_input = rows * length * 1024 * 4
    found = {devices: compile_apart(what, devices, name) for devices, name in ACCELERATORS[platform].items()}
    for devices, bytes_ in found.items():
        on = f"{what}, {ACCELERATORS[platform][devices]}"
        yield plain(f"{on}: temporary memory a device", bytes_["temporary"] / 2**20, "MiB")
        yield plain(f"{on}: state and batch a device", bytes_["arguments"] / 2**20, "MiB")
        yield plain(f"{on}: sent by a device", bytes_["sent"] / 2**20, "MiB")
    largest = max(found[devices]["temporary"] for devices in found if devices >= 8)
    yield at_most(MEMORY_BAR, f"{what}: temporary memory, most on 8 to 256 devices / on 8", largest / found[8]["temporary"], "x")
    for kind, bar, name in (("gathered", 0.99, "all-gather"), ("exchanged", 1.0, "all-to-all")):
        yield at_most(bar, f"{what}: largest {name} / a block's input on a device", max(b[kind] for b in found.values()) / block_input, "x")


def measure_input() -> Iterator[Any]:
    """Rows and real tokens a second of the input pipeline."""
    import numpy as np

    from conan_jax.data.pipeline import Pipeline
    from conan_jax.data.prepare import prepare
    from timing import at_least, plain

    with tempfile.TemporaryDirectory() as folder:
        run = library_recipe(Path(folder))
        prepared = prepare(run)
        for stage in run.stages:
            batches = Pipeline(run, stage, prepared.tokenizer).iterate(0)
            for _ in range(10):  # those made ahead before the clock starts
                next(batches)
            rows, tokens, began, worked = 0, 0, time.perf_counter(), time.process_time()
            while (elapsed := time.perf_counter() - began) < SECONDS:
                batch = next(batches)
                rows += batch["ids"].shape[0]
                real = [batch["segment_ids"] > 0] if "segment_ids" in batch else [batch[name]["lengths"] for name in ("query", "positive")]
                tokens += sum(int(np.sum(x)) for x in real)
            yield plain(f"input of {stage.name}: rows a second", rows / elapsed, "/s")
            yield plain(f"input of {stage.name}: real tokens a second of one core", tokens / (time.process_time() - worked), "/s")
            yield at_least(INPUT_BAR, f"input of {stage.name}: real tokens a second", tokens / elapsed, "/s")


def library_recipe(folder: Path) -> config.Run:
    """A recipe on the sources of Python's library: documents of 400 words, pairs of 60 words and the 300 that follow them."""
    words = [word for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) for word in file.read_text("utf-8", "ignore").split()]
    parts = [words[start : start + 400] for start in range(0, min(len(words), 800_000), 400)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(part)}) + "\n" for part in parts))
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"query": " ".join(part[:60]), "pos": " ".join(part[60:360])}) + "\n"
                                                for part in parts if len(part) > 60))
    common: dict[str, Any] = {"steps": 10, "global_batch_size": 64}
    stages = (config.LMStage(name="pretrain", kind="pretrain", datasets=(config.Mix("text"),), sequence_length=4096, **common),
              config.WeakStage(name="weak", datasets=(config.Mix("pairs"),), buckets=(config.Bucket(512, 512),), **common))
    return config.Run(
        name="input", stages=stages, output_dir=str(folder / "run"), tokenizer=config.Tokenizer(vocab_size=8000, datasets=("text",)),
        model=config.Model(vocab_size=8192, max_length=4096),
        datasets=(config.Dataset("text", "text", str(folder / "text.jsonl")), config.Dataset("pairs", "pair", str(folder / "pairs.jsonl"))))


def main() -> int:
    if sys.argv[1:2] == ["--compile"]:
        what, devices, name = sys.argv[2:]
        print(json.dumps(compile_here(what, int(devices), name)))
        return 0
    os.environ["JAX_PLATFORMS"] = "cpu"
    from timing import parser, show

    options = parser(__doc__, 1)
    options.add_argument("--only", action="append", choices=[*STEPS, "input"], help="measure this part; may be repeated")
    arguments = options.parse_args()
    platform = "tpu" if importlib.util.find_spec("libtpu") else "cpu"
    missed = False
    for part in arguments.only or [*STEPS, "input"]:
        missed |= show(measure_input() if part == "input" else measure_step(part, platform), arguments.json)
    return 1 if missed and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
