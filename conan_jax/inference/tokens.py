"""Texts -> rows of token ids for the encoder: prompt and text in the tokenizer's frame, each row as long as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from conan_jax.data.tokenizer import AnyTokenizer
from conan_jax.data.transforms import encode_heads
from conan_jax.errors import ConfigError
from conan_jax.hf.text_settings import TextSettings

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class RowReader:
    """Texts after one prompt -> rows of at most `longest` tokens; the text is cut where it does not fit.

    A row is `prefix_ids`, prompt, text, `suffix_ids`. `prompt_length` is the number of leading tokens that are not pooled: prefix and
    prompt; 0 without a prompt, or where `settings.include_prompt`.

    Under `settings.prompt_joined` prompt and text are one string before they are tokenised, and `prompt_length` is that of
    sentence-transformers: the ids of the prompt alone in its frame, less one for its last special token. A row without a token after
    those is empty, as its vector is zero there.
    """

    def __init__(self, tokenizer: AnyTokenizer, prompt: str, longest: int, settings: TextSettings = TextSettings()) -> None:
        """Raise `ConfigError` when the prompt leaves no room for a token of text."""
        self._tokenizer, self._longest, self._joined = tokenizer, longest, prompt if settings.prompt_joined else ""
        ids = tokenizer.encode(_valid(prompt)) if prompt else []
        frame = len(tokenizer.prefix_ids) + len(tokenizer.suffix_ids)
        if len(ids) + frame + 1 > longest:
            raise ConfigError(f"the prompt {prompt[:60]!r} takes {len(ids)} tokens and leaves no room for a text in {longest}: "
                              "shorten the prompt or raise max_length")
        self._prompt_ids = [] if settings.prompt_joined else ids
        self.prompt_length, self._least = 0, 0
        if ids and not settings.include_prompt:
            self.prompt_length = len(tokenizer.prefix_ids) + len(ids)
            if settings.prompt_joined:
                self.prompt_length += max(len(tokenizer.suffix_ids) - 1, 0)
                self._least = self.prompt_length + 1

    def rows(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Return the ids of each text as the model reads it, and the number of texts that were cut."""
        joined = [self._joined + text for text in texts] if self._joined else texts
        rows, cut = counted_rows(self._tokenizer, joined, self._prompt_ids, self._longest)
        return [row if len(row) >= self._least else [] for row in rows] if self._least else rows, cut


def token_rows(tokenizer: AnyTokenizer, texts: Sequence[str], prompt: Sequence[int], longest: int) -> list[list[int]]:
    """Return the ids of each text after those of a prompt, in the tokenizer's frame; a text is cut so that all are at most `longest`.

    A lone surrogate, which is no Unicode text, is read as U+FFFD; every other character is read as it is. Of a text far longer than
    its row no more is tokenised than the row can hold.
    """
    return counted_rows(tokenizer, texts, prompt, longest)[0]


def counted_rows(tokenizer: AnyTokenizer, texts: Sequence[str], prompt: Sequence[int], longest: int) -> tuple[list[list[int]], int]:
    """`token_rows`, and the number of texts that were cut."""
    start, suffix = [*tokenizer.prefix_ids, *prompt], tokenizer.suffix_ids
    room = longest - len(start) - len(suffix)
    contents = encode_heads(tokenizer, [_valid(text) for text in texts], room + 1)  # one token more shows that a text was cut
    return [[*start, *content[:room], *suffix] for content in contents], sum(len(content) > room for content in contents)


def _valid(text: str) -> str:
    return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)
