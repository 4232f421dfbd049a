"""The decoder and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conan_jax.config.checks import check, check_values, positive, read_under


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rule for rows longer than those of pretraining: slow rotations become `factor` times slower, fast ones stay.

    A frequency of wavelength w tokens is slow when w > original_max_position_embeddings / low_freq_factor, fast when
    w < original_max_position_embeddings / high_freq_factor, and in between a blend of the two.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        check_values(self)
        positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        check(self.low_freq_factor < self.high_freq_factor,
               f"rope_scaling.low_freq_factor {self.low_freq_factor} must be below high_freq_factor {self.high_freq_factor}")


@dataclass(frozen=True)
class Model:
    """The decoder of METHODS 1.1. Defaults are the published Conan-Embedding-v2 sizes; with the other settings it is a Llama,
    Mistral, Qwen2 or Qwen3 (`conan_jax.hf.architectures`)."""

    vocab_size: int = 151_040
    hidden_size: int = 3584
    intermediate_size: int = 8192
    num_layers: int = 8
    num_heads: int = 32
    num_kv_heads: int = 8
    attention_head_dim: int | None = None  # None: hidden_size / num_heads
    max_length: int = 32_768
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    qk_norm: bool = False  # RMSNorm of each head of q and k, before RoPE (Qwen3)
    attention_bias: bool = False  # of the q, k and v maps (Qwen2)
    attention_output_bias: bool = False  # of the map back into the residual stream
    tie_word_embeddings: bool = True  # logits through the token embeddings; False: through a table of their own
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
        check_values(self)
        positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                  "max_length", "rope_theta", "rms_norm_eps", "initializer_range", "embedding_initializer_range", "embedding_multiplier",
                  "attention_block_size", "attention_head_dim")
        check(0 <= self.hidden_dropout < 1, f"model.hidden_dropout must lie in [0, 1), got {self.hidden_dropout}")
        if self.attention_head_dim is None:
            check(self.hidden_size % self.num_heads == 0,
                   f"model.hidden_size {self.hidden_size} must be a multiple of model.num_heads {self.num_heads}, "
                   "or model.attention_head_dim be given")
        check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even for RoPE; change model.num_heads or model.attention_head_dim")
        check(self.num_heads % self.num_kv_heads == 0,
               f"model.num_heads {self.num_heads} must be a multiple of model.num_kv_heads {self.num_kv_heads}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head: `attention_head_dim`, by default `hidden_size / num_heads` (112 in the full model)."""
        return self.attention_head_dim or self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Tokenizer:
    """SentencePiece BPE with byte fallback, trained on `datasets`; or, with a `path`, the tokenizer in that folder.

    With a `path` the other fields have no meaning. `--set tokenizer='{"path": "FOLDER"}'` replaces all of them.
    """

    vocab_size: int | None = None  # 151,000 by default
    path: str | None = None
    datasets: tuple[str, ...] = ()  # empty: all datasets of the stages
    character_coverage: float | None = None  # 0.9999 by default
    max_training_bytes: int | None = None  # 2,000,000,000 by default

    def __post_init__(self) -> None:
        check_values(self)
        positive(self, "vocab_size", "max_training_bytes")
        read_under(self, "path", self.path, {
            "vocab_size": ((None,), 151_000), "datasets": ((None,), ()), "character_coverage": ((None,), 0.9999),
            "max_training_bytes": ((None,), 2_000_000_000),
        })
        if self.path is None:
            check(self.vocab_size >= 264, f"tokenizer.vocab_size must hold 256 bytes and the special ids, got {self.vocab_size}")
            check(0.9 <= self.character_coverage <= 1, f"tokenizer.character_coverage must lie in [0.9, 1], got {self.character_coverage}")
