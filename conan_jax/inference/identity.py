"""Who made a vector: the names of a run, and digests of its tokenizer and of its weights, which tell two runs of one name apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from conan_jax import config
from conan_jax.hf.weights import to_tensors

_OUTPUT_BIAS = ".self_attn.o_proj.bias"


def weights_sha256(params: Any, model: config.Model) -> str:
    """The sha256 of the numbers that vectors follow from, the same of a run and of its float32 export.

    Of each tensor of the bare float32 form (`hf.weights.to_tensors`: the multiplier of the embeddings within their table, no output
    table), in the order of the names: "NAME [SHAPE]\\n" and its bytes. An output bias of zeros counts as none, since an export may need
    one. One tensor at a time is copied; 1.5 GB/s.
    """
    digest = hashlib.sha256()
    # Hugging Face has no place for the numbers of a pooling; they follow on their own.
    tensors = to_tensors(params, replace(model, pooling="mean"))
    for name in sorted(tensors):
        tensor = tensors[name]
        if not name.endswith(_OUTPUT_BIAS) or tensor.any():
            _add(digest, name, tensor)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params.get("pooling", {})):
        _add(digest, f"pooling{jax.tree_util.keystr(path)}", np.asarray(leaf, np.float32))
    return digest.hexdigest()


def described(identity: Mapping[str, Any]) -> str:
    """An identity in words, for a message."""
    where = " ".join(str(identity[key]) for key in ("run", "stage") if key in identity) or "a model"
    digests = (f"{kind} {str(identity.get(f'{kind}_sha256', 'unknown'))[:12]}" for kind in ("tokenizer", "weights"))
    return f"{where} step {identity.get('step', '?')} ({', '.join(digests)})"


def _add(digest: Any, name: str, tensor: np.ndarray) -> None:
    digest.update(f"{name} {list(tensor.shape)}\n".encode())
    digest.update(np.ascontiguousarray(tensor))
