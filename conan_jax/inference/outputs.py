"""The options of `Encoder.encode` that sentence-transformers has for its results: arrays, torch tensors, a device."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from conan_jax.errors import ConfigError


def converter(convert_to_numpy: bool, convert_to_tensor: bool) -> Callable[[np.ndarray], Any]:
    """Function that brings vectors [N, D] to what was asked for: an array, a torch tensor, or a list of N torch tensors.

    `convert_to_tensor` counts before `convert_to_numpy`, as in sentence-transformers. Raises `ConfigError` when torch is not installed.
    """
    if convert_to_numpy and not convert_to_tensor:
        return lambda vectors: vectors
    try:
        import torch
    except ImportError as error:
        asked = "convert_to_tensor=True" if convert_to_tensor else "convert_to_numpy=False"
        raise ConfigError(f"{asked} needs torch, which is not installed; drop the option for a NumPy array, or install torch") from error
    return torch.from_numpy if convert_to_tensor else lambda vectors: list(torch.from_numpy(vectors))


def check_output(output_value: object, device: object) -> None:
    """Raise `ConfigError` for an `output_value` other than vectors of texts; warn once that `device` has no effect."""
    if output_value != "sentence_embedding":
        raise ConfigError(f"output_value {output_value!r} is not supported, only 'sentence_embedding'; for vectors of tokens export the model "
                          "(`conan export`) and use sentence-transformers")
    if device is not None:
        _warn_of_device()


@functools.cache
def _warn_of_device() -> None:
    warnings.warn("device has no effect: JAX encodes on all its devices; choose them by devices= of the Encoder, or by the environment "
                  "variable JAX_PLATFORMS (cpu, cuda, tpu)", stacklevel=4)
