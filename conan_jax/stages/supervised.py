"""`supervised`: every update holds every task, and hard negatives move as the model learns (METHODS 1.2, 1.4, 1.5).

    L = sum over tasks of weight * loss,    InfoNCE for retrieval and classification, CoSENT for sts, MRL around each.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from conan_jax import sharding
from conan_jax.config import SupervisedStage, Task
from conan_jax.losses import cosent, info_nce, matryoshka
from conan_jax.model import Bidirectional, Embedder
from conan_jax.stages import hard_negatives
from conan_jax.stages.base import Batch, Carry, Metrics, Params
from conan_jax.stages.encode import count_tokens, describe_chunks, dropout, encode_all, nonempty
from conan_jax.stages.weak import contrastive_options

Texts = dict[str, Mapping[str, Any]]


class Supervised:
    """The tasks of the stage together in one update, or one of them in turn (`update="one_task"`).

    The carry is {task: hard-negative state} for the retrieval tasks; each task numbers its own examples.
    """

    def __init__(self, config: SupervisedStage, embedder: Embedder) -> None:
        self.config, self.embedder = config, embedder
        self._retrieval = [task.name for task in config.tasks if task.kind == "retrieval"]

    def loss(self, params: Params, carry: Carry, batch: Batch, step: Any, rng: Any) -> tuple[Any, tuple[Carry, Metrics]]:
        """As `stages.base.Stage.loss`.

        Metrics: `loss`, `tokens` (encoded texts), for each task T `loss/T` (unweighted) and its loss's metrics `.../T`,
        for retrieval `hard_negative_score/T`, and the totals `replaced_low`, `replaced_drop`, `exhausted` over all tasks.
        Under `one_task` the metrics of tasks that did not run are NaN.
        """
        tasks = self.config.tasks
        if self.config.update == "all_tasks":
            loss, carry, metrics = self._update(tasks, params, carry, batch, step, rng)
        else:
            run = [partial(self._update, (task,)) for task in tasks]
            shapes = [jax.eval_shape(one, params, carry, batch, step, rng)[2] for one in run]
            absent = {name: jnp.full((), jnp.nan, jnp.float32) for metrics in shapes for name in metrics}

            def branch(one, *arguments):
                loss, carry, metrics = one(*arguments)
                return loss, carry, {**absent, **metrics}

            loss, carry, metrics = jax.lax.switch(step % len(tasks), [partial(branch, one) for one in run], params, carry, batch, step, rng)
        return loss, (carry, {**metrics, **self._counters(carry), "loss": loss})

    def _update(
        self, tasks: tuple[Task, ...], params: Params, carry: Carry, batch: Batch, step: Any, rng: Any
    ) -> tuple[Any, Carry, Metrics]:
        """Weighted loss of `tasks`, the carry with their hard negatives moved, their metrics."""
        prepared = {task.name: self._texts(task, carry, batch[task.name]) for task in tasks}
        texts = {(task, name): text for task, (of_task, _) in prepared.items() for name, text in of_task.items()}
        encoded = encode_all(self.embedder, params, texts, self.mask(step), chunk_size=self.config.encode_chunk_size,
                             rng=dropout(self.embedder, rng))
        total, carry, metrics = jnp.zeros((), jnp.float32), dict(carry), {"tokens": count_tokens(texts)}
        for task in tasks:
            of_task, extra = prepared[task.name]
            vectors = {name: encoded[task.name, name] for name in of_task}
            objective = self._objective(task, batch[task.name], of_task, extra)
            loss, found = matryoshka(objective, vectors, self.config.matryoshka.dims, self.config.matryoshka.weights)
            total += task.weight * loss
            if task.kind == "retrieval":
                filled = extra["negative_mask"]
                carry[task.name], found["hard_negative_score"] = self._move(carry[task.name], batch[task.name], vectors, filled, step)
            metrics |= {f"{name}/{task.name}": value for name, value in {**found, "loss": loss}.items()}
        return total, carry, metrics

    def _texts(self, task: Task, carry: Carry, batch: Batch) -> tuple[Texts, dict[str, Any]]:
        """What `task` encodes, named as its loss names the vectors, and what the loss must know of its negatives."""
        if task.kind == "sts":
            return {"first": batch["sentence1"], "second": batch["sentence2"]}, {}
        texts = {"queries": batch["query"], "positives": batch["positive"]}
        if task.kind == "classification":
            return {**texts, "negatives": batch["negatives"]}, {"negative_mask": batch["negative_mask"]}
        slots, filled = hard_negatives.active(carry[task.name], batch["ids"], batch["pool_size"], self.config.hard_negatives)
        hashes = jnp.take_along_axis(batch["pool_hash"], slots[..., None], axis=1, mode="clip")
        negatives = hard_negatives.gather(batch["pool"], slots, filled)
        return {**texts, "negatives": negatives}, {"negative_mask": filled, "negative_hash": hashes}

    def _objective(self, task: Task, batch: Batch, texts: Texts, extra: dict[str, Any]) -> Any:
        """The loss of `task` as a function of its vectors alone."""
        if task.kind == "sts":
            return partial(cosent, scores=batch["score"], temperature=self.config.cosent_temperature, valid=nonempty(*texts.values()))
        return partial(info_nce, **contrastive_options(self.config.contrastive), in_batch_negatives=task.in_batch_negatives,
                       query_hash=batch["query_hash"], positive_hash=batch["positive_hash"],
                       valid=nonempty(batch["query"], batch["positive"]), **extra)

    def _move(
        self, state: hard_negatives.State, batch: Batch, vectors: dict[str, Any], filled: Any, step: Any
    ) -> tuple[hard_negatives.State, Any]:
        """The hard-negative state after this visit, and the mean score of the active candidates. No gradient flows here."""
        scores = jax.lax.stop_gradient(jnp.einsum("bd,bsd->bs", vectors["queries"], vectors["negatives"]))
        state = hard_negatives.update(state, batch["ids"], scores, batch["pool_size"], step, self.config.hard_negatives)
        return state, jnp.sum(scores * filled) / jnp.maximum(jnp.sum(filled), 1.0)

    def _counters(self, carry: Carry) -> Metrics:
        states = [state for state in carry.values() if state]
        return {name: sum(state[name] for state in states).astype(jnp.float32) for name in hard_negatives.COUNTERS if states}

    def init_carry(self, num_examples: Mapping[str, int]) -> Carry:
        """A hard-negative state for each retrieval task."""
        return {task: hard_negatives.initial_state(num_examples[task], self.config.hard_negatives) for task in self._retrieval}

    def carry_axes(self, carry: Carry) -> Any:
        """States are split by example; their totals are whole everywhere."""
        return {task: {name: hard_negatives.AXES[name] for name in state} for task, state in carry.items()}

    def mask(self, step: Any) -> Bidirectional:
        """Always bidirectional."""
        return Bidirectional()

    def describe(self) -> dict[str, str | int | float]:
        """Sub-batches, negatives and the replacement rule; what a device does under the current mesh."""
        c = self.config
        examples = [task.global_batch_size for task in c.tasks]
        texts = [task.global_batch_size * (2 + self._own_negatives(task)) for task in c.tasks]
        together = sum if c.update == "all_tasks" else max
        facts: dict[str, str | int | float] = {
            "update": "all tasks together" if c.update == "all_tasks" else "one task in turn",
            "global batch": f"{together(examples):,} examples, {together(texts):,} texts",
            "batch per device": f"{sharding.rows_per_device(together(texts)):,} texts, {describe_chunks(c.encode_chunk_size)}",
        }
        for task in c.tasks:
            facts[f"sub-batch {task.name}"] = f"{task.global_batch_size:,} {task.kind}, weight {task.weight:g}, {self._negatives(task)}"
        sizes = [task.global_batch_size * self._tokens_an_example(task) for task in c.tasks]
        facts["tokens per step"] = f"at most {together(sizes):,}"
        if self._retrieval:
            hard = c.hard_negatives
            facts["hard negatives"] = f"{hard.num_negatives} of a pool of {hard.pool_size}, rule {hard.rule}"
        sts = "" if c.cosent_temperature is None else f", {c.cosent_temperature:g} CoSENT"
        facts["temperature"] = f"{c.contrastive.temperature:g} InfoNCE{sts}"
        if c.matryoshka.dims:
            facts["matryoshka dims"] = ", ".join(map(str, c.matryoshka.dims))
        return facts

    def _own_negatives(self, task: Task) -> int:
        return {"retrieval": self.config.hard_negatives.num_negatives, "classification": task.num_negatives, "sts": 0}[task.kind]

    def _negatives(self, task: Task) -> str:
        own = self._own_negatives(task)
        if task.kind == "sts":
            return "ranked in batch"
        if not task.in_batch_negatives:
            return f"{own} negatives per query"
        return f"{task.global_batch_size * (1 + own) - 1:,} negatives per query ({own} its own)"

    def _tokens_an_example(self, task: Task) -> int:
        return task.bucket.query_length + task.bucket.passage_length * (1 + self._own_negatives(task))
