"""`check.json`: a few texts and what the exported weights make of them, so that any program can tell whether it loaded them right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from conan_jax import config
from conan_jax.export.source import Source
from conan_jax.inference.encoder import Encoder
from conan_jax.inference.prompts import QUERY
from conan_jax.model import Bidirectional, Causal, Embedder, Layout

TEXTS = ("The quick brown fox jumps over the lazy dog.", "我们在图书馆里读书。", "Où se trouve la gare la plus proche ?", "")
TOP = 5  # next tokens that are listed


def make(params: Any, model: config.Model, source: Source) -> dict[str, Any]:
    """The content of `check.json`, computed in float32 whatever the dtype of the weights.

    An embedder: `{"checks": [{"text", "prompt", "vector": [D]}]}`, unit vectors. A language model: `{"text", "ids", "hidden": [D],
    "next": [[id, logit]]}`, of the last token, without EOS.
    """
    checks = _next_tokens(params, model, source) if source.causal else _vectors(params, model, source)
    return {"computed_in": "float32", "checks": checks}


def _vectors(params: Any, model: config.Model, source: Source) -> list[dict[str, Any]]:
    mask, prompts = Causal() if source.mask == "causal" else Bidirectional(), source.prompts
    encoder = Encoder(params, replace(model, compute_dtype="float32"), source.tokenizer, mask, texts=source.texts)
    chosen = [(text, "") for text in TEXTS] + ([(TEXTS[0], prompts[QUERY])] if prompts.get(QUERY) else [])
    return [{"text": text, "prompt": prompt, "vector": _numbers(encoder.encode(text, prompt=prompt))} for text, prompt in chosen]


def _next_tokens(params: Any, model: config.Model, source: Source) -> list[dict[str, Any]]:
    embedder = Embedder(replace(model, compute_dtype="float32"))
    checks = []
    for text in filter(None, TEXTS):
        ids = source.tokenizer.encode(text)
        row = jnp.array([ids], jnp.int32)
        hidden = embedder.hidden(params, row, Layout.from_lengths(jnp.array([len(ids)]), len(ids)), Causal())[0, -1]
        logits = np.asarray(embedder.logits(params, hidden))
        best = np.argsort(-logits, kind="stable")[:TOP]
        checks.append({"text": text, "ids": list(ids), "hidden": _numbers(hidden), "next": [[int(i), float(logits[i])] for i in best]})
    return checks


def _numbers(array: Any) -> list[float]:
    return [float(f"{x:.9g}") for x in np.asarray(array, np.float32)]
