"""An encoder that encodes no text twice, and the same encoder at fewer dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from conan_jax.inference.encoder import normalised

TEXTS_PER_CALL = 2048  # between two movements of a progress bar


class _BothSides:
    """Queries and documents are encoded by `encode`, each after its prompt."""

    def encode_query(
        self, inputs: Sequence[str], prompt_name: str | None = "query", prompt: str | None = None, **options: Any
    ) -> np.ndarray:
        """As `Encoder.encode_query`."""
        return self.encode(inputs, prompt_name, prompt, **options)

    def encode_document(
        self, inputs: Sequence[str], prompt_name: str | None = "document", prompt: str | None = None, **options: Any
    ) -> np.ndarray:
        """As `Encoder.encode_document`."""
        return self.encode(inputs, prompt_name, prompt, **options)


class Remembering(_BothSides):
    """`encoder` with a memory: what looks at one set in several ways pays for its texts once. For one set at a time, by its size.

    `progress(done, total)` counts the texts that were encoded since it was made; `cut` of them were longer than `max_length`.
    """

    def __init__(self, encoder: Any, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        self._encoder, self._progress = encoder, progress
        self._rows: dict[tuple[str, int | None], dict[str, int]] = {}
        self._vectors: dict[tuple[str, int | None], Float32[np.ndarray, "N D"]] = {}
        self._done = self._total = self.cut = 0
        self.prompts, self.model = encoder.prompts, encoder.model

    def encode(
        self, inputs: Sequence[str], prompt_name: str | None = None, prompt: str | None = None, *, max_length: int | None = None
    ) -> Float32[np.ndarray, "N D"]:
        """As `Encoder.encode`, of a list of texts."""
        before = prompt if prompt is not None else self.prompts[prompt_name] if prompt_name else ""
        rows = self._rows.setdefault((before, max_length), {})
        new = [text for text in dict.fromkeys(inputs) if text not in rows]
        self._total += len(new)
        parts = [self._vectors[before, max_length]] if rows else []
        for start in range(0, len(new), TEXTS_PER_CALL):
            texts, before_cut = new[start : start + TEXTS_PER_CALL], self._encoder.texts_cut
            parts.append(self._encoder.encode(texts, prompt=before, max_length=max_length))
            self._done += len(texts)
            self.cut += self._encoder.texts_cut - before_cut
            self._progress(self._done, self._total)
        if new:
            self._vectors[before, max_length] = np.concatenate(parts)
            rows.update({text: len(rows) + i for i, text in enumerate(new)})
        return self._vectors[before, max_length][[rows[text] for text in inputs]]

    @property
    def texts(self) -> int:
        """How many different texts it has encoded."""
        return self._done


class Truncated(_BothSides):
    """The first `dimension` numbers of the vectors of `encoder`, of length 1 again, as a Matryoshka model is used (arXiv 2205.13147)."""

    def __init__(self, encoder: Remembering, dimension: int) -> None:
        self._encoder, self.dimension = encoder, dimension
        self.prompts, self.model = encoder.prompts, encoder.model

    def encode(
        self, inputs: Sequence[str], prompt_name: str | None = None, prompt: str | None = None, *, max_length: int | None = None
    ) -> Float32[np.ndarray, "N d"]:
        """The vectors of `encoder`, cut and of length 1; a vector that is zero up to there stays zero."""
        vectors = self._encoder.encode(inputs, prompt_name, prompt, max_length=max_length)[:, : self.dimension]
        return normalised(vectors)
