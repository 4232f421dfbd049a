"""All four stages in a few seconds: what several processes are tried with. Its data lies where CONAN_TEST_DATA says."""

from conan_jax.config import (
    Bucket, Dataset, HardNegatives, LMStage, Matryoshka, Mesh, Mix, Model, Optimizer, Run, SupervisedStage, Task, Tokenizer, WeakStage,
)

STEPS = {"pretrain": 4, "sft": 4, "weak": 4, "supervised": 30}


def get_config(variant: str) -> Run:
    """`variant` has no meaning here."""
    adam = Optimizer(learning_rate=1e-2)

    def common(name: str) -> dict:
        return {"name": name, "steps": STEPS[name], "optimizer": adam, "checkpoint_every": 5, "keep_checkpoints": 2, "log_every": 1}

    rows = {"global_batch_size": 8, "sequence_length": 16, "loss_chunk_size": 16}
    return Run(
        name="together", output_dir="$replaced", data_dir="$replaced", mesh=Mesh(data=1, fsdp=-1),
        datasets=(
            Dataset("texts", "text", "$CONAN_TEST_DATA/texts.jsonl"), Dataset("answers", "sft", "$CONAN_TEST_DATA/answers.jsonl"),
            Dataset("pairs", "pair", "$CONAN_TEST_DATA/pairs.jsonl"), Dataset("search", "retrieval", "$CONAN_TEST_DATA/search.jsonl"),
        ),
        tokenizer=Tokenizer(vocab_size=320, datasets=("texts",)),
        model=Model(vocab_size=384, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, max_length=32,
                    compute_dtype="float32", scan_layers=False, remat="none"),
        stages=(
            LMStage(kind="pretrain", datasets=(Mix("texts"),), **rows, **common("pretrain")),
            LMStage(kind="sft", datasets=(Mix("answers"),), **rows, **common("sft")),
            WeakStage(datasets=(Mix("pairs"),), global_batch_size=8, buckets=(Bucket(12, 12),), **common("weak")),
            SupervisedStage(
                tasks=(Task("retrieval", "retrieval", (Mix("search"),), 8, Bucket(12, 12)),), matryoshka=Matryoshka(dims=(8, 16)),
                hard_negatives=HardNegatives(num_negatives=1, pool_size=3), **common("supervised"),
            ),
        ),
    )
