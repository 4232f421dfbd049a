"""A linear model behind the real contracts: an embedder, a stage that carries state, a pipeline. Compiles in a moment."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from conan_jax import config

WIDTH, EXAMPLES, BATCH = 16, 64, 8


class ToyEmbedder:
    """Parameters with the axes of the real ones: a matrix, an embedding table, a norm."""

    def init(self, key):
        return {"map": jax.random.normal(key, (WIDTH, WIDTH)), "table": jax.random.normal(jax.random.fold_in(key, 1), (32, WIDTH)),
                "norm": jnp.ones((WIDTH,))}

    def axes(self):
        return {"map": ("embed", "mlp"), "table": ("vocab", "embed"), "norm": ("norm",)}


class ToyStage:
    """Least squares with noise; remembers the last error of each example. `traces` counts how often it is traced."""

    def __init__(self, poison=lambda step: False):
        self.traces, self.poison = 0, poison

    def loss(self, params, carry, batch, step, rng):
        self.traces += 1
        alpha = step / 100.0
        x = params["table"][batch["tokens"][:, 0]] * params["norm"] + 0.1 * jax.random.normal(rng, (WIDTH,))
        error = jnp.sum((x @ params["map"] - alpha) ** 2, axis=1)
        loss = jnp.mean(error)
        loss = jnp.where(self.poison(step), jnp.nan, loss)
        carry = {"error": carry["error"].at[batch["ids"]].set(jax.lax.stop_gradient(error)), "seen": carry["seen"] + 1}
        return loss, (carry, {"tokens": jnp.float32(batch["tokens"].size), "alpha": alpha})

    def init_carry(self, num_examples):
        return {"error": jnp.full((num_examples[""],), jnp.nan, jnp.float32), "seen": jnp.zeros((), jnp.int32)}

    def carry_axes(self, carry):
        return {"error": ("examples",), "seen": ()}

    def mask(self, step):
        return None

    def describe(self):
        return {"global batch": BATCH, "tokens per step": BATCH}


class ToyPipeline:
    """The batch at step t is a pure function of t."""

    num_examples = {"": EXAMPLES}

    def batch(self, step):
        rng = np.random.default_rng(step)
        return {"ids": rng.permutation(EXAMPLES)[:BATCH].astype(np.int32), "tokens": rng.integers(0, 32, (BATCH, 1), dtype=np.int32)}

    def datasets_of(self, batch):
        return {}

    def iterate(self, start):
        step = start
        while True:
            yield self.batch(step)
            step += 1


def toy_run(steps=12, **stage):
    """A recipe whose only stage is the toy; the model's sizes are irrelevant to it."""
    stage = {"checkpoint_every": 4, "log_every": 1, "optimizer": config.Optimizer(learning_rate=1e-2)} | stage
    model = config.Model(vocab_size=512, hidden_size=16, num_heads=2, num_kv_heads=1)
    return config.Run(name="toy", datasets=(), model=model, tokenizer=config.Tokenizer(vocab_size=300), stages=(
        config.CustomStage(name="toy", kind="toy_stage:ToyStage", steps=steps, **stage),
    ))
