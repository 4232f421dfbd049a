"""Conan-Embedding-v2 as published: 1.5B parameters, four stages (METHODS 1.1-1.6).

Point CONAN_DATA at a folder laid out as the sources below; every source may also be a glob, a parquet
file or a TFDS name. Batch sizes are global: the published per-device batch times the published devices.
`conan_v2.py:tiny` is the same recipe at a size that runs on a laptop.
"""

import dataclasses

from conan_jax.config import (
    Bucket, Contrastive, Dataset, Evaluation, HardNegatives, LMStage, Matryoshka, Mix, Model, Optimizer, Run,
    SoftMask, SupervisedStage, Task, Tokenizer, WeakStage,
)

VARIANTS = {"full": "the published sizes: 1.5B parameters, four stages", "tiny": "every stage at a size that runs on a laptop"}

WEAK_MIX = {  # millions of pairs, Table 10 of the paper
    "news": 620, "social": 690, "instruction": 200, "knowledge_base": 106, "web": 70, "papers": 50, "community_qa": 30,
}
RETRIEVAL_TASK = "Given a question, retrieve passages that answer it"


def get_config(variant: str = "full") -> Run:
    """The published recipe; `tiny` keeps every stage and option and shrinks the sizes."""
    datasets = (
        Dataset("lm", "text", "$CONAN_DATA/lm/*.parquet"),
        Dataset("instructions", "sft", "$CONAN_DATA/sft/*.parquet"),
        *(Dataset(f"weak_{name}", "pair", f"$CONAN_DATA/pairs/{name}/*.parquet") for name in WEAK_MIX),
        Dataset("retrieval", "retrieval", "$CONAN_DATA/retrieval/*.parquet", instruction=RETRIEVAL_TASK),
        Dataset("clr", "retrieval", "$CONAN_DATA/clr/*.parquet", instruction=RETRIEVAL_TASK),
        Dataset("classification", "labelled", "$CONAN_DATA/classification/*.parquet", instruction="Classify the text"),
        Dataset("sts", "sts", "$CONAN_DATA/sts/*.parquet"),
    )
    peak = Optimizer(learning_rate=1e-4, warmup_fraction=0.05, weight_decay=1e-3)
    run = Run(
        name="conan_v2",
        datasets=datasets,
        tokenizer=Tokenizer(vocab_size=151_000, datasets=("lm",)),
        model=Model(),
        stages=(
            LMStage(
                name="pretrain", kind="pretrain", datasets=(Mix("lm"),), optimizer=peak,
                steps=45_000,  # 3T tokens at 67M a step
                global_batch_size=256 * 64, sequence_length=4096, gradient_accumulation_steps=64, checkpoint_every=500,
            ),
            LMStage(
                name="sft", kind="sft", datasets=(Mix("instructions"),),
                optimizer=dataclasses.replace(peak, learning_rate=2e-5, warmup_fraction=0.02),
                steps=75_000, global_batch_size=64 * 16, sequence_length=4096, gradient_accumulation_steps=4,
            ),
            WeakStage(
                name="weak", optimizer=peak, steps=1_725_000,  # 1,766M pairs at 1,024 a step
                datasets=tuple(Mix(f"weak_{name}", weight=float(millions)) for name, millions in WEAK_MIX.items()),
                global_batch_size=64 * 16, buckets=(Bucket(64, 256), Bucket(512, 512)), encode_chunk_size=16,
                soft_mask=SoftMask(schedule="linear"),
                contrastive=Contrastive(temperature=0.02, false_negative_margin=0.1),
                checkpoint_every=2000,
            ),
            SupervisedStage(
                name="supervised", optimizer=peak, steps=47_000,  # 3.0M retrieval examples at 64 a step
                # Two row lengths in all: each is a copy of the model in the compiled step, and small sub-batches ride along.
                tasks=(
                    Task("retrieval", "retrieval", (Mix("retrieval"),), 4 * 16, Bucket(128, 512)),
                    Task("clr", "retrieval", (Mix("clr"),), 4 * 16, Bucket(128, 512)),
                    Task("classification", "classification", (Mix("classification"),), 4 * 16, Bucket(512, 128), in_batch_negatives=False),
                    Task("sts", "sts", (Mix("sts"),), 32 * 16, Bucket(128, 128), weight=0.8),
                ),
                hard_negatives=HardNegatives(rule="v2", num_negatives=7, pool_size=32),
                contrastive=Contrastive(temperature=0.02, false_negative_margin=None),
                cosent_temperature=0.05, encode_chunk_size=16,
                matryoshka=Matryoshka(dims=(256, 512, 1024, 1536, 2048, 3072, 3584)),
            ),
        ),
        evaluations=(Evaluation("retrieval_dev", "retrieval", "$CONAN_DATA/eval/retrieval", instruction=RETRIEVAL_TASK, main=True),),
    )
    return run if variant == "full" else tiny(run)


def tiny(run: Run) -> Run:
    """The same recipe, a few thousand times smaller."""
    model = dataclasses.replace(
        run.model, vocab_size=512, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
        max_length=128, compute_dtype="float32", remat="none", attention_block_size=32,
    )
    pretrain, sft, weak, supervised = run.stages
    buckets = {"retrieval": Bucket(32, 48), "clr": Bucket(32, 48), "classification": Bucket(32, 16), "sts": Bucket(24, 24)}
    tasks = tuple(dataclasses.replace(t, global_batch_size=8, bucket=buckets[t.name]) for t in supervised.tasks)
    tasks = tuple(dataclasses.replace(t, num_negatives=2) if t.kind == "classification" else t for t in tasks)
    return dataclasses.replace(
        run, name="conan_v2_tiny", output_dir="", data_dir="", model=model,
        tokenizer=dataclasses.replace(run.tokenizer, vocab_size=512),
        stages=(
            dataclasses.replace(pretrain, steps=4, global_batch_size=8, sequence_length=64, loss_chunk_size=128, gradient_accumulation_steps=2),
            dataclasses.replace(sft, steps=4, global_batch_size=8, sequence_length=64, loss_chunk_size=128, gradient_accumulation_steps=2),
            dataclasses.replace(weak, steps=4, global_batch_size=8, buckets=(Bucket(32, 48),), encode_chunk_size=1),
            dataclasses.replace(
                supervised, steps=4, tasks=tasks, matryoshka=Matryoshka(dims=(16, 32)),
                hard_negatives=HardNegatives(rule="v2", num_negatives=2, pool_size=4),
            ),
        ),
    )
