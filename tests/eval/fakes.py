"""Encoders without a model, and files for evaluation."""

from types import SimpleNamespace

import numpy as np

from conan_jax.errors import ConfigError


class WordEncoder:
    """Texts -> normalised counts of known words: similarity is word overlap, computed by hand in tests."""

    def __init__(self, words, name="words"):
        self.words = list(words)
        self.identity = {"run": name, "stage": "s", "step": 1, "tokenizer_sha256": "f" * 64}
        self.model = SimpleNamespace(max_length=512)
        self.prompts = {"query": "", "document": ""}
        self.dimension = len(self.words)
        self.calls = []
        self.texts_cut = 0

    def prompt(self, name=None, prompt=None):
        if prompt is None and name not in self.prompts:
            raise ConfigError(f"there is no prompt {name!r}")
        return self.prompts[name] if prompt is None else prompt

    def row_length(self, max_length=None):
        return max_length or 512

    def encode(self, inputs, prompt_name=None, prompt=None, batch_size=64, show_progress_bar=False, max_length=None, truncate_dim=None):
        texts = list(inputs)
        self.calls.append((texts, prompt if prompt is not None else self.prompts.get(prompt_name, ""), max_length))
        counts = np.array([[t.split().count(w) for w in self.words] for t in texts], np.float32).reshape(len(texts), -1)
        counts = counts[:, :truncate_dim]
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)

    def encode_query(self, inputs, prompt_name="query", prompt=None, **options):
        return self.encode(inputs, prompt_name, prompt, **options)

    def encode_document(self, inputs, prompt_name="document", prompt=None, **options):
        return self.encode(inputs, prompt_name, prompt, **options)
