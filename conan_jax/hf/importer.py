"""A Llama, Mistral, Qwen2 or Qwen3 folder of Hugging Face -> a run folder whose weights any stage starts from.

    RUN/config.json                 the run: its model, its tokenizer, one stage called `imported`
    RUN/imported/checkpoints/1      the weights, float32
    RUN/data/tokenizer/             the tokenizer
    RUN/import.json                 what the folder was: `Origin`
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from conan_jax import config
from conan_jax.config_io import build, to_dict
from conan_jax.data.json_tokenizer import JSON_FILE, JsonTokenizer
from conan_jax.data.tokenizer import MODEL_FILE, AnyTokenizer, Tokenizer
from conan_jax.errors import CheckpointError, ConfigError, DataError
from conan_jax.files import read_json, replacing_folder, write_json
from conan_jax.hf.architectures import ARCHITECTURES, from_hf_config, is_causal, to_hf_config
from conan_jax.hf.weights import DAMAGED, DTYPES, from_tensors, is_causal_form, read_tensors
from conan_jax.stages.imported import KIND
from conan_jax.train import checkpoint

STAGE, ORIGIN_FILE = "imported", "import.json"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Origin:
    """What an imported folder was, so that it can be written again as it came.

    `causal_form`: with a head (`LlamaForCausalLM`), not the bare model; `dtype`: that of most tensors, `other_dtypes` the rest by
    name; `config`: its config.json.
    """

    architecture: str
    causal_form: bool
    dtype: str
    other_dtypes: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def hf_config(self, model: config.Model) -> dict[str, Any]:
        """The config.json of `model` in this architecture, with what the imported one said of everything else."""
        ours = to_hf_config(model, self.architecture, causal=self.causal_form, is_causal=is_causal(self.config), dtype=self.dtype)
        unknown_here = ("pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings", "sliding_window", "use_sliding_window",
                        "max_window_layers", "layer_types", "architectures", "hidden_act", "tie_word_embeddings", "attention_dropout")
        return {**self.config, **ours, **{key: self.config[key] for key in unknown_here if key in self.config}}


@dataclass(frozen=True)
class Imported:
    """What `import_folder` made: the run, where the weights came from, and what a person should know of it."""

    run: config.Run
    origin: Origin
    tokenizer: AnyTokenizer
    notes: tuple[str, ...]


def import_folder(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, head: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Write the run folder `out`, whole or not at all.

    Args:
        folder: config.json, model.safetensors or shards with their index, tokenizer.json (or our tokenizer.model).
        head: keep an output table of its own, which only language modelling needs.
        progress: called with bytes read and all bytes.

    Raises:
        ConfigError: another architecture, a setting that cannot be computed here, or something stands at `out`.
        CheckpointError: weights that are missing, pickled, damaged, or another model's.
        DataError: there is no tokenizer, or it has more tokens than the model.
    """
    folder, out = Path(folder), Path(out)
    refuse_taken(out)
    described = _read_config(folder)
    model = from_hf_config(described, str(folder / "config.json"))
    tensors = read_tensors(folder)
    causal_form = is_causal_form(tensors)
    counts = Counter(tensors.dtypes.values())
    dtype = counts.most_common(1)[0][0]
    others = {name: _DTYPE_NAMES[other] for name, other in tensors.dtypes.items() if other != dtype}
    headless = causal_form and not head and not model.tie_word_embeddings
    if headless:  # written again, it is the bare model
        bare = ARCHITECTURES[described["model_type"]].class_name(causal=False)
        tensors, described = tensors.without("lm_head.weight"), {**described, "architectures": [bare]}
    origin = Origin(described["model_type"], causal_form and not headless, _DTYPE_NAMES[dtype], others, described)
    pooling, notes = _pooling(folder)
    model = replace(model, pooling=pooling, compute_dtype="float32" if dtype == DTYPES["float32"] else "bfloat16",
                    tie_word_embeddings=model.tie_word_embeddings or not origin.causal_form)
    if model.max_length < described.get("max_position_embeddings", 0):
        notes.append(f"rows are cut to {model.max_length:,} tokens, its sliding window: up to there the window cuts nothing off")
    tokenizer = _tokenizer(folder, model)
    total, done = sum(tensors.size(name) for name in tensors), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    params = from_tensors(tensors, model, str(folder), advance)
    stage = config.CustomStage(name=STAGE, kind=KIND, steps=1, options={"mask": "causal" if is_causal(described) else "bidirectional"})
    run = config.Run(stages=(stage,), datasets=(), model=model, **placed(out, tokenizer))
    write_run(out, run, stage, 1, params, tokenizer, {ORIGIN_FILE: asdict(origin)})
    return Imported(run, origin, tokenizer, tuple(notes))


def read_origin(run: str | os.PathLike[str]) -> Origin | None:
    """What an imported run was, None where it was trained here. Raises `DataError` when import.json is damaged."""
    path = Path(run) / ORIGIN_FILE
    data = read_json(path)
    if data is None:
        return None
    try:
        return build(Origin, data, ORIGIN_FILE)
    except ConfigError as error:
        raise DataError(f"{path} is damaged ({error}); import the model again") from error


def placed(out: Path, tokenizer: AnyTokenizer) -> dict[str, Any]:
    """What a run says of itself when `write_run` writes it to `out`, with its tokenizer."""
    return {"name": _name(out), "output_dir": str(out), "data_dir": f"{out}/data",
            "tokenizer": config.Tokenizer(vocab_size=tokenizer.vocab_size, path=f"{out}/data/tokenizer")}


def write_run(
    out: Path, run: config.Run, stage: config.Stage, step: int, params: Any, tokenizer: AnyTokenizer, files: Mapping[str, Any]
) -> None:
    """A run folder that holds weights and a tokenizer and nothing else, whole or not at all. `files`: JSON beside its config.json.

    Raises `ConfigError` when something stands at `out`, `CheckpointError` or `DataError` when it cannot be written.
    """
    refuse_taken(out)
    with replacing_folder(out) as partial:
        tokenizer.save(partial / "data" / "tokenizer")
        checkpoint.write_weights(partial / stage.name, step, params, checkpoint.make_metadata(run, stage, tokenizer.sha256))
        for name, content in {**files, "config.json": to_dict(run)}.items():
            write_json(partial / name, content)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; a model is imported from a folder on this machine, not by its name on a hub")
    described = read_json(folder / "config.json", advice=DAMAGED)
    if described is None:
        raise CheckpointError(f"{folder} has no config.json, so nothing says what its weights are")
    if described.get("auto_map"):
        raise ConfigError(f"{folder / 'config.json'} asks for code of its own (auto_map), which is not run here; remove the key if its "
                          "weights are those of the stock architecture")
    return described


def _pooling(folder: Path) -> tuple[str, list[str]]:
    """How a sentence-transformers folder pools; "mean" where nothing says it."""
    said = read_json(folder / "1_Pooling" / "config.json", advice=DAMAGED)
    if said is None:
        return "mean", []
    mode = said.get("pooling_mode")
    if mode in ("mean", None) and said.get("pooling_mode_mean_tokens", mode == "mean"):
        return "mean", []
    if mode == "lasttoken" or said.get("pooling_mode_lasttoken"):
        return "last", []
    return "mean", ["its pooling is neither the mean nor the last token; the mean is taken"]


def _tokenizer(folder: Path, model: config.Model) -> AnyTokenizer:
    if not (folder / JSON_FILE).is_file() and not (folder / MODEL_FILE).is_file():
        raise DataError(f"{folder} has no tokenizer.json. Load its tokenizer with AutoTokenizer of transformers and save it there with "
                        "save_pretrained, which writes one")
    try:
        tokenizer = Tokenizer.load(folder)
    except DataError:
        if not (folder / JSON_FILE).is_file():
            raise
        tokenizer = JsonTokenizer.load(folder)  # the tokenizer.model beside it is another SentencePiece model than ours
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(f"the tokenizer of {folder} has {tokenizer.vocab_size} tokens, and vocab_size in its config.json is "
                        f"{model.vocab_size}")
    return tokenizer


def refuse_taken(out: Path) -> None:
    """Raises `ConfigError` when something stands at `out`; an empty folder is nothing."""
    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        raise ConfigError(f"{out} is there already; name another folder, or move it away")


def _name(out: Path) -> str:
    """The folder's name with everything that a run's name may not hold made a hyphen."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in out.absolute().name)
    return name if name.strip(".") else "imported"
