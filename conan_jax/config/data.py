"""Datasets, how stages mix them, and what is held out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from conan_jax.config.checks import LARGEST_COUNT, check, check_values, one_of, path_name, positive, read_under


RecordKind = Literal["text", "sft", "pair", "retrieval", "sts", "labelled"]


@dataclass(frozen=True)
class Dataset:
    """Where records come from and what they are.

    `source` is a path or glob of jsonl(.gz), csv, tsv, parquet or txt files (`$NAME` is taken from the
    environment; several are joined by `;`), `tfds:NAME[/CONFIG]:SPLIT`, or `docstrings:PART`, the documentation of the
    installed packages. `fields` maps our field names to the source's columns when they are not among the accepted
    spellings; `title+body` joins the texts of several columns by a newline. `clean="html"` unescapes HTML entities
    and drops HTML tags in every text. `instruction` is the task in the query prompt.
    """

    name: str
    kind: RecordKind
    source: str
    fields: dict[str, str] = field(default_factory=dict)
    instruction: str = ""
    limit: int | None = None
    max_reject_rate: float = 0.01
    clean: Literal["html"] | None = None

    def __post_init__(self) -> None:
        check_values(self)
        path_name("dataset", self.name)
        check("." not in self.name, f"dataset name {self.name!r} may hold letters, digits, - and _ only")
        one_of("record kind", self.kind, get_args(RecordKind))
        check(0 <= self.max_reject_rate <= 1, f"{self.name}.max_reject_rate must lie in [0, 1], got {self.max_reject_rate}")
        check(self.limit is None or 0 < self.limit <= LARGEST_COUNT, f"{self.name}.limit must be positive or null, got {self.limit}")
        check(self.clean in (None, "html"), f"{self.name}.clean must be 'html' or null, got {self.clean!r}")
        read_under(self, "kind", self.kind, {"instruction": ([kind for kind in get_args(RecordKind) if kind != "text"], "")})


@dataclass(frozen=True)
class Mix:
    """One dataset of a mixture. `weight` is its share of the batches; None means by its number of records."""

    dataset: str
    weight: float | None = None

    def __post_init__(self) -> None:
        check_values(self)
        positive(self, "weight")


@dataclass(frozen=True)
class Bucket:
    """One compiled shape of a contrastive batch, in tokens: queries and passages are cut to these lengths."""

    query_length: int
    passage_length: int

    def __post_init__(self) -> None:
        check_values(self)
        positive(self, "query_length", "passage_length")


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
    in_batch_negatives: bool | None = None  # retrieval and classification; True by default
    num_negatives: int | None = None  # classification; 7 by default
    positives: Literal["label", "example"] | None = None  # classification; "label" by default

    def __post_init__(self) -> None:
        check_values(self)
        path_name("task", self.name)
        one_of("task kind", self.kind, ("retrieval", "classification", "sts"))
        check(bool(self.datasets), f"task {self.name!r} names no datasets")
        positive(self, "global_batch_size", "weight", "num_negatives")
        read_under(self, "kind", self.kind, {
            "in_batch_negatives": (("retrieval", "classification"), True),
            "num_negatives": (("classification",), 7),
            "positives": (("classification",), "label"),
        })


EvaluationKind = Literal["retrieval", "sts", "classification", "clustering", "bitext", "mkqa"]


@dataclass(frozen=True)
class Evaluation:
    """A held-out set, scored after every stage of a recipe, or by `conan eval`.

    `retrieval`: `path` is a BEIR folder (corpus.jsonl[.gz], queries.jsonl[.gz], qrels/SPLIT.tsv).
    `mkqa`: `path` is a folder of corpus.jsonl[.gz] and mkqa.jsonl[.gz] (see `eval.mkqa`).
    `sts`: `path` is a file of sentence1, sentence2, score. `bitext`: of sentence1, sentence2.
    `classification`: of text, label, with `train_path` its training file. `clustering`: of text, label.
    Records of a file may carry `lang`; each language is then a set of its own, and the figures are means over languages.

    Texts (queries of the two searches) are read after the prompt made of `instruction`, or after the encoder's prompt called
    `prompt_name`; with neither they are bare. `max_queries` bounds the queries of a BEIR folder, and the questions, pairs or test
    texts of each language elsewhere, evenly spaced; `languages` keeps those alone. Texts are cut to `max_length` tokens, or to what
    the model knows where that is less. `main=True` marks the set whose figures stand in summary.json.
    """

    name: str
    kind: EvaluationKind
    path: str
    train_path: str | None = None
    split: str | None = None  # retrieval: the qrels to read; "dev" by default
    instruction: str = ""
    prompt_name: str | None = None
    max_queries: int | None = None
    max_length: int = 256
    languages: tuple[str, ...] = ()
    main: bool = False

    def __post_init__(self) -> None:
        check_values(self)
        where = f"evaluation {self.name!r}"
        check(bool(self.name.strip()), "an evaluation has an empty name")
        kinds = get_args(EvaluationKind)
        check(self.kind in kinds, f"{where}: unknown kind {self.kind!r}; use one of {', '.join(kinds)}")
        read_under(self, "kind", self.kind, {"split": (("retrieval",), "dev")})
        check(self.kind != "classification" or self.train_path is not None, f"{where} needs train_path, the labelled texts to learn from")
        check(self.kind == "classification" or self.train_path is None, f"{where}: only classification has a train_path")
        check(not self.instruction or self.prompt_name is None, f"{where} has an instruction and a prompt_name; give one of them")
        positive(self, "max_queries", "max_length")
        check(self.max_length >= 2, f"{where}: max_length must be at least 2, a token and EOS; got {self.max_length}")
        check(len(set(self.languages)) == len(self.languages), f"{where}: languages repeats one of {', '.join(self.languages)}")
