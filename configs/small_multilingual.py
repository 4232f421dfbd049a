"""A small multilingual embedder, all four stages, on a data folder given by CONAN_DATA.

The folder holds lm/, sft/, pairs/, retrieval/, clr/, sts/, classification/ as jsonl.gz and BEIR dev sets
(README.md, "Your own data"). Sized for two CPU cores (docs/BENCHMARKS.md has its time): raise `steps`, batches and `model.*`
where there is more.
"""

import dataclasses

from conan_jax.config import (
    Bucket, Contrastive, Dataset, Evaluation, HardNegatives, LMStage, Matryoshka, Mix, Model, Optimizer, Run,
    SoftMask, SupervisedStage, Task, Tokenizer, WeakStage,
)

VARIANTS = {"full": "four stages on two CPU cores", "tiny": "every stage for a few steps, on the first records of each set"}

SEARCH = "Given a question, retrieve passages that answer it"
RETRIEVAL_LANGUAGES = ("en", "zh", "ja")
STS_LANGUAGES = ("en", "de", "es", "fr", "ja", "nl", "pt", "zh")


def get_config(variant: str = "full") -> Run:
    """The multilingual recipe; `tiny` is the same on a few hundred records."""
    data = "$CONAN_DATA"
    sts = tuple(Dataset(f"sts_{lang}", "sts", f"{data}/sts/stsb.{lang}.train.jsonl.gz") for lang in STS_LANGUAGES)
    datasets = (
        Dataset("lm_en", "text", f"{data}/lm/en.jsonl.gz"),
        Dataset("lm_zh", "text", f"{data}/lm/zh.jsonl.gz"),
        Dataset("lm_multi", "text", f"{data}/lm/multi.jsonl.gz"),
        Dataset("sft", "sft", f"{data}/sft/sft.jsonl.gz"),
        Dataset("qa", "pair", f"{data}/pairs/qa_multi.jsonl.gz", instruction=SEARCH),
        Dataset("headings", "pair", f"{data}/pairs/docs_heading_body.jsonl.gz"),
        Dataset("tldr", "pair", f"{data}/pairs/tldr_title_body.jsonl.gz"),
        Dataset("bitext", "pair", f"{data}/pairs/bitext_tldr.jsonl.gz"),
        Dataset("wordnet", "pair", f"{data}/pairs/wordnet.jsonl.gz"),
        Dataset("recast", "pair", f"{data}/sft/sft.jsonl.gz"),  # instruction + input = query, output = positive
        *(Dataset(f"retrieval_{lang}", "retrieval", f"{data}/retrieval/{lang}_train.jsonl.gz", instruction=SEARCH)
          for lang in RETRIEVAL_LANGUAGES),
        Dataset("clr", "retrieval", f"{data}/clr/train.jsonl.gz", instruction=SEARCH),
        Dataset("banking77", "labelled", f"{data}/classification/banking77/train.jsonl.gz", instruction="Name the intent of the message"),
        Dataset("sib200", "labelled", f"{data}/classification/sib200/train.jsonl.gz", instruction="Name the topic of the text"),
        *sts,
    )
    adam = Optimizer(learning_rate=3e-3, warmup_fraction=0.05, weight_decay=1e-2, b2=0.98)
    # A few hundred thousand tokens teach no language; at higher rates they only bend the tied table (docs/BENCHMARKS.md).
    gentle = dataclasses.replace(adam, learning_rate=1e-4)
    pairs = ("qa", "headings", "tldr", "bitext", "wordnet", "recast")
    run = Run(
        name="small_multilingual",
        datasets=datasets,
        tokenizer=Tokenizer(vocab_size=16_000, datasets=("lm_en", "lm_zh", "lm_multi"), character_coverage=0.999,
                            max_training_bytes=8_000_000),
        model=Model(
            vocab_size=16_000, hidden_size=256, intermediate_size=384, num_layers=2, num_heads=8, num_kv_heads=2, max_length=512,
            rope_theta=10_000.0, embedding_initializer_range=0.0625, embedding_multiplier=16.0,  # as in configs/demo.py
            compute_dtype="float32", scan_layers=False, remat="none",
        ),
        stages=(
            LMStage(name="pretrain", kind="pretrain", datasets=(Mix("lm_en", 2.0), Mix("lm_zh", 1.0), Mix("lm_multi", 1.0)),
                    optimizer=gentle, steps=100, global_batch_size=16, sequence_length=256,
                    loss_chunk_size=512, checkpoint_every=50),
            LMStage(name="sft", kind="sft", datasets=(Mix("sft"),), optimizer=gentle, steps=40,
                    global_batch_size=16, sequence_length=256, loss_chunk_size=512, checkpoint_every=50),
            WeakStage(name="weak", datasets=tuple(Mix(name) for name in pairs), optimizer=adam, steps=400, global_batch_size=128,
                      buckets=(Bucket(24, 48), Bucket(48, 96)), soft_mask=SoftMask(), contrastive=Contrastive(temperature=0.05),
                      checkpoint_every=100),
            SupervisedStage(
                name="supervised", optimizer=dataclasses.replace(adam, learning_rate=5e-4), steps=150, checkpoint_every=50,
                tasks=(
                    Task("retrieval", "retrieval", tuple(Mix(f"retrieval_{lang}") for lang in RETRIEVAL_LANGUAGES), 48, Bucket(32, 96)),
                    Task("clr", "retrieval", (Mix("clr"),), 32, Bucket(32, 96)),
                    Task("classification", "classification", (Mix("banking77"), Mix("sib200")), 16, Bucket(32, 16),
                         in_batch_negatives=False, num_negatives=3),
                    Task("sts", "sts", tuple(Mix(d.name) for d in sts), 32, Bucket(32, 32), weight=0.8),
                ),
                cosent_temperature=0.5,  # as in configs/demo.py: the pairs are few, and retrieval stays in charge
                hard_negatives=HardNegatives(rule="v2", num_negatives=1, pool_size=8),
                contrastive=Contrastive(temperature=0.05, false_negative_margin=None),
                matryoshka=Matryoshka(dims=(64, 128, 256)),
            ),
        ),
        evaluations=(
            *(Evaluation(f"retrieval_{lang}", "retrieval", f"{data}/retrieval/{lang}_dev", instruction=SEARCH, max_queries=500,
                         max_length=96, main=lang == "en") for lang in RETRIEVAL_LANGUAGES),
            Evaluation("clr", "retrieval", f"{data}/clr/dev", instruction=SEARCH, max_length=96),
            *(Evaluation(f"sts_{lang}", "sts", f"{data}/sts/stsb.{lang}.dev.jsonl.gz", max_length=64) for lang in STS_LANGUAGES),
            Evaluation("banking77", "classification", f"{data}/classification/banking77/test.jsonl.gz",
                       train_path=f"{data}/classification/banking77/train.jsonl.gz", instruction="Name the intent of the message",
                       max_length=64),
        ),
    )
    return run if variant == "full" else tiny(run)


def tiny(run: Run) -> Run:
    """Every stage for a few steps of a very small model, on the first records of each set."""
    model = dataclasses.replace(run.model, vocab_size=4000, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4)
    pretrain, sft, weak, supervised = run.stages
    tasks = tuple(dataclasses.replace(task, global_batch_size=8) for task in supervised.tasks)
    return dataclasses.replace(
        run, name="small_multilingual_tiny", output_dir="", data_dir="", model=model,
        tokenizer=dataclasses.replace(run.tokenizer, vocab_size=4000, max_training_bytes=300_000, character_coverage=0.98),
        datasets=tuple(dataclasses.replace(d, limit=300) for d in run.datasets),
        evaluations=tuple(dataclasses.replace(e, max_queries=30) for e in run.evaluations
                          if e.name in ("retrieval_en", "clr", "sts_en", "banking77")),
        stages=(
            dataclasses.replace(pretrain, steps=6, global_batch_size=8, sequence_length=64),
            dataclasses.replace(sft, steps=6, global_batch_size=8, sequence_length=64),
            dataclasses.replace(weak, steps=6, global_batch_size=8),
            dataclasses.replace(supervised, steps=6, tasks=tasks, matryoshka=Matryoshka(dims=(16, 32))),
        ),
    )
