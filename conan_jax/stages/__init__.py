"""The stages of METHODS 1.2. A new one is one file and one line of `STAGES`, or "package.module:attr" from outside."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from conan_jax import config as configs
from conan_jax.errors import ConfigError
from conan_jax.model import Embedder
from conan_jax.stages.base import Stage
from conan_jax.stages.lm import LanguageModel
from conan_jax.stages.supervised import Supervised
from conan_jax.stages.weak import Weak

STAGES: dict[str, Callable[[configs.Stage, Embedder], Stage]] = {
    "pretrain": LanguageModel,
    "sft": LanguageModel,
    "weak": Weak,
    "supervised": Supervised,
}


def make_stage(config: configs.Stage, embedder: Embedder) -> Stage:
    """The stage that `config.kind` names: a key of `STAGES`, or "package.module:attr" of a class called the same way.

    Raises `ConfigError` when there is none.
    """
    if config.kind in STAGES:
        return STAGES[config.kind](config, embedder)
    module, colon, attribute = config.kind.partition(":")
    if not colon:
        raise ConfigError(f'stage {config.name!r}: unknown kind {config.kind!r}; use one of {", ".join(STAGES)}, or "package.module:attr"')
    try:
        stage = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"stage {config.name!r}: kind {config.kind!r} cannot be imported: {error}") from error
    return stage(config, embedder)


__all__ = ["STAGES", "Stage", "make_stage"]
