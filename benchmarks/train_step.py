"""Time of a whole contrastive update against PyTorch: same architecture, same weights, same batch, step by step in turns.

    python benchmarks/train_step.py [--rounds N] [--json] [--check]          # needs pip install '.[torch]'

The update that `conan train` runs: InfoNCE over 32 pairs of 128 tokens, 4 layers x 256, 8 query and 2 key/value heads, FFN 768,
V 8192, float32, gradients clipped to norm 1, AdamW, as many threads as the machine has cores. Its mask is the soft one at alpha = 1,
traced as always. Against it, transformers' Llama without a causal mask (scaled dot-product attention), fused AdamW:

    eager                   a loop by hand, both towers in one call
    compiled                the same, model and loss under `torch.compile`
    sentence-transformers   its MultipleNegativesRankingLoss, which encodes one tower after the other

Before anything is timed, the loss of the first update must be the same on both sides to 1e-4, and after ten updates to 1e-2: what
is compared computes the same thing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import conan_jax  # sets the allocator before jax starts  # noqa: F401

import jax
import numpy as np

from conan_jax import config, sharding
from conan_jax.hf import architectures, weights
from conan_jax.model import Embedder
from conan_jax.stages import make_stage
from conan_jax.train import optimizer, state
from conan_jax.train.step import make_train_step

from timing import Figure, at_least, parser, plain, ratio, seconds, show

PAIRS, LENGTH, TEMPERATURE = 32, 128, 0.05
MODEL = config.Model(vocab_size=8192, hidden_size=256, intermediate_size=768, num_layers=4, num_heads=8, num_kv_heads=2, max_length=512,
                     compute_dtype="float32", scan_layers=False, remat="none")
OPTIMIZER = config.Optimizer(learning_rate=1e-4, schedule="constant", warmup_fraction=0.0, weight_decay=1e-3, b2=0.95)
STAGE = config.WeakStage(
    name="weak", steps=1_000_000, datasets=(config.Mix("pairs"),), global_batch_size=PAIRS, buckets=(config.Bucket(LENGTH, LENGTH),),
    soft_mask=config.SoftMask(steps=1), contrastive=config.Contrastive(temperature=TEMPERATURE, false_negative_margin=None),
    optimizer=OPTIMIZER)

Step = Callable[[], Any]


def batch_of(seed: int) -> dict[str, Any]:
    """A batch of the weak stage: random tokens, every row full."""
    rng = np.random.default_rng(seed)

    def texts() -> dict[str, np.ndarray]:
        return {"tokens": rng.integers(4, MODEL.vocab_size, (PAIRS, LENGTH), dtype=np.int32), "lengths": np.full(PAIRS, LENGTH, np.int32),
                "prompt_lengths": np.zeros(PAIRS, np.int32)}

    def hashes() -> np.ndarray:
        return rng.integers(0, 2**32, (PAIRS, 2), dtype=np.uint32)

    return {"ids": np.arange(PAIRS, dtype=np.int32), "query": texts(), "positive": texts(), "query_hash": hashes(),
            "positive_hash": hashes()}


class Ours:
    """The train step with its state. `params` are those it begins with."""

    def __init__(self, batch: dict[str, Any]) -> None:
        embedder = Embedder(MODEL)
        stage = make_stage(STAGE, embedder)
        updates = optimizer.make_optimizer(OPTIMIZER, STAGE.steps, embedder.axes())
        self._mesh = sharding.make_mesh(config.Mesh(data=1, fsdp=1, tensor=1))
        self._batch = batch
        with sharding.activate(self._mesh):
            abstract = state.abstract_state(embedder, stage, updates, {"": PAIRS}, self._mesh)
            params = state.scratch_params(embedder, abstract, seed=0)
            self.params = jax.device_get(params)
            first = state.begin(params, abstract, lambda p: state.fresh_state(p, stage, updates, {"": PAIRS}))
            self._state = first.replace(step=first.step + 1)  # alpha is 1 from the first step on
            self._step = make_train_step(stage, updates, optimizer.learning_rate_at(OPTIMIZER, STAGE.steps), 0, abstract)

    def __call__(self) -> Any:
        with sharding.activate(self._mesh):
            self._state, metrics = self._step(self._state, sharding.global_batch(self._batch, self._mesh))
        return metrics["loss"]


def torch_model(params: Any) -> Any:
    """transformers' Llama with the weights of `params`, attending in both directions."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    settings = architectures.to_hf_config(MODEL, "llama", is_causal=False)
    model = LlamaModel._from_config(LlamaConfig(**settings), attn_implementation="sdpa")
    tensors = weights.to_tensors(params, MODEL)
    model.load_state_dict({name: torch.from_numpy(np.array(tensors[name])) for name in tensors})
    return model.train()


def torch_step(params: Any, batch: dict[str, Any], variant: str) -> Step:
    """One update in PyTorch, as the docstring above names its three forms."""
    import torch

    model = torch_model(params)
    decays = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in name)]
    adam = torch.optim.AdamW([{"params": decays, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}],
                             lr=OPTIMIZER.learning_rate, betas=(OPTIMIZER.b1, OPTIMIZER.b2), eps=OPTIMIZER.eps, fused=True)
    towers = [torch.from_numpy(batch[side]["tokens"]).long() for side in ("query", "positive")]

    def embed(tokens: Any) -> Any:
        hidden = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).last_hidden_state
        return torch.nn.functional.normalize(hidden.mean(dim=1), dim=-1)

    def by_hand() -> Any:
        queries, positives = embed(torch.cat(towers)).split(PAIRS)
        scores = queries @ positives.T / TEMPERATURE
        return torch.nn.functional.cross_entropy(scores, torch.arange(PAIRS))

    loss = ranking_loss(embed, towers) if variant == "sentence-transformers" else by_hand
    if variant == "compiled":
        loss = torch.compile(loss)

    def step() -> Any:
        adam.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        adam.step()
        return np.float32(value.item())

    return step


def ranking_loss(embed: Callable, towers: list[Any]) -> Step:
    """sentence-transformers' loss on what it takes for a model: features in, features with an embedding out."""
    import torch
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    class Tower(torch.nn.Module):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            return {"sentence_embedding": embed(features["input_ids"])}

    loss = MultipleNegativesRankingLoss(Tower(), scale=1 / TEMPERATURE)
    return lambda: loss([{"input_ids": tokens} for tokens in towers], torch.arange(PAIRS))


def check_same(steps: dict[str, Step]) -> None:
    """Ends the program where the sides do not compute the same thing; also the updates that warm them up."""
    losses = {name: [float(step()) for _ in range(10)] for name, step in steps.items()}
    ours = losses["conan"]
    for name, theirs in losses.items():
        if abs(theirs[0] - ours[0]) > 1e-4 or abs(theirs[-1] - ours[-1]) > 1e-2:
            raise SystemExit(f"{name} computes something else: losses {theirs[0]:.6f} ... {theirs[-1]:.6f}, ours {ours[0]:.6f} ... {ours[-1]:.6f}")


def measure(rounds: int) -> Iterator[Figure]:
    """Ratios of time: above 1, conan's update is the faster one."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    batch = batch_of(0)
    ours = Ours(batch)
    others = {name: torch_step(ours.params, batch, name) for name in ("eager", "compiled", "sentence-transformers")}
    steps: dict[str, Step] = {"conan": ours, **others}
    check_same(steps)
    times = seconds(steps, rounds)
    for name in steps:
        yield plain(f"update, {name}, best", min(times[name]), "s")
    yield at_least(1.1, "time of torch eager over conan, median of rounds", ratio(times, "eager", "conan"), "x")
    yield at_least(1.05, "time of torch eager over conan, best over best", min(times["eager"]) / min(times["conan"]), "x")
    for name in ("compiled", "sentence-transformers"):
        yield plain(f"time of torch {name} over conan, median of rounds", ratio(times, name, "conan"), "x")


def main() -> None:
    arguments = parser(__doc__, rounds=30).parse_args()
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        sys.exit("this compares with PyTorch, which is not installed here: pip install '.[torch]'")
    sys.exit(show(measure(arguments.rounds), arguments.json) and arguments.check)


if __name__ == "__main__":
    main()
