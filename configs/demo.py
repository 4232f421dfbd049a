"""The demo: an embedder trained from scratch on the documentation of the packages on this machine.

Nothing is downloaded: the corpus is made from docstrings (`docstrings:` sources). Whole modules are held
out and scored after every stage. Sized for two CPU cores; see docs/BENCHMARKS.md for its figures.
"""

import dataclasses

from conan_jax.config import (
    Bucket, Contrastive, Dataset, Evaluation, HardNegatives, LMStage, Matryoshka, Mix, Model, Optimizer, Run,
    SoftMask, SupervisedStage, Task, Tokenizer, WeakStage,
)

VARIANTS = {"full": "about ten minutes on two CPU cores", "tiny": "every stage for a few steps, in a minute"}


def get_config(variant: str = "full") -> Run:
    """The demo recipe; `tiny` is the same in a minute, for tests."""
    datasets = (
        Dataset("docs", "text", "docstrings:text"),
        Dataset("describe", "sft", "docstrings:sft"),
        Dataset("pairs", "pair", "docstrings:pairs"),  # summary -> body
        Dataset("names", "pair", "docstrings:names"),  # the words of a qualified name -> its documentation
        Dataset("cloze", "pair", "docstrings:cloze"),  # a sentence -> the rest of its documentation
        Dataset("search", "retrieval", "docstrings:retrieval"),
        Dataset("similar", "sts", "docstrings:sts"),
        Dataset("packages", "labelled", "docstrings:labelled"),
    )
    adam = Optimizer(learning_rate=3e-3, warmup_fraction=0.05, weight_decay=1e-2, b2=0.98)
    gentle = dataclasses.replace(adam, learning_rate=5e-4)
    run = Run(
        name="demo",
        datasets=datasets,
        tokenizer=Tokenizer(vocab_size=8192, datasets=("docs",), max_training_bytes=3_000_000),
        # Shallow, because two cores see few tokens. The table starts at 1/sqrt(hidden_size), where the first logits have unit
        # variance, and enters at unit variance too: the words then outweigh the common direction that a short pretraining leaves.
        model=Model(
            vocab_size=8192, hidden_size=256, intermediate_size=256, num_layers=2, num_heads=8, num_kv_heads=2, max_length=512,
            rope_theta=10_000.0, embedding_initializer_range=0.0625, embedding_multiplier=16.0,
            compute_dtype="float32", scan_layers=False, remat="none",
        ),
        stages=(
            LMStage(name="pretrain", kind="pretrain", datasets=(Mix("docs"),), optimizer=gentle, steps=60,
                    global_batch_size=32, sequence_length=128, loss_chunk_size=512, checkpoint_every=50),
            LMStage(name="sft", kind="sft", datasets=(Mix("describe"),), optimizer=gentle, steps=30,
                    global_batch_size=32, sequence_length=128, loss_chunk_size=512, checkpoint_every=50),
            WeakStage(name="weak", datasets=(Mix("pairs", 2.0), Mix("names", 1.0), Mix("cloze", 1.0)), optimizer=adam, steps=180,
                      global_batch_size=128, buckets=(Bucket(20, 48),), soft_mask=SoftMask(),
                      contrastive=Contrastive(temperature=0.05, false_negative_margin=0.1), checkpoint_every=100),
            SupervisedStage(
                name="supervised", optimizer=dataclasses.replace(adam, learning_rate=2e-3), steps=160, checkpoint_every=80,
                tasks=(
                    Task("retrieval", "retrieval", (Mix("search"),), 128, Bucket(20, 48)),
                    Task("classification", "classification", (Mix("packages"),), 16, Bucket(20, 8), weight=0.25,
                         in_batch_negatives=False, num_negatives=3),
                    Task("sts", "sts", (Mix("similar"),), 32, Bucket(20, 20), weight=0.8),
                ),
                cosent_temperature=0.5,  # grades by place are coarse: a soft ranking leaves retrieval in charge
                hard_negatives=HardNegatives(rule="v2", num_negatives=1, pool_size=8, skip_top=3),
                contrastive=Contrastive(temperature=0.05, false_negative_margin=0.1),
                matryoshka=Matryoshka(dims=(64, 256)),
            ),
        ),
        evaluations=(Evaluation("held_out_modules", "retrieval", "docstrings:eval", max_length=64, main=True),),
    )
    return run if variant == "full" else tiny(run)


def tiny(run: Run) -> Run:
    """Every stage for a few steps of a very small model."""
    model = dataclasses.replace(run.model, vocab_size=1024, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, max_length=128)
    pretrain, sft, weak, supervised = run.stages
    tasks = tuple(dataclasses.replace(task, global_batch_size=8) for task in supervised.tasks)
    return dataclasses.replace(
        run, name="demo_tiny", output_dir="", data_dir="", model=model,
        tokenizer=dataclasses.replace(run.tokenizer, vocab_size=1024, max_training_bytes=300_000),
        datasets=tuple(dataclasses.replace(d, limit=500) for d in run.datasets),
        evaluations=tuple(dataclasses.replace(e, max_queries=50) for e in run.evaluations),
        stages=(
            dataclasses.replace(pretrain, steps=6, global_batch_size=8, sequence_length=64),
            dataclasses.replace(sft, steps=6, global_batch_size=8, sequence_length=64),
            dataclasses.replace(weak, steps=6, global_batch_size=8),
            dataclasses.replace(supervised, steps=6, tasks=tasks, matryoshka=Matryoshka(dims=(16, 32))),
        ),
    )
