"""The column names people already have for each record kind, as one table."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

from conan_jax.config import RecordKind


class Join(tuple[str, ...]):
    """Columns whose non-blank texts are joined by a newline; the first must be there."""

    def __str__(self) -> str:
        return f"{self[0]}[/{'/'.join(self[1:])}]"


class Turns(NamedTuple):
    """The texts of `messages[start:stop]` of a chat ({role, content} each), joined by newlines. The last message is of the assistant."""

    start: int | None
    stop: int | None

    def __str__(self) -> str:
        return "messages"


class Items(NamedTuple):
    """The texts of `set[start:stop]`, a list of texts that mean the same."""

    start: int
    stop: int | None

    def __str__(self) -> str:
        return "set"


Column = str | Join | Turns | Items


@dataclass(frozen=True, eq=False)
class Dialect:
    """One set of column names. `optional` lists alternatives, the first present one counts; `negative*` means
    `negative`, `negative_1`, `negative_2`, ... in that order. A record with a column of `unless` is not of this dialect.
    A record with a label (`LABELS`) that is none of `positive` is no pair. The columns of a `whole` dialect are parts of
    one value: it is not used where the user maps one of its fields."""

    name: str
    required: dict[str, Column]
    optional: dict[str, tuple[Column, ...]] = field(default_factory=dict)
    unless: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    whole: bool = False


def _pairs(name: str, query: Column, pos: str, neg: tuple[str, ...] = (), instruction: tuple[str, ...] = (),
           positive: tuple[str, ...] = ()) -> Dialect:
    return Dialect(name, {"query": query, "pos": pos},
                   {"neg": neg, "scores": ("scores", "neg_scores") if neg else (), "instruction": instruction}, positive=positive)


_PROMPT = ("instruction", "prompt")
_RETRIEVAL = (
    _pairs("query-pos", "query", "pos", ("neg",), _PROMPT),
    _pairs("tevatron", "query", "positive_passages", ("negative_passages",), _PROMPT),
    _pairs("e5", "query", "positive", ("negative*", "negatives"), _PROMPT),
    _pairs("query-positives", "query", "positives", ("negatives",), _PROMPT),
    _pairs("query-passage", "query", "passage"),
    _pairs("query-document", "query", "document"),
    _pairs("query-answer", "query", "answer"),
    _pairs("sentence-transformers", "anchor", "positive", ("negative*",)),
    _pairs("simcse", "sent0", "sent1", ("hard_neg",)),
    _pairs("tevatron-text", "query_text", "positive_passages", ("negative_passages",), _PROMPT),
    _pairs("tevatron-documents", "query_text", "positive_documents", ("negative_documents",), _PROMPT),
    _pairs("nli-triplet", "premise", "entailment", ("contradiction",)),
    _pairs("nli", "premise", "hypothesis", positive=("entailment", "0")),  # 0 is entailment in SNLI, MultiNLI, XNLI, ANLI, CB and RTE
    Dialect("set", {"query": Items(0, 1), "pos": Items(1, None)}, whole=True),
)
_PAIR_ONLY = (
    Dialect("messages", {"query": Turns(None, -1), "pos": Turns(-1, None)}, whole=True),
    _pairs("question-answer", "question", "answer"),
    _pairs("question-context", "question", "context"),
    _pairs("alpaca", Join(("instruction", "input")), "output"),
    _pairs("dolly", Join(("instruction", "context")), "response"),
    _pairs("prompt-completion", "prompt", "completion"),
    _pairs("prompt-response", "prompt", "response"),
    _pairs("title-text", "title", "text"),
    _pairs("title-body", "title", "body"),
    _pairs("title-abstract", "title", "abstract"),
    _pairs("title-content", "title", "content"),
    Dialect("bitext", {"query": "sentence1", "pos": "sentence2"},  # graded or labelled: not positives
            unless=("score", "similarity_score", "relatedness_score", "similarity", "label", "gold_label", "is_duplicate")),
)
# Tried in order; see `_choose` for why the first column of a dialect weighs more than the others.
DIALECTS: dict[RecordKind, tuple[Dialect, ...]] = {
    "text": tuple(Dialect(name, {"text": name}) for name in
                  ("text", "content", "contents", "document", "passage", "paragraph")),
    "sft": (
        Dialect("messages", {"instruction": Turns(0, 1), "output": Turns(-1, None)}, {"input": (Turns(1, -1),)}, whole=True),
        Dialect("alpaca", {"instruction": "instruction", "output": "output"}, {"input": ("input",)}),
        Dialect("dolly", {"instruction": "instruction", "output": "response"}, {"input": ("context",)}),
        Dialect("prompt-completion", {"instruction": "prompt", "output": "completion"}),
        Dialect("prompt-response", {"instruction": "prompt", "output": "response"}),
        Dialect("question-answer", {"instruction": "question", "output": "answer"}),
    ),
    "pair": _RETRIEVAL + _PAIR_ONLY,
    "retrieval": _RETRIEVAL,
    "sts": tuple(Dialect(f"{a}-{score}", {"sentence1": a, "sentence2": b, "score": score})
                 for a, b, scores in (("sentence1", "sentence2", ("score", "similarity_score", "label")),
                                      ("sentence_A", "sentence_B", ("relatedness_score", "score")),
                                      ("text1", "text2", ("score", "label")))
                 for score in scores),
    "labelled": tuple(Dialect(f"{text}-{label}", {"text": text, "label": label})
                      for text in ("text", "sentence", "content", "query")
                      for label in ("label_text", "label", "category", "intent")),
}
LABELS = ("label_text", "gold_label", "label")  # of premise and hypothesis
# Columns of ids: their texts are in a corpus that the record does not hold.
IDS = ("positive_document_ids", "negative_document_ids")


class Mapped(NamedTuple):
    """A dialect under a user's `fields`; `leading` is its first column that `fields` leaves to it."""

    name: str
    leading: str | None
    required: list[tuple[str, Column]]
    optional: list[tuple[str, tuple[Column, ...]]]
    unless: tuple[str, ...]
    positive: tuple[str, ...]


@functools.lru_cache
def dialects(kind: RecordKind, fields: tuple[tuple[str, str], ...]) -> list[list[Mapped]]:
    """The dialects of a kind in the order they are tried, those with one leading column together."""
    given = dict(fields)
    groups: dict[str | None, list[Mapped]] = {}
    for dialect in DIALECTS[kind]:
        if dialect.whole and given.keys() & (dialect.required | dialect.optional).keys():
            continue
        leading = next((c[0] if isinstance(c, Join) else str(c) for name, c in dialect.required.items() if name not in given), None)
        required = [(name, given.get(name, column)) for name, column in dialect.required.items()]
        optional = [(name, columns) for name, columns in dialect.optional.items() if name not in given]
        optional += [(name, (column,)) for name, column in given.items() if name not in dialect.required]
        unless, positive = (dialect.unless, dialect.positive) if leading else ((), ())
        mapped = Mapped(dialect.name if leading else "fields", leading, required, optional, unless, positive)
        groups.setdefault(leading, []).append(mapped)
    return list(groups.values())
