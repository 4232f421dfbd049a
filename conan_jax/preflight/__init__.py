"""Will this stage fit this accelerator, and what will it cost? Asked of the compiler, before anything is rented.

`check` compiles the step that `conan train` would run and reads memory and communication from the program itself;
`advice.fixes` are the settings that make a program smaller. Nothing here imports jax before it is called: `environment`
must be able to say first what jax is to find.
"""

from __future__ import annotations

from collections.abc import Mapping

from conan_jax import config
from conan_jax.hardware import Accelerator
from conan_jax.preflight.report import Report


def check(run: config.Run, stage_config: config.AnyStage, accelerator: Accelerator, *, slices: int = 1, hbm_bytes: int | None = None,
          num_examples: Mapping[str, int] | None = None, thorough: bool = False) -> Report:
    """What one update of a stage takes on an accelerator: compiled for it, on whatever machine this is.

    Args:
        slices: so many of the accelerator, joined by their hosts' network.
        hbm_bytes: the limit of one device, instead of its chip's.
        num_examples: records of each task, "" where a stage has but one; they size the carry. None: one epoch is assumed,
            steps x batch.
        thorough: compile with full effort whatever it takes. A stage with rows of two lengths or more holds that many copies of the
            model; for a TPU it is compiled with little effort, unless that leaves any doubt whether it fits.

    Raises:
        ConfigError: the stage does not go with the mesh, libtpu is not installed, the accelerator can only be compiled for on
            itself (a GPU), or this process has too few CPU devices (`environment.prepare` makes them).
    """
    from conan_jax.preflight.checker import check_stage

    return check_stage(run, stage_config, accelerator, slices=slices, hbm_bytes=hbm_bytes, num_examples=num_examples,
                       thorough=thorough)


__all__ = ["Report", "check"]
