"""Rules of a model for its texts, beside its tokenizer: how a prompt is joined and pooled, where a row is cut."""

from __future__ import annotations

from dataclasses import dataclass

from conan_jax.config.checks import check


@dataclass(frozen=True)
class TextSettings:
    """How a model reads texts. The defaults are those of models that are trained here.

    Attributes:
        prompt_joined: prompt and text are one string before they are tokenised; False: tokenised apart.
        include_prompt: tokens of the prompt are pooled with those of the text.
        max_seq_length: tokens a row is cut to, frame and prompt included; None: 512, or the model's `max_length` where it is less.
        default_prompt_name: the prompt of a text for which none is named; None: no prompt.
    """

    prompt_joined: bool = False
    include_prompt: bool = False
    max_seq_length: int | None = None
    default_prompt_name: str | None = None

    def __post_init__(self) -> None:
        check(self.max_seq_length is None or self.max_seq_length >= 2,
              f"texts.max_seq_length must be 2 or more, or null, got {self.max_seq_length}")
