"""HTML in texts: count its entities and tags, or take them out and keep the text."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from typing import NamedTuple

# Elements that part words or lines; the others stand inside of a line.
_BLOCKS = frozenset("""address article aside blockquote body br caption center dd details dialog div dl dt fieldset figcaption figure footer
    form h1 h2 h3 h4 h5 h6 head header hr html legend li main menu nav ol optgroup option p pre section select summary table tbody td
    tfoot th thead title tr ul""".split())
_ELEMENTS = _BLOCKS | frozenset("""a abbr acronym area audio b base bdi bdo big button canvas cite code col colgroup data datalist del dfn em
    embed font i iframe img input ins kbd label link map mark meta meter noscript object output param picture progress q rp rt ruby s samp
    script slot small source span strike strong style sub sup svg template textarea time track tt u var video wbr""".split())
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]*);")
_OPENING = re.compile(r"</?([A-Za-z][^\s/<>]*)|<(?=\?|/(?![A-Za-z])|!(?!--|doctype))", re.IGNORECASE)
_AMPERSAND = "\0"  # never in a text: records with NUL characters are rejected


class Markup(NamedTuple):
    """A text without its markup, and how many entities and tags it had."""

    text: str
    entities: int
    tags: int


def strip_html(text: str) -> Markup:
    """Unescape entities and drop tags, comments, scripts and styles of HTML.

    An entity ends in a semicolon ("&copy=1" in an address is none). A tag has the name of an HTML element and is closed by ">":
    "a < b", "List<int>" and "<script" without an end are text. A tag that parts lines becomes a line feed.
    """
    if ("<" not in text and "&" not in text) or _AMPERSAND in text:
        return Markup(text, 0, 0)
    parser = _Parser()
    if "<" in text:
        comments = text.rfind("-->") + 1  # a comment that begins after the last end is text
        closed = text[:comments] + text[comments:].replace("<!--", "&lt;!--")
        known = _OPENING.sub(lambda match: match[0] if (match[1] or "").lower() in _ELEMENTS else "&lt;" + match[0][1:], closed)
        end = known.rfind(">") + 1
        parser.feed(known[:end].replace("&", _AMPERSAND))
        parser.close()
        kept = "".join(parser.parts) + known[end:].replace("&", _AMPERSAND)
        protected = known.count("&lt;") - text.count("&lt;")
    else:
        kept, protected = text, 0
    kept = kept.replace(_AMPERSAND, "&")
    entities = sum(html.unescape(entity) != entity for entity in _ENTITY.findall(kept)) - protected
    clean = _ENTITY.sub(lambda match: html.unescape(match[0]), kept)
    return Markup(clean.strip(), max(entities, 0), parser.tags) if clean != text else Markup(text, 0, 0)


class _Parser(HTMLParser):
    CDATA_CONTENT_ELEMENTS = RCDATA_CONTENT_ELEMENTS = ()  # a script that is never closed is text

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.tags = 0
        self._hidden: tuple[str, int] | None = None  # script or style, and where its content begins

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_comment(self, data: str) -> None:
        self.tags += 1

    def handle_decl(self, decl: str) -> None:
        self.tags += 1

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags += 1
        if tag in _BLOCKS:
            self.parts.append("\n")
        elif tag in ("script", "style") and self._hidden is None:
            self._hidden = tag, len(self.parts)

    def handle_endtag(self, tag: str) -> None:
        self.tags += 1
        if tag in _BLOCKS:
            self.parts.append("\n")
        elif self._hidden is not None and self._hidden[0] == tag:
            del self.parts[self._hidden[1]:]
            self._hidden = None
