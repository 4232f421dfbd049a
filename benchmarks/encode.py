"""Texts a second of `Encoder` against sentence-transformers: one export folder, the same texts, the same threads, float32.

    python benchmarks/encode.py [--rounds N] [--texts N] [--json] [--check]          # needs pip install '.[torch]'

A model of 4 layers x 256 (8 query and 2 key/value heads, FFN 768, V 8192) with fresh weights is exported as `conan export` does it, and
both sides load that folder. Texts are real: of $CONAN_DATA (default ../shared/data) where it is there, else the documentation of the
installed packages. Mixed lengths are texts as they are, up to 512 tokens; fixed ones are cut to 128 and to 512. Tokenising counts.
Each side has its own default batch size. Before anything is timed, the vectors of both must agree to a cosine of 0.9999.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import conan_jax  # sets the allocator before jax starts  # noqa: F401

import jax
import numpy as np

from conan_jax import Encoder, config
from conan_jax.data.docstring_reader import read_docstrings
from conan_jax.data.tokenizer import Tokenizer, train_tokenizer
from conan_jax.errors import ConfigError, ConanError
from conan_jax.export.folder import export
from conan_jax.model import Embedder
from conan_jax.train import checkpoint
from conan_jax.train.state import TrainState

from timing import Figure, at_least, parser, plain, ratio, show

MODEL = config.Model(vocab_size=8192, hidden_size=256, intermediate_size=768, num_layers=4, num_heads=8, num_kv_heads=2, max_length=512,
                     compute_dtype="float32", scan_layers=False, remat="none")
FIXED = {128: 512, 512: 128}  # tokens of a text -> texts of a round


def real_texts(count: int) -> list[str]:
    """Texts of many lengths and languages, in a fixed order; the first `count`."""
    folder = Path(os.environ.get("CONAN_DATA", "../shared/data")) / "lm"
    files = [folder / name for name in ("en.jsonl.gz", "zh.jsonl.gz", "multi.jsonl.gz")]
    if all(file.is_file() for file in files):
        read = [(json.loads(line)["text"] for line in gzip.open(file, "rt", encoding="utf-8")) for file in files]
        return list(itertools.islice((text for texts in zip(*read) for text in texts), count))
    documented, _ = read_docstrings()
    return [f"{doc.name}\n{doc.summary}\n{doc.body}" for doc in documented[:: max(1, len(documented) // count)][:count]]


def cut_texts(texts: Sequence[str], tokenizer: Tokenizer, length: int, count: int) -> list[str]:
    """`count` texts of at least `length` tokens, made of whole ones one after another."""
    made, held, size = [], [], 0
    for text in itertools.cycle(texts):
        held.append(text)
        size += len(tokenizer.encode(text))
        if size >= length:
            made.append("\n".join(held))
            held, size = [], 0
            if len(made) == count:
                return made
    return made


def exported(folder: Path, texts: Sequence[str]) -> Path:
    """An export of a fresh model, with a tokenizer trained on `texts`."""
    settings = config.Tokenizer(vocab_size=MODEL.vocab_size, max_training_bytes=2_000_000)
    tokenizer = train_tokenizer(texts, settings, folder / "run/data/tokenizer")
    stage = config.WeakStage(name="weak", datasets=(config.Mix("d"),), steps=1, buckets=(config.Bucket(512, 512),), global_batch_size=1,
                             soft_mask=config.SoftMask(steps=1))
    run = config.Run(name="benchmark", stages=(stage,), datasets=(config.Dataset("d", "pair", "x"),), model=MODEL,
                     tokenizer=config.Tokenizer(vocab_size=tokenizer.vocab_size), output_dir=str(folder / "run"))
    (folder / "run" / "weak").mkdir(parents=True)
    params = jax.jit(Embedder(MODEL).init)(jax.random.key(0))
    one = np.int32(1)
    writer = checkpoint.Checkpoints(folder / "run" / "weak", 1, checkpoint.make_metadata(run, stage, tokenizer.sha256))
    writer.save(1, TrainState(step=one, params=params, opt_state=(), carry={}, skipped=one, skipped_in_row=one))
    writer.close()
    export(folder / "run" / "weak", folder / "export")
    return folder / "export"


def timed(sides: dict[str, Callable[[], np.ndarray]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, in turns; the first round compiles, is compared, and is not kept."""
    first = {name: side() for name, side in sides.items()}
    ours, theirs = first.values()
    worst = float(np.min(np.sum(ours * theirs, axis=1)))
    if worst < 0.9999:
        raise SystemExit(f"the two sides disagree: the worst cosine is {worst:.6f}; nothing was timed")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - start)
    return times


def measure(rounds: int, count: int) -> Iterator[Figure]:
    """All figures."""
    try:
        import torch
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError("this benchmark needs sentence-transformers: pip install '.[torch]'") from error
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    texts = real_texts(count)
    with tempfile.TemporaryDirectory() as folder:
        place = exported(Path(folder), texts)
        ours, theirs = Encoder.load(place), SentenceTransformer(str(place), device="cpu")
    sets = {"mixed lengths": (texts, 512, 1.2)}
    sets |= {f"{length} tokens": (cut_texts(texts, ours.tokenizer, length, number), length, 1.4) for length, number in FIXED.items()}
    for name, (given, length, bar) in sets.items():
        theirs.max_seq_length = length
        times = timed({
            "conan_jax": lambda: ours.encode(given, max_length=length),
            "sentence-transformers": lambda: theirs.encode(given, batch_size=32, show_progress_bar=False),
        }, rounds)
        for side, seconds in times.items():
            yield plain(f"texts a second of {side}, {name}", len(given) / statistics.median(seconds), "/s")
        yield at_least(bar, f"texts a second of conan_jax over sentence-transformers, {name}",
                       ratio(times, "sentence-transformers", "conan_jax"), "x")


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--texts", type=int, default=2000, help="texts of mixed lengths (default 2000)")
    arguments = options.parse_args()
    try:
        missed = show(measure(arguments.rounds, arguments.texts), arguments.json)
    except ConanError as error:
        sys.exit(f"encode.py: {error}")
    sys.exit(missed and arguments.check)


if __name__ == "__main__":
    main()
