"""The published sizes give the published number of parameters, counted from the real module without making an array."""

import jax

from conan_jax.config import Model
from conan_jax.model import Embedder, num_params


def test_full_model_has_1503_million_parameters():
    assert num_params(Model()) == 1_502_932_480


def test_outside_the_embedding_table():
    shapes = jax.eval_shape(Embedder(Model()).init, jax.random.key(0))
    assert num_params(Model()) - shapes["embedding"].size == 961_605_120
