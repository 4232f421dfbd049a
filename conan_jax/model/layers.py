"""The parts of a decoder block: Linear, RMSNorm, RoPE, SwiGLU, grouped-query self-attention (METHODS 1.1).

Parameters are float32 and carry logical axis names. Activations are two-dimensional, [tokens, features]: with three axes
XLA's CPU backend materialises transposes in the gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from conan_jax import config
from conan_jax.model.attention import attention
from conan_jax.model.axes import current_axes
from conan_jax.model.gradients import gated, normalised, product
from conan_jax.model.layout import Layout
from conan_jax.model.softmask import Mask


class Linear(nn.Module):
    """y = x W, or x W + b. W is float32 [in, out], cast to the dtype of `x`. All seven maps of a block are this one class."""

    features: int
    axes: tuple[str, str]
    stddev: float
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.stddev), self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        y = product(x, kernel.astype(x.dtype))
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            y = y + self.param("bias", zeros, (self.features,), jnp.float32).astype(x.dtype)
        return y


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32; returned in the dtype of `x`."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],), jnp.float32)
        return normalised(x, scale, self.eps)


def rope_tables(
    positions: Int[Array, "B L"], head_dim: int, theta: float, scaling: config.RopeScaling | None = None
) -> tuple[Float[Array, "B L C"], Float[Array, "B L C"]]:
    """cos and sin of position * f_c with f_c = theta^(-2c/C), c = 0 .. C/2-1, written twice side by side; float32. Positions are below L.

    With `scaling` (the rule published with Llama 3.1): of wavelength w = 2 pi / f and O = original_max_position_embeddings,
    f becomes s f + (1 - s) f / factor with s = clip((O / w - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1).
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * jnp.pi)
        kept = jnp.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    angles = jnp.arange(positions.shape[1], dtype=jnp.float32)[:, None] * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    # Looked up, not computed for each token: XLA takes a cosine for cheap, and on a CPU would compute it anew in every kernel that reads
    # it, for every head of every layer, in both passes.
    return tuple(jnp.take(table, positions, axis=0, mode="clip") for table in (jnp.cos(angles), jnp.sin(angles)))


def apply_rope(x: Float[Array, "B L H C"], cos: Float[Array, "B L C"], sin: Float[Array, "B L C"]) -> Float[Array, "B L H C"]:
    """Rotate the pairs (x_c, x_{c+C/2}): the half-split convention of Llama checkpoints. float32 inside."""
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)  # exact in any type: what is kept of it is half as large as in float32
    return (x.astype(jnp.float32) * cos[:, :, None] + rotated.astype(jnp.float32) * sin[:, :, None]).astype(x.dtype)


class SelfAttention(nn.Module):
    """x -> W_o attention(rope(W_q x), rope(W_k x), W_v x), with RMSNorm on each head of q and k when `qk_norm`."""

    config: config.Model

    @nn.compact
    def __call__(self, x: Float[Array, "T D"], rope: tuple[Array, Array], layout: Layout, mask: Mask) -> Float[Array, "T D"]:
        c = self.config
        B, L = layout.positions.shape
        heads = {"q": (c.num_heads, "heads"), "k": (c.num_kv_heads, "kv_heads"), "v": (c.num_kv_heads, "kv_heads")}
        parts = {}
        for name, (n, axis) in heads.items():
            y = Linear(n * c.head_dim, ("embed", axis), c.initializer_range, c.attention_bias, name=f"{name}_proj")(x)
            y = constrain(y.reshape(B, L, n, c.head_dim), "batch", "length", axis, None)
            if c.qk_norm and name != "v":
                y = RMSNorm(c.rms_norm_eps, name=f"{name}_norm")(y)
            parts[name] = y if name == "v" else apply_rope(y, *rope)
        out = attention(parts["q"], parts["k"], parts["v"], mask, layout, implementation=c.attention, block_size=c.attention_block_size)
        out = constrain(out, "batch", "length", "heads", None).reshape(*x.shape[:-1], -1)
        return Linear(c.hidden_size, ("heads", "embed"), residual_stddev(c), c.attention_output_bias, name="o_proj")(out)


class SwiGLU(nn.Module):
    """x -> W_down (silu(W_gate x) * W_up x)."""

    config: config.Model

    @nn.compact
    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        c = self.config
        gate = Linear(c.intermediate_size, ("embed", "mlp"), c.initializer_range, name="gate_proj")(x)
        up = Linear(c.intermediate_size, ("embed", "mlp"), c.initializer_range, name="up_proj")(x)
        inner = constrain(gated(gate, up), "tokens", "mlp")
        return Linear(c.hidden_size, ("mlp", "embed"), residual_stddev(c), name="down_proj")(inner)


def constrain(x: Array, *names: str | None) -> Array:
    """`nn.with_logical_constraint`, except that a dimension which the devices do not divide stays whole (2 kv heads over 4 devices)."""
    if not nn.get_logical_axis_rules() or jax.sharding.get_abstract_mesh().empty:
        return x
    divided = (name if current_axes(name, size) else None for name, size in zip(names, x.shape, strict=True))
    return nn.with_logical_constraint(x, tuple(divided))


def residual_stddev(c: config.Model) -> float:
    """initializer_range / sqrt(2 * num_layers) for maps that write to the residual stream, whose variance then does not grow with depth."""
    return c.initializer_range * (2 * c.num_layers) ** -0.5
