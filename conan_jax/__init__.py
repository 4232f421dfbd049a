"""conan_jax: train text embedders from scratch in JAX, after Conan-Embedding-v2.

Axis letters in shape comments and jaxtyping annotations, everywhere in the package:

    B  examples in a batch            T  tokens of a flattened batch (B * L)
    L  tokens of a sequence           V  vocabulary
    D  model width (hidden_size)      F  feed-forward width (intermediate_size)
    H  query heads                    K  key/value heads       G  query heads per kv head (H / K)
    C  head width (head_dim)          P  candidates in a pool  S  hard-negative slots
    N  examples of a dataset
"""

from conan_jax import allocator

__version__ = "0.1.0"

allocator.configure()


def __getattr__(name: str):
    """`conan_jax.Encoder`, imported on first use so that `import conan_jax` stays free of jax."""
    if name == "Encoder":
        from conan_jax.inference.encoder import Encoder

        return Encoder
    raise AttributeError(f"module 'conan_jax' has no attribute {name!r}")
