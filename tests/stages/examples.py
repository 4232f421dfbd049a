"""A tiny model, a stage of every kind, and random batches of every kind, as docs/ARCHITECTURE.md lays them out."""

import functools

import jax
import numpy as np

from conan_jax import config as c
from conan_jax.model import Embedder

MODEL = c.Model(vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4, num_kv_heads=2, max_length=16,
                compute_dtype="float32", scan_layers=False, remat="none", initializer_range=0.3)
B, L, S, P = 8, 6, 2, 5
EXAMPLES = {"retrieval": 40, "classification": 40, "sts": 40}
MIX, BUCKET = (c.Mix("d"),), c.Bucket(L, L)

RETRIEVAL = c.Task("retrieval", "retrieval", MIX, B, BUCKET)
CLASSIFICATION = c.Task("classification", "classification", MIX, B, BUCKET, in_batch_negatives=False, num_negatives=S)
STS = c.Task("sts", "sts", MIX, B, BUCKET, weight=0.8)
HARD = c.HardNegatives(num_negatives=S, pool_size=P)

STAGES = {
    "pretrain": c.LMStage(name="pretrain", kind="pretrain", steps=10, datasets=MIX, global_batch_size=B, sequence_length=L, loss_chunk_size=4),
    "sft": c.LMStage(name="sft", kind="sft", steps=10, datasets=MIX, global_batch_size=B, sequence_length=L, loss_chunk_size=4, z_loss=0.01),
    "weak": c.WeakStage(name="weak", steps=10, datasets=MIX, global_batch_size=B, buckets=(BUCKET,), contrastive=c.Contrastive(temperature=0.2)),
    "supervised": c.SupervisedStage(name="supervised", steps=10, tasks=(RETRIEVAL, CLASSIFICATION, STS), hard_negatives=HARD,
                                    contrastive=c.Contrastive(temperature=0.2, false_negative_margin=None),
                                    matryoshka=c.Matryoshka(dims=(8, 16), weights=(0.5, 1.0))),
    "one_task": c.SupervisedStage(name="one_task", steps=10, tasks=(RETRIEVAL, STS), update="one_task", hard_negatives=HARD),
}


@functools.cache
def embedder_and_params():
    embedder = Embedder(MODEL)
    return embedder, jax.jit(embedder.init)(jax.random.key(0))


def texts(r, *shape, prompt=0):
    """Random right-padded texts that end in EOS (3)."""
    lengths = r.integers(2 + prompt, L + 1, shape).astype(np.int32)
    tokens = r.integers(4, MODEL.vocab_size, (*shape, L)).astype(np.int32)
    position = np.arange(L)
    tokens = np.where(position == lengths[..., None] - 1, 3, np.where(position < lengths[..., None], tokens, 0)).astype(np.int32)
    batch = {"tokens": tokens, "lengths": lengths}
    return {**batch, "prompt_lengths": np.full(shape, prompt, np.int32)} if len(shape) == 1 else batch


def hashes(r, *shape):
    return r.integers(0, 2**32, (*shape, 2), dtype=np.uint32)


def pairs(r):
    return {"ids": r.permutation(40)[:B].astype(np.int32), "query": texts(r, B, prompt=1), "positive": texts(r, B),
            "query_hash": hashes(r, B), "positive_hash": hashes(r, B)}


def packed(r):
    """Rows of two segments and some padding, the first row one segment from end to end; most tokens are marked as targets."""
    segments = np.zeros((B, L), np.int32)
    positions = np.zeros((B, L), np.int32)
    for row in range(B):
        first, second = r.integers(1, 4), r.integers(1, 4)
        segments[row, :first], segments[row, first : first + second] = 1, 2
        positions[row, :first], positions[row, first : first + second] = np.arange(first), np.arange(second)
    segments[0], positions[0] = 1, np.arange(L)
    tokens = np.where(segments > 0, r.integers(4, MODEL.vocab_size, (B, L)), 0).astype(np.int32)
    loss_mask = ((r.random((B, L)) < 0.7) & (segments > 0)).astype(np.float32)
    loss_mask[0, 0] = 1
    return {"ids": np.arange(B, dtype=np.int32), "tokens": tokens, "segment_ids": segments, "positions": positions, "loss_mask": loss_mask}


def batch_of(kind, seed=0):
    r = np.random.default_rng(seed)
    if kind in ("pretrain", "sft"):
        return packed(r)
    if kind == "weak":
        return pairs(r)
    every = {
        "retrieval": {**pairs(r), "pool": texts(r, B, P), "pool_hash": hashes(r, B, P), "pool_size": r.integers(0, P + 1, B).astype(np.int32)},
        "classification": {**pairs(r), "negatives": texts(r, B, S), "negative_mask": (r.random((B, S)) < 0.8).astype(np.float32)},
        "sts": {"ids": r.permutation(40)[:B].astype(np.int32), "sentence1": texts(r, B), "sentence2": texts(r, B), "score": r.integers(0, 6, B).astype(np.float32)},
    }
    return {task.name: every[task.name] for task in STAGES[kind].tasks}
