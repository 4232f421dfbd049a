"""The four kinds of stage, and stages from outside the package."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from conan_jax.config.checks import check, check_new, check_values, distinct, path_name, positive, read_under
from conan_jax.config.data import Bucket, Mix, Task
from conan_jax.config.objectives import Contrastive, HardNegatives, Matryoshka, SoftMask
from conan_jax.config.training import Optimizer
from conan_jax.errors import ConfigError

# What else lies in the folder of a run, and the fields of a run, which `--set` reads before the names of stages.
RESERVED = frozenset({
    "data", "untrained", "initial", "bm25", "prepare", "evaluate", "eval", "index", "export", "checkpoints", "tensorboard",
    "config.json", "summary.json", "timings.json", "report.html", "searches.json", "prepared.json", "import.json", "merge.json",
    "evaluation.json", "evaluation_details.json", "diagnostics.json", "metrics.jsonl", "launch.json",
    "name", "stages", "datasets", "model", "tokenizer", "mesh", "evaluations", "seed", "output_dir", "init_from", "data_dir",
    "watchdog_seconds",
})


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What every stage has. `kind` is a key of STAGES or "package.module:attr"."""

    name: str
    kind: str
    steps: int
    optimizer: Optimizer = Optimizer()
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        check_values(self)
        path_name("stage", self.name, RESERVED)
        positive(self, "steps", "checkpoint_every", "keep_checkpoints", "log_every")


@dataclass(frozen=True, kw_only=True)
class LMStage(Stage):
    """Next-token training on packed rows: `pretrain` on all tokens, `sft` on output tokens (METHODS 1.2)."""

    kind: Literal["pretrain", "sft"]
    datasets: tuple[Mix, ...]
    global_batch_size: int = 256
    sequence_length: int = 4096
    gradient_accumulation_steps: int = 1  # micro-batches of an update; activations of one exist at a time
    loss_chunk_size: int = 512  # tokens a device whose logits exist at one time
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.datasets), f"stage {self.name!r} names no datasets")
        positive(self, "global_batch_size", "sequence_length", "gradient_accumulation_steps", "loss_chunk_size")
        check(self.global_batch_size % self.gradient_accumulation_steps == 0,
              f"{self.name}.gradient_accumulation_steps {self.gradient_accumulation_steps} must divide "
              f"{self.name}.global_batch_size {self.global_batch_size}")
        check(self.z_loss >= 0, f"{self.name}.z_loss must not be negative, got {self.z_loss}")


@dataclass(frozen=True, kw_only=True)
class WeakStage(Stage):
    """Weakly supervised contrastive training on pairs under the soft mask (METHODS 1.2, 1.3, 1.5)."""

    kind: Literal["weak"] = "weak"
    datasets: tuple[Mix, ...]
    global_batch_size: int = 1024
    buckets: tuple[Bucket, ...] = (Bucket(512, 512),)
    soft_mask: SoftMask = SoftMask()
    contrastive: Contrastive = Contrastive()
    matryoshka: Matryoshka = Matryoshka()
    encode_chunk_size: int | None = None  # texts a device whose activations exist at one time; None: all of a call at once

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.datasets), f"stage {self.name!r} names no datasets")
        check(bool(self.buckets), f"stage {self.name!r} names no buckets")
        positive(self, "global_batch_size", "encode_chunk_size")


@dataclass(frozen=True, kw_only=True)
class SupervisedStage(Stage):
    """Supervised contrastive training: every update holds every task, hard negatives move (METHODS 1.2, 1.4, 1.5)."""

    kind: Literal["supervised"] = "supervised"
    tasks: tuple[Task, ...]
    update: Literal["all_tasks", "one_task"] = "all_tasks"
    hard_negatives: HardNegatives = HardNegatives()
    contrastive: Contrastive = Contrastive(false_negative_margin=None)
    cosent_temperature: float | None = None  # of sts tasks; 0.05 by default
    matryoshka: Matryoshka = Matryoshka()
    encode_chunk_size: int | None = None  # texts a device whose activations exist at one time; None: all of a call at once

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.tasks), f"stage {self.name!r} names no tasks")
        distinct("task", [t.name for t in self.tasks])
        positive(self, "cosent_temperature", "encode_chunk_size")
        read_under(self, "sts tasks", any(t.kind == "sts" for t in self.tasks), {"cosent_temperature": ((True,), 0.05)})
        self._check_objectives()

    def _check_objectives(self) -> None:
        """Objectives that no task has are not set."""
        contrastive = [t for t in self.tasks if t.kind != "sts"]
        for name, read in (("hard_negatives", any(t.kind == "retrieval" for t in self.tasks)), ("contrastive", bool(contrastive))):
            default = SupervisedStage.__dataclass_fields__[name].default
            if not read and getattr(self, name) != default:
                check_new(False, f"{self.name}.{name} is set, and no task of the stage reads it; remove it")
                object.__setattr__(self, name, default)
        if contrastive and not any(t.in_batch_negatives for t in contrastive):
            for name in ("query_query", "passage_passage", "symmetric"):
                check_new(not getattr(self.contrastive, name), f"{self.name}.contrastive.{name} compares the examples of a batch with each "
                          "other, and no task of the stage has in_batch_negatives; remove it, or set in_batch_negatives")


@dataclass(frozen=True, kw_only=True)
class CustomStage(Stage):
    """A stage from outside the package: `kind="package.module:attr"`, with its own `options`."""

    datasets: tuple[Mix, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(":" in self.kind, f'stage kind {self.kind!r} must be "package.module:attr"')
        try:
            json.dumps(self.options, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{self.name}.options cannot be saved as JSON: {error}") from None


AnyStage = LMStage | WeakStage | SupervisedStage | CustomStage
