"""Record kinds, the field names people already have, and the validation of one record.

A record becomes a plain dict with exactly the fields of its kind, or raises `Reject` with a reason
that is counted. Nothing in between: a record with one bad field is not used at all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from conan_jax.config import RecordKind
from conan_jax.data.dialects import IDS, LABELS, Column, Items, Join, Turns, dialects
from conan_jax.data.markup import strip_html
from conan_jax.errors import ConfigError

FieldType = Literal["text", "texts", "float", "floats"]

# What a record of each kind holds once built, in this order. Fields a source may lack are "" or [].
# `scores` of retrieval are those of `neg`, one each. They order the pool at the build, highest and so hardest first; a record without
# scores keeps the order of its source. Training takes the candidates in this order and does not read the scores.
KINDS: dict[RecordKind, dict[str, FieldType]] = {
    "text": {"text": "text"},
    "sft": {"instruction": "text", "input": "text", "output": "text"},
    "pair": {"query": "text", "pos": "text", "instruction": "text"},
    "retrieval": {"query": "text", "pos": "texts", "neg": "texts", "scores": "floats", "instruction": "text"},
    "sts": {"sentence1": "text", "sentence2": "text", "score": "float"},
    "labelled": {"text": "text", "label": "text"},
}

REASONS = {
    "broken_json": "the line is not one JSON value",
    "repeated_key": "an object gives one key twice",
    "broken_row": "the row does not have the columns of its header, or cannot be read",
    "quoted_cell": "a cell of a tsv is in quotes, which tsv does not have",
    "invalid_utf8": "the text is not valid UTF-8, or holds half a surrogate pair",
    "nul": "the text holds a NUL character",
    "missing_field": "a field is not there, or is null",
    "wrong_type": "a field is not of its type, or a score is not finite",
    "length_mismatch": "there are not as many scores as negatives",
    "empty_text": "a text is empty or blank",
    "positive_equals_query": "a positive says the same as its query",
    "not_positive": "the label says that the second text does not follow from the first",
    "too_long": "the line is longer than the reader's limit",
}


class Reject(Exception):
    """Why one record cannot be used: a key of `REASONS`, and what exactly was found. `raw` is its text if unparsed."""

    def __init__(self, reason: str, detail: str, raw: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.raw = reason, detail, raw


class Parsed(NamedTuple):
    """A usable record, the dialect it was read by, and what was left out of it (counted in the manifest)."""

    record: dict[str, Any]
    dialect: str
    dropped: Counter[str]


def check_fields(kind: RecordKind, fields: Mapping[str, str]) -> None:
    """Raises `ConfigError` when `kind` is unknown or `fields` maps a field that records of `kind` do not have."""
    if kind not in KINDS:
        raise ConfigError(f"unknown record kind {kind!r}; one of {', '.join(KINDS)}")
    for name, column in fields.items():
        if name not in KINDS[kind]:
            raise ConfigError(f"fields maps {name!r}, but {kind} records have only {', '.join(KINDS[kind])}")
        if not isinstance(column, str) or not column:
            raise ConfigError(f"fields maps {name!r} to {column!r}; it must name a column, a dotted path like answers.text.0, "
                              "or several of them like title+body")


def parse(raw: Any, kind: RecordKind, fields: Mapping[str, str] | None = None, clean: Literal["html"] | None = None) -> Parsed:
    """One raw record of any accepted dialect -> a record of `kind`.

    Args:
        raw: what a reader gave: a dict of str, bytes (UTF-8), numbers, lists, dicts.
        kind: a key of `KINDS`.
        fields: our field name -> column or dotted path (`answers.text.0`), where the dialects do not fit. `title+body` joins the texts of
            several columns by a newline. Blank texts are left out, and so are columns that are not there (counted in `dropped`), unless
            none of them is. A column whose name has a literal "+" goes before.
        clean: "html" takes HTML entities and tags out of every text first; `dropped["html"]` counts the records that had any.

    A chat (`messages`) read as `sft` gives its first message as instruction, its last one, of the assistant, as output, and all messages
    between them as input, joined by newlines: of system, user and assistant each goes to a field of its own, and of several turns none is
    left out. A `set` gives its first text as query and the others as positives. A premise with a hypothesis is a pair if it has no
    label or the label is entailment; `premise`, `entailment` and `contradiction` in one record are query, positive and negative.

    Retrieval-shaped records read as `pair` give their first positive (`further_positive` counts the others); sft-shaped records
    read as `pair` give query = instruction + newline + input, pos = output (METHODS 1.2, stage 3). Candidates of a `neg` pool that
    equal the query or a positive, and repeated texts of a list, are left out and counted in `dropped`; so is an
    optional field (`no_neg`) whose column in `fields` is not there. With scores the pool is sorted by falling
    score, so it is hardest first whatever the source did.

    Raises:
        Reject: the record cannot be used; nothing of it may be.
    """
    if not isinstance(raw, Mapping):
        raise Reject("wrong_type", f"a record must be an object with named fields, found {type(raw).__name__}")
    dropped: Counter[str] = Counter()
    dialect, values = _choose(raw, kind, fields or {}, dropped)
    if clean == "html":
        stripped = {name: _without_html(value) for name, value in values.items()}
        dropped["html"] += stripped != values
        values = stripped
    record = _BUILDERS[kind](values, dropped)
    return Parsed(record, dialect, dropped)


def _choose(raw: Mapping[str, Any], kind: RecordKind, fields: Mapping[str, str], dropped: Counter[str]) -> tuple[str, dict[str, Any]]:
    """The dialect of a record and its values by our field names.

    Once the first column of a dialect is present only dialects that begin with it are considered: a record with
    `query`, `title` and `text` whose `pos` went missing is a reject, not a title-text pair.
    """
    groups = dialects(kind, tuple(fields.items()))
    present = next((group for group in groups if group[0].leading is None or group[0].leading in raw), None)
    for mapped in present or ():
        values = {name: _get(raw, column) for name, column in mapped.required}
        if None in values.values() or any(column in raw for column in mapped.unless):
            continue
        for name, alternatives in mapped.optional:
            for column in alternatives:
                if (value := _get(raw, column)) is not None:
                    values[name] = value
                    break
            else:
                if name in fields:
                    dropped[f"no_{name}"] += 1
        label = next((raw[name] for name in LABELS if raw.get(name) is not None), None)
        if mapped.positive and label is not None and _label(label) not in mapped.positive:
            wanted = " or ".join(mapped.positive)
            raise Reject("not_positive", f"the label is {str(label)[:40]!r}; a {kind} record needs {wanted}. Leave the others out of the "
                         "source, or write {premise, entailment, contradiction} in one record")
        for name, column in fields.items():
            if name in values:
                dropped.update(f"no_{name}:{part}" for part in _parts(raw, column) if _get(raw, part) is None)
        return mapped.name, values
    if kind in ("pair", "retrieval") and "pos" not in fields and (ids := [column for column in IDS if column in raw]):
        raise Reject("missing_field", f"found ids of documents in {' and '.join(ids)}, but not their texts, which are in a corpus; write "
                     "the texts into each record, as positive_passages and negative_passages: lists of {title, text}")
    tried = [mapped for group in ([present] if present else groups) for mapped in group]
    wanted = " or ".join(dict.fromkeys(" + ".join(dict.fromkeys(str(c) for _, c in mapped.required)) for mapped in tried))
    barred = "".join(f" without {column}" for mapped in tried for column in mapped.unless if column in raw)
    raise Reject("missing_field", f"found {shortened(raw) or 'nothing'}; {kind} records need {wanted}{barred}")


def shortened(names: Iterable[Any]) -> str:
    """The first names of a list, cut to fit into a message, and how many there are if it has more."""
    listed = list(names)
    more = f", ... ({len(listed):,} in all)" if len(listed) > 12 else ""
    return ", ".join(text if len(text) <= 60 else f"{text[:59]}…" for text in map(str, listed[:12])) + more


def _label(value: Any) -> str:
    """A class label as a text, for comparisons; 0.0, as tables with gaps have it, as "0"."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text.strip().lower().removesuffix(".0")


def _get(raw: Mapping[str, Any], column: Column) -> Any:
    """The value at a column, a dotted path, `negative*`, `a+b` or a part of a list; None where there is none."""
    if isinstance(column, Join):
        return None if raw.get(column[0]) is None else _joined(raw, column)
    if isinstance(column, Turns):
        return None if raw.get(str(column)) is None else _turns(raw[str(column)], slice(*column))
    if isinstance(column, Items):
        return None if raw.get(str(column)) is None else _items(raw[str(column)], slice(*column))
    if column in raw:
        return raw[column]
    if len(parts := _parts(raw, column)) > 1:
        return _joined(raw, parts)
    if column.endswith("*"):
        matches = [(re.fullmatch(re.escape(column[:-1]) + r"(?:_(\d{1,9}))?", str(name)), name) for name in raw]
        numbered = sorted((int(m.group(1) or -1), name) for m, name in matches if m)
        found = [raw[name] for _, name in numbered if raw[name] not in (None, "", b"")]
        flat = [item for value in found for item in (value if isinstance(value, list | tuple) else [value])]
        return flat if numbered else None
    return _at(raw, column)


def _at(raw: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path of at least one dot; None where there is none."""
    value: Any = raw if "." in path else None
    for key in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list | tuple) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


_ROLES = ("system", "developer", "user", "assistant")


def _turns(messages: Any, part: slice) -> str:
    """The texts of a part of a chat, blank ones excepted, joined by newlines.

    Raises:
        Reject: the value is not a list of messages, or the last one is not an answer of the assistant to an earlier one.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(turn, Mapping) for turn in messages):
        raise Reject("wrong_type", "messages must be a list of objects with role and content")
    for i, turn in enumerate(messages):
        if turn.get("role") is None or turn.get("content") is None:
            raise Reject("missing_field", f"messages[{i}] has no {'role' if turn.get('role') is None else 'content'}")
        if turn["role"] not in _ROLES:
            raise Reject("wrong_type", f"messages[{i}].role is {str(turn['role'])[:40]!r}, not one of {', '.join(_ROLES)}")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise Reject("missing_field", f"messages of {len(messages)} turns do not end in an answer of the assistant to an earlier turn")
    texts = [_text(turn["content"], f"messages[{i}].content", blank=True) for i, turn in enumerate(messages)]
    return "\n".join(text for text in texts[part] if not is_blank(text))


def _items(texts: Any, part: slice) -> Any:
    """The text, or the texts, of a part of a list of texts that mean the same."""
    if not isinstance(texts, list | tuple):
        raise Reject("wrong_type", f"set must be a list of texts, found {type(texts).__name__}")
    if len(texts) < 2:
        raise Reject("missing_field", f"set has {len(texts)} texts; a pair needs two")
    return list(texts[part]) if part.stop is None else texts[part.start]


def _parts(raw: Mapping[str, Any], column: str) -> list[str]:
    """The columns of `a+b`: a name that the record has may hold a "+" itself."""
    pieces, parts = column.split("+"), []
    while pieces:
        names = ["+".join(pieces[:n]) for n in range(len(pieces), 0, -1)]
        parts.append(next((name for name in names if name in raw or _at(raw, name) is not None), pieces[0]))
        pieces = pieces[parts[-1].count("+") + 1 :]
    return parts


def _joined(raw: Mapping[str, Any], columns: Iterable[str]) -> str | None:
    """The texts of the columns that are there, blank ones excepted, joined by a newline; None where no column is there."""
    values = {name: value for name in columns if (value := _get(raw, name)) is not None}
    texts = [_text(value, name, blank=True) for name, value in values.items()]
    return "\n".join(text for text in texts if not is_blank(text)) if values else None


def _without_html(value: Any, depth: int = 2) -> Any:
    """A text, the texts of a list, and those of passages ({title, text}), without markup; other values as they are."""
    if isinstance(value, str | bytes):
        try:
            text = value.decode("utf-8") if isinstance(value, bytes) else value
        except UnicodeDecodeError:
            return value  # a reject later
        found = strip_html(text).text
        return value if found == text else found
    if depth and isinstance(value, list | tuple):
        return type(value)(_without_html(item, depth - 1) for item in value)
    if depth and isinstance(value, Mapping):
        return {key: _without_html(item, 0) for key, item in value.items()}
    return value


_BLANK = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]*")


def is_blank(text: str) -> bool:
    """True when `text` shows nothing: empty, or only white space and zero-width marks."""
    return _BLANK.fullmatch(text) is not None


def _text(value: Any, name: str, blank: bool = False) -> str:
    if isinstance(value, Mapping) and "text" in value:  # a passage: {title, text}
        body = string(value["text"], f"{name}.text", blank)
        title = string("" if value.get("title") is None else value["title"], f"{name}.title", blank=True)
        return body if is_blank(title) else f"{title} {body}"
    return string(value, name, blank)


def string(value: Any, name: str, blank: bool) -> str:
    """`value` as text: str, or bytes of UTF-8. Raises `Reject` for what is no text, holds a NUL or half a surrogate pair, or is blank
    unless `blank`."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Reject("invalid_utf8", f"{name}: {error.reason} at byte {error.start}") from None
    if not isinstance(value, str):
        raise Reject("wrong_type", f"{name} must be text, found {type(value).__name__}")
    if "\0" in value:
        raise Reject("nul", f"{name} holds a NUL character at {value.index(chr(0))}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Reject("invalid_utf8", f"{name}: a character at {error.start} cannot be written as UTF-8") from None
    if not blank and is_blank(value):
        raise Reject("empty_text", f"{name} is {'blank' if value else 'empty'}")
    return value


_FLOAT32_MAX = 3.4028234663852886e38  # scores are stored as float32


def _texts(value: Any, name: str) -> list[str]:
    items = value if isinstance(value, list | tuple) else [value]
    return [_text(item, f"{name}[{i}]") for i, item in enumerate(items)]


_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)


def number(value: Any, name: str) -> float:
    """A number, or the text of one in decimal digits, as a float that float32 can hold.

    Raises:
        Reject: it is no number, is not finite, or is a text that Python reads as a number and others do not, like "1_0".
    """
    if isinstance(value, bytes | str):
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        if not _NUMBER.fullmatch(text):
            raise Reject("wrong_type", f"{name} must be a number, found {text[:40]!r}")
        value = float(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Reject("wrong_type", f"{name} must be a number, found {type(value).__name__}")
    if not abs(value) <= _FLOAT32_MAX:  # also true of NaN
        raise Reject("wrong_type", f"{name} must be a finite number, found {str(value)[:40]}")
    return float(value)


def _same(a: str, b: str) -> bool:
    return a.strip() == b.strip()


def _build_text(values: dict[str, Any], dropped: Counter[str]) -> dict[str, Any]:
    return {"text": _text(values["text"], "text")}


def _build_sft(values: dict[str, Any], dropped: Counter[str]) -> dict[str, Any]:
    instruction, extra = _text(values["instruction"], "instruction", blank=True), _text(values.get("input", ""), "input", blank=True)
    if is_blank(instruction) and is_blank(extra):
        raise Reject("empty_text", "instruction and input are both blank")
    return {"instruction": instruction, "input": extra, "output": _text(values["output"], "output")}


def _build_pair(values: dict[str, Any], dropped: Counter[str]) -> dict[str, Any]:
    query, pos = _text(values["query"], "query"), values["pos"]
    if isinstance(pos, list | tuple):
        if not pos:
            raise Reject("missing_field", "pos is an empty list")
        if len(pos) > 1:
            dropped["further_positive"] += len(pos) - 1
        pos = pos[0]
    pos = _text(pos, "pos")
    if _same(query, pos):
        raise Reject("positive_equals_query", f"pos is the query: {query[:80]!r}")
    return {"query": query, "pos": pos, "instruction": _text(values.get("instruction", ""), "instruction", blank=True)}


def _build_retrieval(values: dict[str, Any], dropped: Counter[str]) -> dict[str, Any]:
    query = _text(values["query"], "query")
    if isinstance(values["pos"], list | tuple) and not values["pos"]:
        raise Reject("missing_field", "pos is an empty list")
    given = _texts(values["pos"], "pos")
    for i, pos in enumerate(given):
        if _same(query, pos):
            raise Reject("positive_equals_query", f"pos[{i}] is the query: {query[:80]!r}")
    positives = _distinct(given)
    if len(positives) < len(given):
        dropped["repeated_positive"] += len(given) - len(positives)

    neg = values.get("neg", [])
    pool = [] if isinstance(neg, str | bytes) and not neg.strip() else _texts(neg, "neg")
    scores = values.get("scores", [])
    scores = [number(s, f"scores[{i}]") for i, s in enumerate(scores if isinstance(scores, list | tuple) else [scores])]
    if scores and len(scores) != len(pool):
        raise Reject("length_mismatch", f"{len(scores)} scores for {len(pool)} negatives")
    order = sorted(range(len(pool)), key=lambda i: -scores[i]) if scores else range(len(pool))
    taken = {query.strip(): "negative_equals_query"} | {pos.strip(): "negative_equals_positive" for pos in positives}
    kept = []
    for i in order:
        if (why := taken.setdefault(pool[i].strip(), "")) == "":
            taken[pool[i].strip()] = "repeated_negative"
            kept.append(i)
        else:
            dropped[why] += 1
    return {"query": query, "pos": positives, "neg": [pool[i] for i in kept], "scores": [scores[i] for i in kept if scores],
            "instruction": _text(values.get("instruction", ""), "instruction", blank=True)}


def _distinct(texts: list[str]) -> list[str]:
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(text.strip(), text)
    return list(first.values())


def _build_sts(values: dict[str, Any], dropped: Counter[str]) -> dict[str, Any]:
    return {"sentence1": _text(values["sentence1"], "sentence1"), "sentence2": _text(values["sentence2"], "sentence2"),
            "score": number(values["score"], "score")}


def _build_labelled(values: dict[str, Any], dropped: Counter[str]) -> dict[str, Any]:
    label = values["label"]
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    return {"text": _text(values["text"], "text"), "label": _text(label, "label")}


_BUILDERS = {"text": _build_text, "sft": _build_sft, "pair": _build_pair, "retrieval": _build_retrieval,
             "sts": _build_sts, "labelled": _build_labelled}
