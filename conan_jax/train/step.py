"""One update, the same for every stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from conan_jax.stages.base import Batch, Metrics, Stage
from conan_jax.train.state import TrainState, shardings_of


def make_train_step(stage: Stage, optimizer: optax.GradientTransformation, schedule: optax.Schedule, seed: int,
                    abstract: TrainState) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`train_step(state, batch) -> (state, metrics)`, jitted once: the state is donated, its shardings are pinned.

    A non-finite loss or gradient keeps parameters, optimizer state and carry; it is counted in `skipped` and
    `skipped_in_row`. Metrics of the stage are joined by loss, grad_norm (before clipping), learning_rate, skipped,
    skipped_in_row; all float32 scalars.
    """
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, (carry, metrics)), grads = jax.value_and_grad(stage.loss, has_aux=True)(state.params, state.carry, batch, state.step, rng)
        # Left to the compiler, a gradient may come back whole: the same numbers, and more memory and exchange than its parameter takes.
        grads = jax.lax.with_sharding_constraint(grads, shardings_of(abstract.params))
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        bad = 1 - finite.astype(jnp.int32)
        skipped, in_row = state.skipped + bad, (state.skipped_in_row + bad) * bad
        # The optimizer's own count stands still on a skipped update, and so does the schedule.
        learning_rate = schedule(state.step - state.skipped)
        metrics = dict(metrics, loss=loss, grad_norm=grad_norm, learning_rate=learning_rate, skipped=skipped, skipped_in_row=in_row)
        state = TrainState(step=state.step + 1, params=keep(params, state.params), opt_state=keep(opt_state, state.opt_state),
                           carry=keep(carry, state.carry), skipped=skipped, skipped_in_row=in_row)
        return state, jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), metrics)

    everywhere = NamedSharding(abstract.step.sharding.mesh, PartitionSpec())
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings_of(abstract), everywhere))
