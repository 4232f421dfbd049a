"""From reStructuredText, NumPy and Google style documentation strings to plain text: markup off, summary and body apart."""

from __future__ import annotations

import re
import textwrap

_UNDERLINE = re.compile(r"[-=~^*#+_\"'`.:]{3,}")
_ROLE = re.compile(r":[a-zA-Z][\w:+-]*:`(?P<text>[^`]*)`")
_TARGET = re.compile(r"(?P<text>[^<`]*\S)\s*<[^>`]*>")
_LITERAL = re.compile(r"``(.+?)``", re.DOTALL)
_QUOTED = re.compile(r"`([^`\n]+)`_{0,2}")
_STRONG = re.compile(r"\*\*([^*\n]+)\*\*")
_FIELD = re.compile(r":(?:param|parameter|arg|argument|keyword|key|raises?|except|exception|var|ivar|cvar)\s+([^:]+):")
_RESULT = re.compile(r":(?:returns?|rtype|yields?):")
_DROPPED_FIELD = re.compile(r":(?:type\s+[^:]+|meta\s+\w+):.*")
_DROPPED_DIRECTIVE = re.compile(
    r"\.\.\s+(?:versionadded|versionchanged|deprecated|code-block|sourcecode|doctest|testcode|plot|math|automodule|autosummary|autoclass"
    r"|autofunction|currentmodule|module|index|highlight|only|image|figure|ipython|jupyter-execute|toctree|contents|seealso|rubric)::.*"
)
_DIRECTIVE = re.compile(r"\.\.\s+([\w-]+)::\s*")
_COMMENT = re.compile(r"\.\.\s+(?:_[^:]*:.*|\[\w+\]\s*)")
_PROMPT = re.compile(r"(?:>>>|\.\.\.)(?:\s|$)")
_TEMPLATE = re.compile(r"%\(\w+\)s|\$\{?\w+\}?|\{\w+\}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bcf)(?<!\bvs)(?<!\betc)[.!?]\s+(?=[A-Z`'\"(])")
_SIGNATURE = re.compile(r"[A-Za-z_][\w.]*\([^()]*(?:\([^()]*\)[^()]*)*\)(?:\s*(?:->|--).*)?")
_SECTION = re.compile(
    r"(?:parameters?|args|arguments|keyword args|returns?|raises?|yields?|attributes?|examples?|notes?|see also|references|methods"
    r"|warnings?)\s*:?",
    re.IGNORECASE,
)
MAX_SUMMARY_CHARS = 240


def plain_text(docstring: str) -> str:
    """The text without markup: no underlines, roles, directives or doctest prompts; paragraphs and line breaks stay."""
    lines = []
    for line in textwrap.dedent(_CONTROL.sub("", docstring.expandtabs(4).strip("\n"))).splitlines():
        stripped = line.strip()
        if stripped and _UNDERLINE.fullmatch(stripped.replace(" ", "")):
            continue
        if stripped.startswith(">>>") and not any(lines):
            return ""  # a bare doctest says nothing in words
        if any(pattern.fullmatch(stripped) for pattern in (_TEMPLATE, _DROPPED_DIRECTIVE, _DROPPED_FIELD, _COMMENT)):
            continue
        stripped = _DIRECTIVE.sub(lambda m: f"{m[1].capitalize()}: ", stripped)
        stripped = _PROMPT.sub("", stripped)
        stripped = _FIELD.sub(r"\1:", stripped)
        stripped = _RESULT.sub("Returns:", stripped)
        lines.append(stripped)
    text = "\n".join(lines)
    text = _ROLE.sub(lambda m: _link_text(m["text"]), text)
    text = _LITERAL.sub(r"\1", text)
    text = _QUOTED.sub(lambda m: _link_text(m[1]), text)
    text = _STRONG.sub(r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _link_text(content: str) -> str:
    """What a reader sees of a role: `text <target>` shows text, `~pkg.Class` shows Class, a leading `!` is hidden."""
    titled = _TARGET.fullmatch(content)
    if titled:
        return titled["text"]
    return content.lstrip("~!").rpartition(".")[2] if content.startswith("~") else content.lstrip("!")


def split_docstring(text: str) -> tuple[str, str, str]:
    """(stated signature, summary, body) of plain text.

    The summary is the first sentence of the first paragraph on one line, "" when the text opens with a section such as
    "Parameters". A leading line that is a call signature (C functions state it there) is taken off.
    """
    signature = ""
    first, _, rest = text.partition("\n\n")
    while _SIGNATURE.fullmatch(first.strip()):  # C functions may state it twice
        signature, (first, _, rest) = one_line(first), rest.strip().partition("\n\n")
    if "\n" in first and _SIGNATURE.fullmatch(head := first.partition("\n")[0].strip()):
        signature, first = head, first.partition("\n")[2]
    if _SECTION.fullmatch(first.strip().partition("\n")[0]):
        return signature, "", f"{first}\n\n{rest}".strip()
    paragraph = one_line(first)
    end = _SENTENCE_END.search(paragraph)
    summary, tail = (paragraph[: end.start() + 1], paragraph[end.end():]) if end else (paragraph, "")
    if len(summary) > MAX_SUMMARY_CHARS:
        return signature, "", text
    return signature, summary, f"{tail}\n\n{rest}".strip()


def one_line(text: str) -> str:
    """`text` with every run of white space as one space."""
    return " ".join(text.split())


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters of `text`, cut between words."""
    if len(text) <= limit:
        return text
    return text[: limit + 1].rpartition(" ")[0] or text[:limit]


def spoken(name: str) -> str:
    """A dotted name as words: `numpy.ma.MaskedArray.sort_by` -> "numpy ma masked array sort by"."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return one_line(re.sub(r"[._]+", " ", words)).lower()


def fingerprint_text(text: str) -> str:
    """`text` in lower case with every run of other characters than letters and digits as one space: equality of content."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def sentences(text: str) -> list[str]:
    """The sentences of one-line prose; what does not end in `.`, `!` or `?` stays with its neighbour."""
    parts, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        parts.append(text[start: match.start() + 1])
        start = match.end()
    return [*parts, text[start:]] if text[start:] else parts
