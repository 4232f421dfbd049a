"""The decoder and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conan_jax.config.checks import check, positive


@dataclass(frozen=True)
class Model:
    """The decoder of METHODS 1.1. Defaults are the published Conan-Embedding-v2 sizes."""

    vocab_size: int = 151_040
    hidden_size: int = 3584
    intermediate_size: int = 8192
    num_layers: int = 8
    num_heads: int = 32
    num_kv_heads: int = 8
    max_length: int = 32_768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    qk_norm: bool = False
    initializer_range: float = 0.02
    embedding_initializer_range: float | None = None  # None: initializer_range
    embedding_multiplier: float = 1.0  # token embeddings x this enter the first block; logits use the bare table
    hidden_dropout: float = 0.0  # of what each block adds to the residual stream; in training only
    pooling: str = "mean"  # a key of POOLINGS, or "package.module:attr"
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # parameters are always float32
    scan_layers: bool = True  # one compiled layer body (TPU); False unrolls (17-20 % faster on CPU)
    remat: Literal["none", "dots", "full"] = "full"
    attention: Literal["auto", "dense", "blockwise", "pallas_tpu"] = "auto"
    attention_block_size: int = 512  # tokens a side, of "blockwise"; off a TPU, "auto" is dense up to one block

    def __post_init__(self) -> None:
        positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                  "max_length", "rope_theta", "rms_norm_eps", "initializer_range", "embedding_multiplier", "attention_block_size")
        check(self.embedding_initializer_range is None or self.embedding_initializer_range > 0,
               f"model.embedding_initializer_range must be positive or null, got {self.embedding_initializer_range}")
        check(0 <= self.hidden_dropout < 1, f"model.hidden_dropout must lie in [0, 1), got {self.hidden_dropout}")
        check(self.hidden_size % self.num_heads == 0,
               f"model.hidden_size {self.hidden_size} must be a multiple of model.num_heads {self.num_heads}")
        check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even for RoPE; change model.num_heads")
        check(self.num_heads % self.num_kv_heads == 0,
               f"model.num_heads {self.num_heads} must be a multiple of model.num_kv_heads {self.num_kv_heads}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head, `hidden_size / num_heads` (112 in the full model)."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Tokenizer:
    """SentencePiece BPE with byte fallback. `path` names a trained model; otherwise one is trained on `datasets`."""

    vocab_size: int = 151_000
    path: str | None = None
    datasets: tuple[str, ...] = ()
    character_coverage: float = 0.9999
    max_training_bytes: int = 2_000_000_000

    def __post_init__(self) -> None:
        check(self.vocab_size >= 264, f"tokenizer.vocab_size must hold 256 bytes and the special ids, got {self.vocab_size}")
        check(0.9 <= self.character_coverage <= 1, f"tokenizer.character_coverage must lie in [0.9, 1], got {self.character_coverage}")
        positive(self, "max_training_bytes")
