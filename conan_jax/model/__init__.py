"""The model: a decoder with a soft attention mask, behind one door, `Embedder`."""

from conan_jax.model.attention import attention
from conan_jax.model.embedder import Embedder, num_params
from conan_jax.model.layout import Layout
from conan_jax.model.pooling import POOLINGS
from conan_jax.model.softmask import Bidirectional, Causal, Mask, SoftMask, alpha_at, mask_bias, mask_matrix

__all__ = [
    "POOLINGS", "Bidirectional", "Causal", "Embedder", "Layout", "Mask", "SoftMask",
    "alpha_at", "attention", "mask_bias", "mask_matrix", "num_params",
]
