"""A whole recipe as frozen dataclasses: model, data, mesh, stages, evaluations.

No jax here: a launcher or a linter can read a configuration on a machine without it. A value
that contradicts another one raises `ConfigError` when the object is made, never at step 10,000.
Rendering, `--set` overrides and loading of `configs/*.py` live in `conan_jax.config_io`.
"""

from conan_jax.config.data import Bucket, Dataset, Evaluation, Mix, RecordKind, Task
from conan_jax.config.model import Model, RopeScaling, Tokenizer
from conan_jax.config.objectives import Contrastive, HardNegatives, Matryoshka, SoftMask
from conan_jax.config.run import Run
from conan_jax.config.stages import AnyStage, CustomStage, LMStage, Stage, SupervisedStage, WeakStage
from conan_jax.config.training import Mesh, Optimizer

__all__ = [
    "AnyStage", "Bucket", "Contrastive", "CustomStage", "Dataset", "Evaluation", "HardNegatives", "LMStage", "Matryoshka", "Mesh", "Mix",
    "Model", "Optimizer", "RecordKind", "RopeScaling", "Run", "SoftMask", "Stage", "SupervisedStage", "Task", "Tokenizer", "WeakStage",
]
