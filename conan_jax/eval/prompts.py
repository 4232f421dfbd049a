"""What an encoder reads before the texts of a set, and how much of them."""

from __future__ import annotations

from typing import Any

from conan_jax import config
from conan_jax.data.transforms import query_prompt
from conan_jax.errors import ConfigError


def prompt_of(encoder: Any, evaluation: config.Evaluation) -> str:
    """The prompt before queries, and before both sides where a set has no documents: of `instruction` or by `prompt_name`; "" for none.

    Raises `ConfigError` for a name that the encoder's prompts do not have.
    """
    name = evaluation.prompt_name
    if name is None:
        return query_prompt(evaluation.instruction)
    if name not in encoder.prompts:
        known = ", ".join(encoder.prompts) or "none"
        raise ConfigError(f"evaluation {evaluation.name!r}: the encoder has no prompt {name!r}; it has {known}")
    return encoder.prompts[name]


def usable_length(encoder: Any, evaluation: config.Evaluation) -> int:
    """`max_length` in tokens, or what the model knows where that is less."""
    return min(evaluation.max_length, encoder.model.max_length)
