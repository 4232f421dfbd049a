"""Tokenizers that came with an imported model: a `tokenizer.json` of the `tokenizers` library, with the contract of ours."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from conan_jax.errors import DataError
from conan_jax.files import read_json, write_file, write_json

JSON_FILE, CONFIG_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json", "conan_tokenizer.json"
_NAMES = ("pad", "unk", "bos", "eos")


class JsonTokenizer:
    """A tokenizer as its `tokenizer.json` says, with its special ids. Build it with `Tokenizer.load`, which opens either kind.

    `encode` adds no special ids. The frame of a text, `prefix_ids` before it and `suffix_ids` after it, is added by the code that makes
    rows. No special id can be spelled by a text ("</s>" in a text is four characters) unless `reads_special`. Where the model has no pad
    token, `pad_id` is `eos_id`: lengths say what is padding, so any id serves. `bos_id` and `unk_id` are None where there are none.
    """

    splits_at_spaces = False  # pieces may reach over white space: what stands after a cut can change the last ids before it

    def __init__(
        self, content: bytes, *, eos_id: int, pad_id: int | None = None, bos_id: int | None = None, unk_id: int | None = None,
        settings: dict[str, Any] | None = None, origin: str = "the given bytes", parsed: tokenizers.Tokenizer | None = None,
        frame: Frame | None = None, reads_special: bool = False,
    ) -> None:
        """Raise `DataError` when `content` is not a tokenizer.json, or an id is outside of its vocabulary.

        Args:
            content: that of `tokenizer.json`.
            settings: content of `tokenizer_config.json`.
            parsed: the library's tokenizer of `content`, where it is known.
            frame: ids before and after every text; None: nothing before, `eos_id` after.
            reads_special: a special token that is spelled in a text becomes its id.
        """
        self._tokenizer = _parsed(content, origin) if parsed is None else parsed
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not reads_special
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{origin} has an empty vocabulary")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eos_id, self.pad_id, self.bos_id, self.unk_id = eos_id, eos_id if pad_id is None else pad_id, bos_id, unk_id
        self.reads_special = reads_special
        self.prefix_ids, self.suffix_ids = Frame((), (eos_id,)) if frame is None else frame
        framing = {f"frame[{i}]": value for i, value in enumerate((*self.prefix_ids, *self.suffix_ids))}
        for name, value in {"eos_id": eos_id, "pad_id": pad_id, "bos_id": bos_id, "unk_id": unk_id, **framing}.items():
            if value is not None and not 0 <= value < self.vocab_size:
                raise DataError(f"{origin} has {self.vocab_size} tokens, and {name} is {value}")
        self.max_piece_length: int = max(map(len, vocabulary))  # characters, at most: one of them is a byte in byte-level vocabularies
        self._content, self._settings = content, dict(settings or {})
        # Another end of text is another training, though the ids of the text be the same.
        rules: list[Any] = [self.eos_id, self.pad_id]
        if reads_special or (self.prefix_ids, self.suffix_ids) != ((), (eos_id,)):
            rules += [list(self.prefix_ids), list(self.suffix_ids), reads_special]
        self.sha256: str = hashlib.sha256(content + json.dumps(rules).encode()).hexdigest()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> JsonTokenizer:
        """Read the folder that `save` wrote, or a Hugging Face one, whose special ids are in `tokenizer_config.json`, else `config.json`.

        The frame of a Hugging Face folder is left out: `own_frame` reads it, `with_rules` uses it. Raises `DataError` when a file is missing or damaged, or nothing says which token ends a text.
        """
        folder = Path(folder)
        content, settings = (folder / JSON_FILE).read_bytes(), read_json(folder / CONFIG_FILE, {})
        if not (folder / SETTINGS_FILE).is_file():
            parsed = _parsed(content, str(folder / JSON_FILE))
            return cls(content, **_special_ids(folder, parsed, settings), settings=settings, origin=str(folder / JSON_FILE), parsed=parsed)
        ours = read_json(folder / SETTINGS_FILE)
        try:
            ids = {f"{name}_id": ours[f"{name}_id"] for name in _NAMES}
            recorded = ours["sha256"]
            frame = Frame(tuple(ours["prefix_ids"]), tuple(ours["suffix_ids"])) if "prefix_ids" in ours else None
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / SETTINGS_FILE} lacks {error}; copy it anew or import the model again") from None
        tokenizer = cls(content, **ids, settings=settings, origin=str(folder / JSON_FILE), frame=frame,
                        reads_special=bool(ours.get("reads_special", False)))
        if recorded != tokenizer.sha256:
            raise DataError(f"{folder / JSON_FILE} with its special ids has sha256 {tokenizer.sha256}, but {SETTINGS_FILE} says "
                            f"{recorded}: it was altered; copy it anew or import the model again")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special ids. Raises `DataError` for a lone surrogate, which is not valid Unicode."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Token ids of each text, in order. The library parallelises by itself, whatever `num_threads` says."""
        try:
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            refuse_surrogates(texts)
            raise DataError(f"a text could not be encoded: {str(error)[:200]}") from error
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Special ids, and ids that no token has, vanish. Raises `DataError` for an id outside of the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            raise DataError(f"a token id lies outside the vocabulary of {self.vocab_size}; was it made by another tokenizer?")
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` as they came, and `conan_tokenizer.json`; each whole or not at all."""
        folder = Path(folder)
        (folder / SETTINGS_FILE).unlink(missing_ok=True)
        write_file(folder / JSON_FILE, self._content)
        if self._settings:
            write_json(folder / CONFIG_FILE, self._settings)
        ids = {f"{name}_id": getattr(self, f"{name}_id") for name in _NAMES}
        rules = {"prefix_ids": list(self.prefix_ids), "suffix_ids": list(self.suffix_ids), "reads_special": self.reads_special}
        # The description goes last: a folder that has it is complete.
        write_json(folder / SETTINGS_FILE, {"sha256": self.sha256, "vocab_size": self.vocab_size, **ids, **rules})

    @property
    def settings(self) -> dict[str, Any]:
        """Content of the `tokenizer_config.json` that it came with; {} without one."""
        return dict(self._settings)

    @property
    def lower_case(self) -> bool:
        """True when every text is lowered before it is tokenised."""
        return _lowers(json.loads(self._content))

    def content(self) -> dict[str, Any]:
        """Return a `tokenizer.json` whose readers get what the model is trained on: the ids of `encode`, in the frame."""
        names = {i: self.token(i) for i in (*self.prefix_ids, *self.suffix_ids)}
        framed = framed_by([(names[i], i) for i in self.prefix_ids], [(names[i], i) for i in self.suffix_ids])
        return {**json.loads(self._content), "post_processor": framed, "truncation": None, "padding": None}

    def with_rules(self, frame: Frame, reads_special: bool, lower_case: bool = False) -> JsonTokenizer:
        """Return the same vocabulary under other rules for texts. `lower_case`: every text is lowered before all else."""
        content = self._content
        if lower_case:
            content = json.dumps(_lowering(json.loads(content)), ensure_ascii=False).encode()
        return JsonTokenizer(content, eos_id=self.eos_id, pad_id=self.pad_id, bos_id=self.bos_id, unk_id=self.unk_id,
                             settings=self._settings, frame=frame, reads_special=reads_special)

    def rewritten(self, content: dict[str, Any], settings: dict[str, Any]) -> JsonTokenizer:
        """Return a tokenizer with the same special ids and rules from another `tokenizer.json` and `tokenizer_config.json`."""
        written = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        return JsonTokenizer(written.encode(), eos_id=self.eos_id, pad_id=self.pad_id, bos_id=self.bos_id, unk_id=self.unk_id, settings=settings,
                             frame=Frame(self.prefix_ids, self.suffix_ids), reads_special=self.reads_special)

    def own_frame(self) -> Frame:
        """Return the ids that the post-processor of `tokenizer.json` puts around a text.

        Raises `DataError` when it does more than that: ids inside of a text, or other ids for other texts.
        """
        found = {self._frame_of(text) for text in _FRAMED}
        if len(found) != 1 or None in found:
            raise DataError("the post-processor of tokenizer.json does more than put the same ids before and after every text, which "
                            "cannot be done here")
        return found.pop()

    def token(self, i: int) -> str:
        """Return the token of an id."""
        return self._tokenizer.id_to_token(i)

    def full_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as the library gives them, with those of the post-processor."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)]

    def _frame_of(self, text: str) -> Frame | None:
        bare, full = self.encode(text), self.full_ids([text])[0]
        added = self._tokenizer.encode(text).special_tokens_mask
        start = added.index(0) if 0 in added else 0
        frame = Frame(tuple(full[:start]), tuple(full[start + len(bare) :]))
        return frame if [*frame.prefix, *bare, *frame.suffix] == full else None


class Frame(NamedTuple):
    """Ids before and after every text."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


_FRAMED = ("a", "the cat and the dog", "12 + 3")


def framed_by(prefix: Sequence[tuple[str, int]], suffix: Sequence[tuple[str, int]]) -> dict[str, Any] | None:
    """Return the post-processor that puts tokens, (name, id) each, around every text; they keep their places when a text is cut.

    None without any.
    """
    def single(name: str, i: int) -> list[dict[str, Any]]:
        before, after = ([{"SpecialToken": {"id": token, "type_id": i}} for token, _ in side] for side in (prefix, suffix))
        return [*before, {"Sequence": {"id": name, "type_id": i}}, *after]

    if not (prefix or suffix):
        return None
    return {"type": "TemplateProcessing", "single": single("A", 0), "pair": single("A", 0) + single("B", 1),
            "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in (*prefix, *suffix)}}


def _lowering(content: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json that lowers texts first, as sentence-transformers does under `do_lower_case`; unchanged where it does already."""
    if _lowers(content):
        return content
    return {**content, "normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *_normalizers(content)]}}


def _lowers(content: dict[str, Any]) -> bool:
    return any(step["type"] == "Lowercase" for step in _normalizers(content))


def _normalizers(content: dict[str, Any]) -> list[dict[str, Any]]:
    given = content.get("normalizer")
    return given["normalizers"] if given and given["type"] == "Sequence" else [given] if given else []


def is_tokenizer_json(path: Path) -> bool:
    """Whether a file is a `tokenizer.json` of the `tokenizers` library."""
    return path.is_file() and isinstance(read_json(path, {}).get("model"), dict)


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Raises `DataError` naming the first lone surrogate of `texts`."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            where = text[max(error.start - 20, 0) : error.start + 20]
            raise DataError(f"a text holds a lone surrogate at character {error.start}, so it is not valid Unicode: {where!r}") from error


def _parsed(content: bytes, origin: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"{origin} is no tokenizer.json that can be read ({str(error)[:200]}); copy it anew") from error


def _special_ids(folder: Path, parsed: tokenizers.Tokenizer, settings: dict[str, Any]) -> dict[str, Any]:
    """What the files of a Hugging Face folder say of pad, unk, bos and eos: names of tokens first, then the ids of `config.json`."""
    model = read_json(folder / "config.json", {})
    found: dict[str, Any] = {}
    for name in _NAMES:
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        given = model.get(f"{name}_token_id")
        given = given[0] if isinstance(given, list) and given else given
        by_name = parsed.token_to_id(token) if isinstance(token, str) else None
        found[f"{name}_id"] = by_name if by_name is not None else given if isinstance(given, int) and given >= 0 else None
    if found["eos_id"] is None:
        raise DataError(f"nothing in {folder} says which token ends a text: name it as \"eos_token\" in {CONFIG_FILE}, "
                        "or as \"eos_token_id\" in config.json")
    return found
