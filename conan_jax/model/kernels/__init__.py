"""Pallas TPU kernels: flash attention forward and backward with the soft mask computed inside."""

from conan_jax.model.kernels.flash import flash_attention

__all__ = ["flash_attention"]
