"""Our encoder as an mteb 2.x model: `mteb.evaluate(MtebEncoder("runs/demo"), tasks)` (Muennighoff et al. 2023, arXiv 2210.07316)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from conan_jax.data.transforms import query_prompt
from conan_jax.errors import ConfigError, DataError
from conan_jax.inference.encoder import Encoder
from conan_jax.versions import install_command

class MtebEncoder:
    """What mteb asks of a model: `encode`, `similarity`, `similarity_pairwise`, `mteb_model_meta`.

    Which prompt a text is read after follows mteb's order, from the encoder's own prompts: TASK-query, TASK, TYPE-query, TYPE,
    "query" (and the same with document); here TASK is mteb's name of a task and TYPE its type, such as STS. A task that none of
    them fits is read bare, or, with `task_instructions`, after "Instruct: {mteb's own instruction}\\nQuery: "; documents stay bare.

    Args:
        model: an `Encoder`, or the folder of a run, a stage or an export.
        task_instructions: use mteb's instruction where the encoder has no prompt.
        max_length: tokens a text is cut to; default: the encoder's.

    Raises `ConfigError` when mteb is not installed.
    """

    def __init__(
        self, model: Encoder | str | os.PathLike[str], revision: str | None = None, *, device: str | None = None,
        task_instructions: bool = False, max_length: int | None = None,
    ) -> None:
        _import_mteb()
        self.model = Encoder.load(model) if isinstance(model, str | os.PathLike) else model
        self.task_instructions, self.max_length = task_instructions, max_length

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None,
        **kwargs: Any,
    ) -> Float32[np.ndarray, "N D"]:
        """Unit vectors of the `text` of every batch of `inputs`, in their order. Of `kwargs`, mteb's options, `batch_size` is used."""
        texts = [text for batch in inputs for text in batch["text"]]
        options = {key: kwargs[key] for key in ("batch_size", "show_progress_bar") if key in kwargs}
        return self.model.encode(texts, prompt=self.prompt_for(task_metadata, prompt_type), max_length=self.max_length, **options)

    def prompt_for(self, task_metadata: Any, prompt_type: Any = None) -> str:
        """The string before the texts of a task, "" for none."""
        from mteb.models.abs_encoder import get_prompt_name

        name = get_prompt_name(self.model.prompts, task_metadata, prompt_type)
        if name is not None and (self.model.prompts[name] or not self.task_instructions):
            return self.model.prompts[name]
        side = None if prompt_type is None else prompt_type.value
        return query_prompt(_instruction_of(task_metadata, side)) if self.task_instructions and side != "document" else ""

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The cosine of every pair, [N, M], as the torch tensor that mteb's tasks make a number of."""
        import torch

        return torch.from_numpy(self.model.similarity(np.asarray(embeddings1), np.asarray(embeddings2)))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The cosine of row i and row i, [N], as a torch tensor."""
        import torch

        return torch.from_numpy(self.model.similarity_pairwise(np.asarray(embeddings1), np.asarray(embeddings2)))

    @property
    def mteb_model_meta(self) -> Any:
        """Name conan_jax/RUN, revision STAGE-STEP, sizes, framework. None is what a run does not know (licence, languages ...)."""
        from mteb.models import ModelMeta

        encoder, identity = self.model, self.model.identity
        count = sum(leaf.size for leaf in jax.tree_util.tree_leaves(encoder.params))
        return ModelMeta(
            loader=None, name=f"conan_jax/{identity.get('run', 'model')}",
            revision=f"{identity.get('stage', 'weights')}-{identity.get('step', 0)}",
            release_date=None, languages=None, n_parameters=count,
            n_embedding_parameters=encoder.model.vocab_size * encoder.model.hidden_size,
            memory_usage_mb=round(count * 4 / 2**20, 1), max_tokens=encoder.model.max_length, embed_dim=encoder.dimension, license=None,
            open_weights=None, public_training_code=None, public_training_data=None, framework=["JAX"], similarity_fn_name="cosine",
            use_instructions=any(encoder.prompts.values()) or self.task_instructions, training_datasets=None,
        )


def prompt_map(model: MtebEncoder, tasks: Iterable[Any]) -> dict[str, dict[str, str]]:
    """`{task name: {"query": ..., "document": ...}}` of the prompts a model reads before the texts of mteb tasks.

    Tasks with no two sides have one entry "text". What a published figure needs beside the weights: most figures that cannot be
    repeated were taken with other prompts.
    """
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.types import PromptType

    sides = {side.value: side for side in (PromptType.query, PromptType.document)}
    return {task.metadata.name: {side: model.prompt_for(task.metadata, kind) for side, kind in sides.items()}
            if isinstance(task, AbsTaskRetrieval) else {"text": model.prompt_for(task.metadata)} for task in tasks}


def evaluate_tasks(model: MtebEncoder, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`{task: {"main_score", "scores", "prompts"}}` of mteb's own tasks, by name, from data that is here or can be fetched.

    Raises `ConfigError` for a task that mteb does not have and `DataError` for one whose data cannot be had.
    """
    mteb = _import_mteb()
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            task = mteb.get_task(name)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"mteb has no task {name!r}: {' '.join(map(str, error.args))[:200]}") from error
        try:
            task.load_data()
        except (OSError, RuntimeError, ValueError) as error:  # how its libraries say that a file is neither here nor reachable
            raise DataError(f"the data of the mteb task {name} is not on this machine and could not be fetched "
                            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}); fetch it where there is a network, "
                            "or score a local set with --suite") from error
        result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results[0]
        found[name] = {"main_score": float(result.get_score()), "scores": result.scores, "prompts": prompt_map(model, [task])[name]}
    return found


def _instruction_of(task_metadata: Any, side: str | None) -> str:
    from mteb.abstasks.abstask import get_abstask_prompt

    own = task_metadata.prompt
    own = own.get(side or "query") if isinstance(own, dict) else own
    return own or get_abstask_prompt(task_metadata.name) or ""


def _import_mteb() -> Any:
    try:
        import mteb
    except ImportError as error:
        raise ConfigError(f"mteb is not installed: {install_command(extra='mteb')}") from error
    return mteb
