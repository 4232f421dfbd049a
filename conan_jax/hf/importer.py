"""A Llama, Mistral, Qwen2 or Qwen3 folder of Hugging Face -> a run folder whose weights any stage starts from.

    RUN/config.json                 the run: its model, its tokenizer, one stage called `imported`
    RUN/imported/checkpoints/1      the weights, float32
    RUN/data/tokenizer/             the tokenizer
    RUN/import.json                 what the folder was: `Origin`

What a sentence-transformers folder says beside its weights (`hf.sentence_folder`) is kept in the options of the stage: `texts`, `prompts`.
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
from conan_jax.data.json_tokenizer import JSON_FILE, Frame, JsonTokenizer
from conan_jax.data.tokenizer import MODEL_FILE, AnyTokenizer, Tokenizer
from conan_jax.errors import CheckpointError, ConfigError, DataError
from conan_jax.files import read_json, replacing_folder, write_json
from conan_jax.hf.architectures import ARCHITECTURES, from_hf_config, is_causal, to_hf_config
from conan_jax.hf.sample_texts import TEXTS
from conan_jax.hf.sentence_folder import SentenceFolder, read_sentence_folder, refuse_adapter
from conan_jax.hf.weights import DAMAGED, DTYPES, from_tensors, is_causal_form, read_tensors
from conan_jax.stages.imported import KIND
from conan_jax.train import checkpoint

STAGE, ORIGIN_FILE = "imported", "import.json"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Origin:
    """What an imported folder was, so that it can be written again as it came.

    `causal_form`: with a head (`LlamaForCausalLM`), not the bare model; `dtype`: that of most tensors, `other_dtypes` the rest by
    name; `config`: its config.json; `folder`: its path, "" where an older version wrote this; `embedder`: a sentence-transformers
    folder.
    """

    architecture: str
    causal_form: bool
    dtype: str
    other_dtypes: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    embedder: bool = False

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
        ConfigError: another architecture, a setting that cannot be computed here, or something is at `out` already.
        CheckpointError: weights that are missing, pickled, damaged, or another model's.
        DataError: there is no tokenizer, it has more tokens than the model, or its token ids cannot be given here.
    """
    place, out = Path(folder), Path(out)
    refuse_taken(out)
    sentences = read_sentence_folder(place)
    folder = place if sentences is None else sentences.transformer
    refuse_adapter(folder)
    described = _read_config(folder)
    model = from_hf_config(described, str(folder / "config.json"))
    tensors = read_tensors(folder)
    causal_form = is_causal_form(tensors)
    counts = Counter(tensors.dtypes.values())
    dtype = counts.most_common(1)[0][0]
    others = {name: _DTYPE_NAMES[other] for name, other in tensors.dtypes.items() if other != dtype}
    notes = [] if sentences is None else list(sentences.notes)
    headless = causal_form and not head and not model.tie_word_embeddings
    if causal_form and not model.tie_word_embeddings and not headless and "lm_head.weight" not in tensors:
        if sentences is None:
            raise CheckpointError(f"{folder} lacks lm_head.weight, the head of a language model; import it without one by --no-head, or "
                                  "set tie_word_embeddings to true in its config.json where the head is the table of the embeddings")
        headless = True
        notes.append("it has no lm_head.weight, so it is imported without a head, which an embedder does not need")
    if headless:  # written again, it is the bare model
        bare = ARCHITECTURES[described["model_type"]].class_name(causal=False)
        tensors = tensors.without("lm_head.weight")
        described = {**described, "architectures": [bare]}
    origin = Origin(described["model_type"], causal_form and not headless, _DTYPE_NAMES[dtype], others, described, str(place.absolute()),
                    sentences is not None)
    model = replace(model, pooling="mean" if sentences is None else sentences.pooling,
                    compute_dtype="float32" if dtype == DTYPES["float32"] else "bfloat16",
                    tie_word_embeddings=model.tie_word_embeddings or not origin.causal_form)
    if model.max_length < described.get("max_position_embeddings", 0):
        notes.append(f"rows are cut to {model.max_length:,} tokens, its sliding window: up to there the window cuts nothing off")
    tokenizer = _in_frame(_tokenizer(folder, model, sentences is not None), folder, sentences, notes)
    total, done = sum(tensors.size(name) for name in tensors), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    params = from_tensors(tensors, model, str(folder), advance)
    options: dict[str, Any] = {"mask": "causal" if is_causal(described) else "bidirectional"}
    if sentences is not None:
        options |= {"texts": asdict(sentences.texts), "prompts": sentences.prompts}
    stage = config.CustomStage(name=STAGE, kind=KIND, steps=1, options=options)
    run = config.Run(stages=(stage,), datasets=(), model=model, **placed(out))
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


def placed(out: Path) -> dict[str, Any]:
    """What a run says of itself when `write_run` writes it to `out`, with its tokenizer."""
    return {"name": _name(out), "output_dir": str(out), "data_dir": f"{out}/data",
            "tokenizer": config.Tokenizer(path=f"{out}/data/tokenizer")}


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


def _tokenizer(folder: Path, model: config.Model, as_json: bool) -> AnyTokenizer:
    """The tokenizer of a folder; by `as_json` its tokenizer.json, which other libraries read, also where a model of ours is beside it."""
    if not (folder / JSON_FILE).is_file() and (as_json or not (folder / MODEL_FILE).is_file()):
        raise DataError(f"{folder} has no tokenizer.json. Load its tokenizer with AutoTokenizer of transformers and save it there with "
                        "save_pretrained, which writes one")
    try:
        tokenizer = JsonTokenizer.load(folder) if as_json else Tokenizer.load(folder)
    except DataError:
        if as_json or not (folder / JSON_FILE).is_file():
            raise
        tokenizer = JsonTokenizer.load(folder)  # the tokenizer.model beside it is another SentencePiece model than ours
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(f"the tokenizer of {folder} has {tokenizer.vocab_size} tokens, and vocab_size in its config.json is "
                        f"{model.vocab_size}")
    return tokenizer


def _in_frame(tokenizer: AnyTokenizer, folder: Path, sentences: SentenceFolder | None, notes: list[str]) -> AnyTokenizer:
    """The tokenizer with the frame of its own post-processor, and its token ids compared with those of the `tokenizers` library.

    A plain model whose tokenizer ends no text gets its EOS there: training an embedder needs an end of text. Raises `DataError` when
    ids differ.
    """
    if not isinstance(tokenizer, JsonTokenizer):
        return tokenizer
    try:
        frame = tokenizer.own_frame()
    except DataError as error:
        raise DataError(f"{folder / JSON_FILE}: {error}") from None
    reads_special = sentences is not None and not tokenizer.settings.get("split_special_tokens", False)
    for name, there in (("add_bos_token", frame.prefix), ("add_eos_token", frame.suffix)):
        said = tokenizer.settings.get(name)
        if isinstance(said, bool) and said != bool(there):
            notes.append(f"{name} in its tokenizer_config.json is {str(said).lower()}, and tokenizer.json says otherwise; the ids of "
                         "tokenizer.json are taken, as transformers 5 does")
    own = tokenizer.with_rules(frame, reads_special, sentences is not None and sentences.lower_case)
    for text, ids in zip(TEXTS, own.full_ids(TEXTS), strict=True):
        if [*frame.prefix, *own.encode(text), *frame.suffix] != ids:
            raise DataError(f"{folder / JSON_FILE} gives the text {text[:40]!r} other token ids than can be given here; its post-processor "
                            "does more than put the same ids before and after every text")
    if sentences is not None:
        if not sentences.texts.include_prompt:
            _refuse_unknown_prompt_length(own, folder)
        return own
    if not frame.suffix:
        notes.append(f"its tokenizer puts nothing after a text; texts end in {tokenizer.eos_id}, its end-of-text token, here")
    return own if frame.suffix else own.with_rules(Frame(frame.prefix, (tokenizer.eos_id,)), reads_special)


def _refuse_unknown_prompt_length(tokenizer: JsonTokenizer, folder: Path) -> None:
    """Raise `ConfigError` unless sentence-transformers takes the last token after a prompt for a special one."""
    settings = tokenizer.settings
    names = [settings.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        names += settings.get(key) if isinstance(settings.get(key), list) else []
    known = {name.get("content") if isinstance(name, Mapping) else name for name in names}
    last = [token for i in tokenizer.suffix_ids[-1:] for token in [tokenizer.token(i)]]
    if last and last[0] not in known:
        raise ConfigError(f"include_prompt is false, and {last[0]!r}, which ends a text, is no special token of "
                          f"{folder / 'tokenizer_config.json'}, so a prompt has no certain length; name it there in "
                          "additional_special_tokens")


def refuse_taken(out: Path) -> None:
    """Raises `ConfigError` when something stands at `out`; an empty folder is nothing."""
    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        raise ConfigError(f"{out} is there already; name another folder, or move it away")


def _name(out: Path) -> str:
    """The folder's name with everything that a run's name may not hold made a hyphen."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in out.absolute().name)
    return name if name.strip(".") else "imported"
