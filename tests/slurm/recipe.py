"""One short stage on a text made here: what a scheduler's test trains."""

from conan_jax.config import Dataset, LMStage, Mix, Model, Optimizer, Run, Tokenizer


def get_config(variant: str = "full") -> Run:
    """Steps enough to be interrupted in their midst."""
    return Run(
        name="slurm", datasets=(Dataset("text", "text", "$CONAN_TEXT"),),
        tokenizer=Tokenizer(vocab_size=300, datasets=("text",)),
        model=Model(vocab_size=300, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, max_length=64,
                    compute_dtype="float32", remat="none"),
        stages=(LMStage(name="pretrain", kind="pretrain", datasets=(Mix("text"),), optimizer=Optimizer(learning_rate=1e-3), steps=400,
                        global_batch_size=4, sequence_length=32, loss_chunk_size=64, checkpoint_every=1000, log_every=5),),
    )
