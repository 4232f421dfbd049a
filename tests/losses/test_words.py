"""The vocabulary loss on eight devices: the numbers of one device, and no device with logits of words that are not its own."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from conan_jax import config, sharding
from conan_jax.losses import lm
from conan_jax.losses.words import Words, words_on_mesh

SHAPE = re.compile(r"[a-z]\w*\[([\d,]*)\]")
TALK = re.compile(r"= (.*) (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def problem(T, V, D, seed=0):
    r = np.random.default_rng(seed)
    weights = np.where(r.random(T) < 0.3, 0.0, r.random(T))
    arrays = r.normal(size=(T, D)), r.normal(size=(V, D)), r.integers(0, V, T), weights
    return tuple(jnp.asarray(a, jnp.int32 if a.dtype == np.int64 else jnp.float32) for a in arrays)


def on_mesh(mesh, arrays, chunk, z=0.1):
    """The compiled value and gradients with everything laid out as the trainer lays it out, and the arguments."""
    axes = (("tokens", None), ("vocab", "embed"), ("tokens",), ("tokens",))
    layout = tuple(NamedSharding(mesh, sharding.partition_spec(names, a.shape, mesh)) for names, a in zip(axes, arrays, strict=True))
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    value = jax.value_and_grad(lambda *a: 3.0 * lm.chunked_cross_entropy(*a, chunk, z, groups=groups)[0], argnums=(0, 1, 3))
    arguments = jax.device_put(arrays, layout)
    with sharding.activate(mesh):
        compiled = jax.jit(value, out_shardings=(None, (layout[0], layout[1], layout[3]))).lower(*arguments).compile()
    return compiled, arguments


# The number of neighbours that split the words follows from the sizes: 1 with few words, more with many.
@pytest.mark.parametrize("data, fsdp, tensor, V, share", [
    (1, 4, 2, 32, 1), (1, 4, 2, 160, 2), (1, 8, 1, 480, 8), (2, 4, 1, 160, 4), (1, 1, 8, 64, 1), (8, 1, 1, 160, 1),
    (1, 4, 2, 161, 1), (2, 2, 2, 4096, 2)])
def test_many_devices_give_the_numbers_of_one(data, fsdp, tensor, V, share, monkeypatch):
    monkeypatch.setattr(lm, "WORDS_AT_ONCE", 64)
    mesh = sharding.make_mesh(config.Mesh(data, fsdp, tensor))
    arrays = problem(T=80, V=V, D=16)
    with sharding.activate(mesh):
        assert words_on_mesh(80, (V, 16), data * fsdp).share == share
    value = jax.value_and_grad(lambda *a: 3.0 * lm.chunked_cross_entropy(*a, 80, 0.1)[0], argnums=(0, 1, 3))
    compiled, arguments = on_mesh(mesh, arrays, chunk=4)
    for got, want in zip(jax.tree.leaves(compiled(*arguments)), jax.tree.leaves(value(*arrays)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("data, fsdp, tensor, share", [(1, 4, 2, 1), (1, 4, 2, 4), (1, 8, 1, 8)])
def test_no_device_holds_logits_of_all_words(data, fsdp, tensor, share, monkeypatch):
    """In the compiled program, with sizes that tell what an array is: 263 and 7 divide nothing else here."""
    monkeypatch.setattr("conan_jax.losses.lm.words_on_mesh", lambda *sizes: dataclasses.replace(words_on_mesh(*sizes), share=share))
    mesh = sharding.make_mesh(config.Mesh(data, fsdp, tensor))
    V, D, chunk = 8 * 263, 8, 7
    compiled, _ = on_mesh(mesh, problem(16 * chunk, V, D), chunk)
    program = compiled.as_text()
    shapes = {tuple(map(int, s.split(","))) for s in SHAPE.findall(program) if s}
    own = V // tensor // share
    assert (share * chunk, own) in shapes  # the logits of one chunk
    assert not [s for s in shapes if V in s and (share * chunk in s or chunk in s)]
    exchanged = [set(shape.split(",")) for results in TALK.findall(program) for shape in SHAPE.findall(results)]
    # Logits never travel; what does is vectors over tokens, states, and the table, of which a device gets its own words alone.
    assert exchanged and not [sizes for sizes in exchanged if {str(own), str(share * chunk)} <= sizes]


def test_only_states_travel_inside_the_loop():
    """The table and its gradient are exchanged once, whatever the number of chunks; with whole tables nothing is exchanged inside."""
    mesh = sharding.make_mesh(config.Mesh(1, 8, 1))
    compiled, _ = on_mesh(mesh, problem(T=512, V=32, D=8), chunk=2)
    bodies, entry = compiled.as_text().split("\nENTRY ")
    assert " while(" in entry and TALK.search(entry) and not TALK.search(bodies)


def test_tokens_that_are_whole_on_every_device():
    mesh = sharding.make_mesh(config.Mesh(2, 2, 2))
    arrays = problem(T=9, V=32, D=8)
    with sharding.activate(mesh):
        assert words_on_mesh(9, (32, 8), 1) == Words(words=("tensor",))
        got = jax.jit(jax.grad(lambda *a: lm.chunked_cross_entropy(*a, 4)[0], argnums=(0, 1)))(*arrays)
    want = jax.grad(lambda *a: lm.chunked_cross_entropy(*a, 4)[0], argnums=(0, 1))(*arrays)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    with sharding.activate(mesh), pytest.raises(ValueError, match="into 4 parts"):
        lm.chunked_cross_entropy(*problem(T=8, V=32, D=8), 4, groups=8)


def test_the_full_model_on_a_pod_shares_words_between_eight_neighbours():
    """1,503M parameters over 256 devices of which each has 4096 tokens: sqrt(151,040 / 4096) = 6.1."""
    mesh = jax.sharding.AbstractMesh((1, 256, 1), sharding.MESH_AXES)
    with jax.sharding.use_abstract_mesh(mesh), sharding.nn.logical_axis_rules(tuple(sharding.RULES.items())):
        assert words_on_mesh(256 * 4096, (151_040, 3584), 256) == Words(("fsdp",), (), ("fsdp",), 8)
