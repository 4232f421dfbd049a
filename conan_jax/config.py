"""A whole recipe as frozen dataclasses: model, data, mesh, stages, evaluations.

No jax here: a launcher or a linter can read a configuration on a machine without it. A value
that contradicts another one raises `ConfigError` when the object is made, never at step 10,000.
Rendering, `--set` overrides and loading of `configs/*.py` live in `conan_jax.config_io`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from string import ascii_letters, digits
from typing import Any, Literal

from conan_jax.errors import ConfigError

RecordKind = Literal["text", "sft", "pair", "retrieval", "sts", "labelled"]


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _check(value > 0, f"{type(owner).__name__}.{name} must be positive, got {value}")


@dataclass(frozen=True)
class Model:
    """The decoder of METHODS 1.1. Defaults are the published Conan-Embedding-v2 sizes."""

    vocab_size: int = 151_040
    hidden_size: int = 3584
    intermediate_size: int = 8192
    num_layers: int = 8
    num_heads: int = 32
    num_kv_heads: int = 8
    max_length: int = 32_768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    qk_norm: bool = False
    initializer_range: float = 0.02
    embedding_initializer_range: float | None = None  # None: initializer_range
    embedding_multiplier: float = 1.0  # token embeddings x this enter the first block; logits use the bare table
    pooling: str = "mean"  # a key of POOLINGS, or "package.module:attr"
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # parameters are always float32
    scan_layers: bool = True  # one compiled layer body (TPU); False unrolls (17-20 % faster on CPU)
    remat: Literal["none", "dots", "full"] = "full"
    attention: Literal["auto", "dense", "blockwise", "pallas_tpu"] = "auto"
    attention_block_size: int = 512  # tokens a side, of "blockwise"; off a TPU, "auto" is dense up to one block

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                  "max_length", "rope_theta", "rms_norm_eps", "initializer_range", "embedding_multiplier", "attention_block_size")
        _check(self.embedding_initializer_range is None or self.embedding_initializer_range > 0,
               f"model.embedding_initializer_range must be positive or null, got {self.embedding_initializer_range}")
        _check(self.hidden_size % self.num_heads == 0,
               f"model.hidden_size {self.hidden_size} must be a multiple of model.num_heads {self.num_heads}")
        _check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even for RoPE; change model.num_heads")
        _check(self.num_heads % self.num_kv_heads == 0,
               f"model.num_heads {self.num_heads} must be a multiple of model.num_kv_heads {self.num_kv_heads}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head, `hidden_size / num_heads` (112 in the full model)."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Tokenizer:
    """SentencePiece BPE with byte fallback. `path` names a trained model; otherwise one is trained on `datasets`."""

    vocab_size: int = 151_000
    path: str | None = None
    datasets: tuple[str, ...] = ()
    character_coverage: float = 0.9999
    max_training_bytes: int = 2_000_000_000

    def __post_init__(self) -> None:
        _check(self.vocab_size >= 264, f"tokenizer.vocab_size must hold 256 bytes and the special ids, got {self.vocab_size}")
        _check(0.9 <= self.character_coverage <= 1, f"tokenizer.character_coverage must lie in [0.9, 1], got {self.character_coverage}")
        _positive(self, "max_training_bytes")


@dataclass(frozen=True)
class Dataset:
    """Where records come from and what they are.

    `source` is a path or glob of jsonl(.gz), csv, tsv, parquet or txt files (`$NAME` is taken from the
    environment; several are joined by `;`), `tfds:NAME[/CONFIG]:SPLIT`, or `docstrings:PART`, the documentation of the
    installed packages. `fields` maps our field names to the source's columns
    when they are not among the accepted spellings. `instruction` is the task in the query prompt.
    """

    name: str
    kind: RecordKind
    source: str
    fields: dict[str, str] = field(default_factory=dict)
    instruction: str = ""
    limit: int | None = None
    max_reject_rate: float = 0.01

    def __post_init__(self) -> None:
        _check(self.name.replace("_", "").replace("-", "").isalnum(), f"dataset name {self.name!r} may hold letters, digits, - and _ only")
        _check(0 <= self.max_reject_rate <= 1, f"{self.name}.max_reject_rate must lie in [0, 1], got {self.max_reject_rate}")
        _check(self.limit is None or self.limit > 0, f"{self.name}.limit must be positive or null, got {self.limit}")


@dataclass(frozen=True)
class Mesh:
    """Devices along each mesh axis; -1 takes all that remain (at most one axis may)."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        _check(all(s > 0 or s == -1 for s in sizes), f"mesh sizes must be positive or -1, got {sizes}")
        _check(sizes.count(-1) <= 1, f"only one mesh axis may be -1, got {sizes}")


@dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warmup and a decay to `final_fraction` of the peak (METHODS 1.2)."""

    learning_rate: float = 1e-4
    warmup_fraction: float = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_fraction: float = 0.1
    weight_decay: float = 1e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "eps", "max_grad_norm")
        for name in ("warmup_fraction", "final_fraction"):
            _check(0 <= getattr(self, name) <= 1, f"optimizer.{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("b1", "b2"):
            _check(0 <= getattr(self, name) < 1, f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")
        _check(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, got {self.weight_decay}")


@dataclass(frozen=True)
class SoftMask:
    """The causal -> bidirectional anneal of METHODS 1.3. `steps=None` means the whole stage."""

    apply: Literal["log", "multiply"] = "log"
    index: Literal["key", "query"] = "key"
    schedule: Literal["linear", "accelerate", "decelerate", "constant"] = "linear"
    steps: int | None = None

    def __post_init__(self) -> None:
        _check(self.steps is None or self.steps > 0, f"soft_mask.steps must be positive or null, got {self.steps}")


@dataclass(frozen=True)
class Contrastive:
    """InfoNCE over the global batch (METHODS 1.5).

    `false_negative_margin` drops a candidate that scores higher than the positive by more than this; None turns that
    test off. A candidate whose text is the positive's or the query's is dropped always: it is no negative.
    """

    temperature: float = 0.02
    false_negative_margin: float | None = 0.1
    query_query: bool = False
    passage_passage: bool = False
    symmetric: bool = False

    def __post_init__(self) -> None:
        _positive(self, "temperature")


@dataclass(frozen=True)
class HardNegatives:
    """Dynamic hard-negative mining (METHODS 1.4): slots per query, candidates carried per query, the rule.

    v2 replaces one slot when `s0 < low_score`, or when `drop_ratio * s < s0 and s < ceiling`. v1 swaps all slots
    every `every` steps when, on the sample's means, `drop_ratio * s < s0 and |s| < ceiling`.
    `None` takes the published constant of the rule (v2: 1.2, 0.7; v1: 1.15, 0.8).
    """

    rule: Literal["v2", "v1", "off"] = "v2"
    num_negatives: int = 7
    pool_size: int = 32
    skip_top: int | None = None  # None: 10 under v1, 0 under v2
    low_score: float = 0.4
    drop_ratio: float | None = None
    ceiling: float | None = None
    every: int = 100

    def __post_init__(self) -> None:
        _positive(self, "num_negatives", "pool_size", "every")
        _check(self.pool_size >= self.num_negatives,
               f"hard_negatives.pool_size {self.pool_size} must be at least num_negatives {self.num_negatives}")
        _check(self.skip_top is None or self.skip_top >= 0, f"hard_negatives.skip_top must not be negative, got {self.skip_top}")


@dataclass(frozen=True)
class Matryoshka:
    """MRL: the wrapped loss on the first `dims` coordinates, re-normalised. Empty `dims`: the full width only."""

    dims: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()  # empty: equal weights

    def __post_init__(self) -> None:
        dims, weights = self.dims, self.weights
        _check(all(d > 0 for d in dims) and len(set(dims)) == len(dims), f"matryoshka.dims must be positive and distinct, got {dims}")
        _check(not weights or len(weights) == len(dims), f"matryoshka.weights {weights} needs one weight for each of dims {dims}")
        _check(not weights or (min(weights) >= 0 and sum(weights) > 0),
               f"matryoshka.weights must be non-negative with a positive sum, got {weights}")


@dataclass(frozen=True)
class Bucket:
    """One compiled shape of a contrastive batch, in tokens: queries and passages are cut to these lengths."""

    query_length: int
    passage_length: int

    def __post_init__(self) -> None:
        _positive(self, "query_length", "passage_length")


@dataclass(frozen=True)
class Mix:
    """One dataset of a mixture. `weight` is its share of the batches; None means by its number of records."""

    dataset: str
    weight: float | None = None

    def __post_init__(self) -> None:
        _check(self.weight is None or self.weight > 0, f"the weight of {self.dataset} must be positive or null, got {self.weight}")


@dataclass(frozen=True)
class Task:
    """One sub-batch of the supervised stage.

    `retrieval`: query, positive and a candidate pool (CLR is the same with queries in another language).
    `classification`: a text, its label text (or another example of its class) and `num_negatives` of other labels.
    `sts`: two sentences and a graded score.
    """

    name: str
    kind: Literal["retrieval", "classification", "sts"]
    datasets: tuple[Mix, ...]
    global_batch_size: int
    bucket: Bucket
    weight: float = 1.0
    in_batch_negatives: bool = True  # used by retrieval and classification
    num_negatives: int = 7  # used by classification
    positives: Literal["label", "example"] = "label"  # used by classification

    def __post_init__(self) -> None:
        _check(bool(self.datasets), f"task {self.name!r} names no datasets")
        _positive(self, "global_batch_size", "weight", "num_negatives")


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
        _positive(self, "steps", "checkpoint_every", "keep_checkpoints", "log_every")


@dataclass(frozen=True, kw_only=True)
class LMStage(Stage):
    """Next-token training on packed rows: `pretrain` on all tokens, `sft` on output tokens (METHODS 1.2)."""

    kind: Literal["pretrain", "sft"]
    datasets: tuple[Mix, ...]
    global_batch_size: int = 256
    sequence_length: int = 4096
    loss_chunk_size: int = 512  # tokens a device whose logits exist at one time
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(bool(self.datasets), f"stage {self.name!r} names no datasets")
        _positive(self, "global_batch_size", "sequence_length", "loss_chunk_size")
        _check(self.z_loss >= 0, f"{self.name}.z_loss must not be negative, got {self.z_loss}")


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

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(bool(self.datasets), f"stage {self.name!r} names no datasets")
        _check(bool(self.buckets), f"stage {self.name!r} names no buckets")
        _positive(self, "global_batch_size")


@dataclass(frozen=True, kw_only=True)
class SupervisedStage(Stage):
    """Supervised contrastive training: every update holds every task, hard negatives move (METHODS 1.2, 1.4, 1.5)."""

    kind: Literal["supervised"] = "supervised"
    tasks: tuple[Task, ...]
    update: Literal["all_tasks", "one_task"] = "all_tasks"
    hard_negatives: HardNegatives = HardNegatives()
    contrastive: Contrastive = Contrastive(false_negative_margin=None)
    cosent_temperature: float = 0.05
    matryoshka: Matryoshka = Matryoshka()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(bool(self.tasks), f"stage {self.name!r} names no tasks")
        names = [t.name for t in self.tasks]
        _check(len(set(names)) == len(names), f"stage {self.name!r} names a task twice: {names}")
        _positive(self, "cosent_temperature")


@dataclass(frozen=True, kw_only=True)
class CustomStage(Stage):
    """A stage from outside the package: `kind="package.module:attr"`, with its own `options`."""

    datasets: tuple[Mix, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(":" in self.kind, f'stage kind {self.kind!r} must be "package.module:attr"')


AnyStage = LMStage | WeakStage | SupervisedStage | CustomStage


@dataclass(frozen=True)
class Evaluation:
    """A held-out set, scored after every stage.

    `retrieval`: `path` is a BEIR folder (corpus.jsonl[.gz], queries.jsonl[.gz], qrels/SPLIT.tsv).
    `sts`: `path` is a file of sentence1, sentence2, score. `classification`: `path` is a test file of text,
    label and `train_path` its training file. `main=True` marks the set whose figures stand in summary.json.
    """

    name: str
    kind: Literal["retrieval", "sts", "classification"]
    path: str
    train_path: str | None = None
    split: str = "dev"
    instruction: str = ""
    max_queries: int | None = None
    max_length: int = 256
    main: bool = False


@dataclass(frozen=True)
class Run:
    """One recipe: datasets, a tokenizer, a model, stages in order, evaluations after each."""

    name: str
    stages: tuple[AnyStage, ...]
    datasets: tuple[Dataset, ...]
    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    mesh: Mesh = Mesh()
    evaluations: tuple[Evaluation, ...] = ()
    seed: int = 0
    output_dir: str = ""  # default runs/NAME
    data_dir: str = ""  # prepared data, shareable between runs; default OUTPUT_DIR/data

    def __post_init__(self) -> None:
        _check(bool(self.name) and set(self.name) <= set(f"{ascii_letters}{digits}_-.") and self.name.strip(".") != "",
               f"name {self.name!r} may hold letters, digits, '-', '_' and '.' only: it names the folder runs/NAME")
        object.__setattr__(self, "output_dir", self.output_dir or f"runs/{self.name}")
        object.__setattr__(self, "data_dir", self.data_dir or f"{self.output_dir}/data")
        for what, items in (("stage", self.stages), ("dataset", self.datasets), ("evaluation", self.evaluations)):
            names = [i.name for i in items]
            _check(len(set(names)) == len(names), f"a {what} name occurs twice: {names}")
        known = {d.name for d in self.datasets}
        for owner, used in self._dataset_uses():
            _check(used in known, f"{owner} uses dataset {used!r}, which the run does not define (known: {', '.join(sorted(known))})")
        _check(self.tokenizer.vocab_size <= self.model.vocab_size,
               f"tokenizer.vocab_size {self.tokenizer.vocab_size} is larger than model.vocab_size {self.model.vocab_size}")
        for stage in self.stages:
            for dim in getattr(stage, "matryoshka", Matryoshka()).dims:
                _check(dim <= self.model.hidden_size,
                       f"{stage.name}.matryoshka.dims has {dim}, wider than model.hidden_size {self.model.hidden_size}")
            for length in self.lengths(stage):
                _check(length <= self.model.max_length,
                       f"{stage.name} trains on length {length}, beyond model.max_length {self.model.max_length}")

    def _dataset_uses(self) -> list[tuple[str, str]]:
        uses = [("tokenizer", name) for name in self.tokenizer.datasets]
        for stage in self.stages:
            mixes = stage.datasets if not isinstance(stage, SupervisedStage) else sum((t.datasets for t in stage.tasks), ())
            uses += [(f"stage {stage.name!r}", mix.dataset) for mix in mixes]
        return uses

    @staticmethod
    def lengths(stage: Stage) -> list[int]:
        """Row lengths, in tokens, that `stage` trains on."""
        if isinstance(stage, LMStage):
            return [stage.sequence_length]
        buckets = stage.buckets if isinstance(stage, WeakStage) else [t.bucket for t in getattr(stage, "tasks", ())]
        return [n for b in buckets for n in (b.query_length, b.passage_length)]

    def stage(self, name: str) -> AnyStage:
        """The stage called `name`; raises `ConfigError` with the known names otherwise."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"no stage {name!r} in run {self.name!r}; it has {', '.join(s.name for s in self.stages)}")

    def dataset(self, name: str) -> Dataset:
        """The dataset called `name`; raises `ConfigError` with the known names otherwise."""
        for dataset in self.datasets:
            if dataset.name == name:
                return dataset
        raise ConfigError(f"no dataset {name!r} in run {self.name!r}; it has {', '.join(d.name for d in self.datasets)}")
