"""The formulas of METHODS 1.1, 1.3 and 1.7 in plain NumPy float64, one row, one head and one token at a time."""

import dataclasses

import numpy as np


def soft_mask(alpha, index, length):
    """M for one sequence, element by element, 1-based."""
    m = np.ones((length, length))
    for i in range(1, length + 1):
        for j in range(i + 1, length + 1):
            m[i - 1, j - 1] = min(alpha * length / (j if index == "key" else i), 1.0)
    return m


def attention(q, k, v, m, apply="log"):
    """One segment: q [l, H, C], k and v [l, K, C], m [l, l] -> [l, H, C]."""
    l, heads, width = q.shape
    out = np.zeros((l, heads, width))
    for h in range(heads):
        g = h // (heads // k.shape[1])
        for i in range(l):
            s = q[i, h] @ k[:, g].T / np.sqrt(width)
            w = m[i] * np.exp(s - s.max()) if apply == "log" else np.exp(s * m[i])
            out[i, h] = (w / w.sum()) @ v[:, g]
    return out


def attention_rows(q, k, v, segment_ids, matrix_of, apply="log"):
    """Packed and padded rows [B, L, ...]: every segment on its own, padding zero. `matrix_of(length)` gives M."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, row in enumerate(np.asarray(segment_ids)):
        for segment in set(row.tolist()) - {0}:
            at = np.flatnonzero(row == segment)
            out[b, at] = attention(q[b, at], k[b, at], v[b, at], matrix_of(len(at)), apply)
    return out


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def slowed(frequency, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Llama 3.1's rule for one frequency, by wavelength in three cases, as its authors put it."""
    wavelength = 2 * np.pi / frequency
    if wavelength < original_max_position_embeddings / high_freq_factor:
        return frequency
    if wavelength > original_max_position_embeddings / low_freq_factor:
        return frequency / factor
    smooth = (original_max_position_embeddings / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rope(x, theta, scaling=None):
    """x [l, H, C], token p at position p: each pair (x_c, x_{c + C/2}) turned by p * theta^(-2c/C), as a complex number."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    frequencies = theta ** (-np.arange(half) * 2.0 / (2 * half))
    if scaling is not None:
        frequencies = np.array([slowed(f, **dataclasses.asdict(scaling)) for f in frequencies])
    angle = np.arange(len(x))[:, None] * frequencies
    z = z * np.exp(1j * angle)[:, None, :]
    return np.concatenate([z.real, z.imag], axis=-1)


def forward(params, c, inputs, m, apply="log"):
    """Final-norm hidden states [l, D] of one sequence of token ids, or of ready embeddings [l, D]."""
    layers = params["layers"]
    x = np.asarray(inputs, np.float64) if np.ndim(inputs) == 2 else params["embedding"][np.asarray(inputs)] * c.embedding_multiplier
    for n in range(c.num_layers):
        a, f = layers["attention"], layers["mlp"]
        y = rms_norm(x, layers["attention_norm"]["scale"][n], c.rms_norm_eps)
        q, k, v = (y @ a[f"{name}_proj"]["kernel"][n] + (a[f"{name}_proj"]["bias"][n] if c.attention_bias else 0) for name in "qkv")
        q, k, v = (part.reshape(len(x), -1, c.head_dim) for part in (q, k, v))
        if c.qk_norm:
            q = rms_norm(q, a["q_norm"]["scale"][n], c.rms_norm_eps)
            k = rms_norm(k, a["k_norm"]["scale"][n], c.rms_norm_eps)
        o = attention(rope(q, c.rope_theta, c.rope_scaling), rope(k, c.rope_theta, c.rope_scaling), v, m, apply)
        x = x + o.reshape(len(x), -1) @ a["o_proj"]["kernel"][n] + (a["o_proj"]["bias"][n] if c.attention_output_bias else 0)
        y = rms_norm(x, layers["mlp_norm"]["scale"][n], c.rms_norm_eps)
        gate = y @ f["gate_proj"]["kernel"][n]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ f["up_proj"]["kernel"][n])) @ f["down_proj"]["kernel"][n]
    return rms_norm(x, params["final_norm"]["scale"], c.rms_norm_eps)
