"""AdamW with warmup, a decay and global-norm clipping (METHODS 1.2).

Which parameters decay follows from their logical axes, so a new pooling or adapter needs no entry here.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from conan_jax import config


def learning_rate_at(optimizer: config.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate of the update that follows `count` earlier ones, float32.

    Linear from peak/warmup to the peak over `warmup = round(warmup_fraction * steps)` updates, then to
    `final_fraction * peak` at the last one: peak * (f + (1 - f) * (1 + cos(pi u)) / 2) (cosine), peak * (1 - (1 - f) u)
    (linear), or peak (constant), with u in [0, 1].
    """
    peak, final = optimizer.learning_rate, optimizer.final_fraction
    warmup = round(optimizer.warmup_fraction * steps)
    decay_steps = max(steps - 1 - warmup, 1)
    if optimizer.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=final)
    elif optimizer.schedule == "linear":
        decay = optax.linear_schedule(peak, peak * final, decay_steps)
    else:
        decay = optax.constant_schedule(peak)
    if warmup == 0:
        return decay
    # The first update must move: a rate of zero would waste a batch.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def decay_mask(axes: Any) -> Any:
    """True where weight decay applies: matrices, save the embedding table; never norms, gains and biases."""
    def decays(names: tuple[str | None, ...]) -> bool:
        return not {"vocab", "norm"} & set(names) and len([n for n in names if n != "layers"]) >= 2

    return jax.tree.map(decays, axes, is_leaf=lambda names: isinstance(names, tuple))


def make_optimizer(optimizer: config.Optimizer, steps: int, axes: Any) -> optax.GradientTransformation:
    """Clip to `max_grad_norm` -> Adam -> decoupled decay -> learning rate. `axes`: logical axes of the parameters."""
    return optax.chain(
        optax.clip_by_global_norm(optimizer.max_grad_norm),
        optax.adamw(learning_rate_at(optimizer, steps), b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps,
                    weight_decay=optimizer.weight_decay, mask=decay_mask(axes)),
    )
