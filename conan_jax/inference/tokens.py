"""Texts -> rows of token ids for the encoder: prompt, text, EOS, each row as long as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from conan_jax.data.tokenizer import AnyTokenizer
from conan_jax.data.transforms import encode_heads
from conan_jax.errors import ConfigError

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def token_rows(tokenizer: AnyTokenizer, texts: Sequence[str], prompt: Sequence[int], longest: int) -> list[list[int]]:
    """The ids of each text as the model reads it; a text is cut so that prompt, text and EOS are at most `longest` tokens.

    A lone surrogate, which is no Unicode text, is read as U+FFFD; every other character is read as it is. Of a text far longer
    than its row no more is tokenised than the row can hold.
    """
    return counted_rows(tokenizer, texts, prompt, longest)[0]


def counted_rows(tokenizer: AnyTokenizer, texts: Sequence[str], prompt: Sequence[int], longest: int) -> tuple[list[list[int]], int]:
    """`token_rows`, and the number of texts that were cut."""
    room = longest - len(prompt) - 1
    contents = encode_heads(tokenizer, [_valid(text) for text in texts], room + 1)  # one token more shows that a text was cut
    rows = [[*prompt, *content[:room], tokenizer.eos_id] for content in contents]
    return rows, sum(len(content) > room for content in contents)


def prompt_tokens(tokenizer: AnyTokenizer, prompt: str, longest: int) -> list[int]:
    """The ids of a prompt, tokenised apart from any text. Raises `ConfigError` when it leaves no room for a token of text and EOS."""
    ids = tokenizer.encode(_valid(prompt)) if prompt else []
    if len(ids) + 2 > longest:
        raise ConfigError(f"the prompt {prompt[:60]!r} takes {len(ids)} tokens and leaves no room for a text in {longest}: "
                          "shorten the prompt or raise max_length")
    return ids


def _valid(text: str) -> str:
    return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)
