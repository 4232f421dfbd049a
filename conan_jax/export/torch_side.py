"""An export as PyTorch users load it: the stock classes of sentence-transformers and transformers, no remote code, no network.

The only module that imports torch, and only when one of its classes is made.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from conan_jax.errors import ConfigError
from conan_jax.versions import install_command, versions_of

PACKAGES = ("torch", "transformers", "sentence-transformers", "tokenizers")
Side = Literal["left", "right"]


def require() -> None:
    """Raises `ConfigError` naming the extra when PyTorch or its libraries are missing."""
    try:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a local folder needs no network, and must not ask for it
        import sentence_transformers  # noqa: F401
        import torch  # noqa: F401
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    except ImportError as error:
        raise ConfigError(f"this needs PyTorch, transformers and sentence-transformers ({error}); install them: "
                          f"{install_command(extra='torch')}; or check without them: --jax-only") from error


def versions() -> dict[str, str]:
    """Versions of what is installed here."""
    return versions_of(PACKAGES)


def ignores_flags() -> str:
    """Why the installed transformers computes other vectors than the export's; "" when it is recent enough."""
    found = metadata.version("transformers")
    numbers = tuple(int(part) if part.isdecimal() else 0 for part in found.split(".")[:2])
    if numbers >= (5, 2):
        return ""
    return (f"transformers {found} ignores \"is_causal\": false in config.json and attends causally, so an embedder's vectors are wrong; "
            f"install a newer one: {install_command('transformers>=5.2')}")


class TorchEmbedder:
    """`SentenceTransformer(folder)` on the CPU. `dtype`: None as the folder says, or the name of one to load it in."""

    def __init__(self, folder: Path, dtype: str | None = None) -> None:
        require()
        import sentence_transformers
        import torch

        options = {"dtype": getattr(torch, dtype)} if dtype else {}
        self.model = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs=options)

    def token_ids(self, texts: Sequence[str], prompt: str = "") -> list[list[int]]:
        """The ids that the model reads, prompt and EOS included, cut to the length of the folder."""
        rows = self.model.tokenizer([prompt + text for text in texts], truncation=True, max_length=self.model.max_seq_length)
        return rows["input_ids"]

    def encode(
        self, texts: Sequence[str], *, prompt: str = "", batch_size: int = 16, side: Side = "right", dim: int | None = None
    ) -> Float32[np.ndarray, "N D"]:
        """Return unit vectors, of the first `dim` numbers where it is given. No default prompt of the folder is used."""
        self.model.tokenizer.padding_side = side
        vectors = self.model.encode(list(texts), prompt=prompt, batch_size=batch_size, truncate_dim=dim, normalize_embeddings=True,
                                    show_progress_bar=False)
        return np.asarray(vectors, np.float32)

    def states(self, ids: Sequence[int]) -> list[Float32[np.ndarray, "L D"]]:
        """Of one row: the embeddings, then what each layer gives, through the final norm."""
        return _states(self.model[0].auto_model, ids)


class TorchLanguageModel:
    """`AutoModelForCausalLM` and `AutoTokenizer` of a folder, on the CPU."""

    def __init__(self, folder: Path, dtype: str | None = None) -> None:
        require()
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        options = {"dtype": getattr(torch, dtype)} if dtype else {}
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, **options).eval()

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without EOS."""
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def logits(self, ids: Sequence[int]) -> Float32[np.ndarray, "L V"]:
        """Next-token scores at each token of one row."""
        import torch

        with torch.no_grad():
            return self.model(torch.tensor([list(ids)])).logits[0].float().numpy()

    def states(self, ids: Sequence[int]) -> list[Float32[np.ndarray, "L D"]]:
        """As `TorchEmbedder.states`."""
        return _states(self.model.model, ids)


def _states(model: Any, ids: Sequence[int]) -> list[Float32[np.ndarray, "L D"]]:
    import torch

    with torch.no_grad():
        states = model(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
        inner = [model.norm(state) for state in states[1:-1]]
    return [state[0].float().numpy() for state in (states[0], *inner, states[-1])]
