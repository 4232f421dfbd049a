"""One recipe: everything above, together and consistent."""

from __future__ import annotations

from dataclasses import dataclass

from conan_jax.config.checks import check, check_new, check_values, distinct, path_name, positive
from conan_jax.config.data import Dataset, Evaluation
from conan_jax.config.model import Model, Tokenizer
from conan_jax.config.objectives import Matryoshka
from conan_jax.config.stages import AnyStage, LMStage, Stage, SupervisedStage, WeakStage
from conan_jax.config.training import Mesh
from conan_jax.errors import ConfigError

RESERVED_DATASETS = frozenset({"tokenizer", "tokenizers", "packed", "indexes", "docstrings"})  # folders of data_dir


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
    init_from: str | None = None  # RUN, RUN/STAGE or RUN/STAGE@STEP whose weights the first stage starts from; None: random ones
    data_dir: str = ""  # prepared data, shareable between runs; default OUTPUT_DIR/data
    watchdog_seconds: int = 1800  # a step, a compilation or a save that takes longer is taken for a hang

    def __post_init__(self) -> None:
        check_values(self)
        path_name("run", self.name)
        positive(self, "watchdog_seconds")
        check_new(0 <= self.seed < 2**32, f"seed must lie in [0, 2^32): random keys hold 32 bits of it; got {self.seed}")
        check(bool(self.stages), f"run {self.name!r} has no stages; give it at least one")
        object.__setattr__(self, "output_dir", self.output_dir or f"runs/{self.name}")
        object.__setattr__(self, "data_dir", self.data_dir or f"{self.output_dir}/data")
        for what, items in (("stage", self.stages), ("dataset", self.datasets), ("evaluation", self.evaluations)):
            distinct(what, [i.name for i in items])
        for dataset in self.datasets:
            path_name("dataset", dataset.name, RESERVED_DATASETS)
        for evaluation in self.evaluations:
            path_name("evaluation", evaluation.name)
        main = [e.name for e in self.evaluations if e.main]
        check_new(len(main) <= 1, f"the evaluations {' and '.join(map(repr, main))} are both main; the summary has one main set")
        known = {d.name for d in self.datasets}
        for owner, used in self._dataset_uses():
            check(used in known, f"{owner} uses dataset {used!r}, which the run does not define (known: {', '.join(sorted(known))})")
        check(self.init_from is None or self.init_from.strip() != "", "init_from names no folder; leave it null to start from scratch")
        check(self.tokenizer.path is not None or self.tokenizer.vocab_size <= self.model.vocab_size,
               f"tokenizer.vocab_size {self.tokenizer.vocab_size} is larger than model.vocab_size {self.model.vocab_size}")
        for stage in self.stages:
            for dim in getattr(stage, "matryoshka", Matryoshka()).dims:
                check(dim <= self.model.hidden_size,
                       f"{stage.name}.matryoshka.dims has {dim}, wider than model.hidden_size {self.model.hidden_size}")
            for length in self.lengths(stage):
                check(length <= self.model.max_length,
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
