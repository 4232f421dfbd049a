"""Check an export: its files, its vectors in JAX, and the same in PyTorch, layer by layer. Check an imported run against the folder
that it came from.

PyTorch and JAX add the same products in another order, so float32 results differ in about the 6th digit; 1 - cosine is of the
order of the square of that. `FLOAT32_BAR` leaves three digits to spare, and a wrong name, transpose, mask or prompt is far below it.
A bfloat16 export is compared in float32 first, which shows that the weights are right; then as users load it, PyTorch computing in
bfloat16 and JAX in float32. There each product and each sum is rounded to 8 bits, 2^-9 relative on average; over some tens of
roundings a layer a vector moves by one or two percent of its length, so 1 - cosine = 0.02^2 / 2, and `BFLOAT16_BAR` leaves a factor
of five.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Float32

from conan_jax import __version__, config
from conan_jax.data.json_tokenizer import CONFIG_FILE, JSON_FILE
from conan_jax.errors import CheckpointError, ConfigError, DataError
from conan_jax.export import torch_side
from conan_jax.files import read_json
from conan_jax.hf import manifest
from conan_jax.hf.importer import Origin, read_origin
from conan_jax.hf.manifest import OURS
from conan_jax.hf.sample_texts import TEXTS
from conan_jax.hf.sentence_folder import SentenceFolder, read_sentence_folder
from conan_jax.inference.encoder import Encoder, default_max_length
from conan_jax.inference.load import Loaded, load
from conan_jax.inference.tokens import RowReader
from conan_jax.model import Bidirectional, Causal, Embedder, Layout, Mask
from conan_jax.versions import versions_of

FLOAT32_BAR, BFLOAT16_BAR = 0.9999, 0.999
LAYER_TEXTS, LAYER_TOKENS = 8, 64  # of the comparison by layer
PROMPTS = 4  # different ones that are tried


@dataclass(frozen=True)
class Check:
    """One comparison: the worst cosine of its vectors, and the largest difference of a number."""

    name: str
    vectors: int
    min_cosine: float
    max_abs_diff: float
    bar: float

    @property
    def ok(self) -> bool:
        """Not a NaN, and not below the bar."""
        return self.min_cosine >= self.bar


@dataclass
class Report:
    """What was compared. `layers`: the embeddings (0), then each layer. `jax_only`: PyTorch was not asked, so nothing here says what
    it computes. `error`: what kept everything from being compared; no more is known then.
    """

    folder: str
    kind: str = ""
    dtype: str = ""
    files: int = 0
    checks: list[Check] = field(default_factory=list)
    layers: list[Check] = field(default_factory=list)
    token_rows: int = 0
    token_rows_that_differ: int = 0
    problems: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    jax_only: bool = False

    @property
    def min_cosine(self) -> float:
        """The worst of all that is held to the float32 bar; NaN when any of it is, and without any."""
        return float(np.min([c.min_cosine for c in (*self.checks, *self.layers) if c.bar == FLOAT32_BAR] or [np.nan]))

    @property
    def ok(self) -> bool:
        """There was no error, every comparison is above its bar and every row has the same token ids."""
        return self.error is None and all(check.ok for check in (*self.checks, *self.layers)) and not self.token_rows_that_differ

    def to_dict(self) -> dict[str, Any]:
        """For `--json`; what is not a number is None, since JSON has no NaN."""
        return _finite({"ok": self.ok, "min_cosine": self.min_cosine, **asdict(self)})


def verify(
    folder: str | Path, texts: Sequence[str] | None = None, *, jax_only: bool = False, original: str | Path | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Compare an export with its manifest and its check vectors in JAX, then PyTorch with JAX on `texts` (default: 45 in 20 scripts).

    A run of `conan import` is compared with the folder that it came from: token ids with those of the `tokenizers` library, then
    vectors (of a language model, logits) with PyTorch on that folder.

    Args:
        jax_only: leave PyTorch out.
        original: the folder that a run was imported from; default: where it was then.
        progress: called with what comes next.

    Raises:
        DataError: a file is not as it was written, or the folder is no export.
        CheckpointError: the folder of an import is not there any more.
        ConfigError: PyTorch is not installed.
    """
    folder = Path(folder)
    if not jax_only:
        torch_side.require()
    if not (folder / OURS).is_file() and (origin := read_origin(folder)) is not None:
        return _verify_import(folder, origin, original, list(TEXTS if texts is None else texts), jax_only, progress)
    if original is not None:
        raise ConfigError(f"--original names the folder of an import, and {folder} is no run of `conan import`; leave it out")
    progress("files")
    files = manifest.check(folder)
    described, loaded = read_json(folder / OURS, {}), load(folder)
    report = Report(str(folder), described["kind"], described["dtype"], files, versions={"conan_jax": __version__, "jax": jax.__version__},
                    jax_only=jax_only)
    texts = list(TEXTS if texts is None else texts)
    with jax.default_matmul_precision("highest"):  # float32 products in fewer bits are what an accelerator does by default
        progress("check vectors")
        side = (_LanguageModel if described["kind"] == "causal" else _Embedder)(loaded, described)
        report.checks.append(side.check_vectors(read_json(folder / "check.json", {})))
        if not jax_only:
            report.versions |= torch_side.versions()
            if described["mask"] != "causal" and (problem := torch_side.ignores_flags()):
                report.problems.append(problem)
            side.compare(folder, texts, report, progress)
    return report


def _verify_import(
    run: Path, origin: Origin, original: str | Path | None, texts: list[str], jax_only: bool, progress: Callable[[str], None]
) -> Report:
    folder = Path(original or origin.folder)
    if not (original or origin.folder) or not folder.is_dir():
        raise CheckpointError(f"{run} was imported from {origin.folder or 'a folder that an older version did not write down'}; name the "
                              "folder where it is now with --original")
    loaded = load(run)
    language_model = origin.causal_form and not origin.embedder
    longest = default_max_length(loaded.model, loaded.texts)
    described = {"dims": [loaded.model.hidden_size], "dtype": origin.dtype, "max_length": longest}
    report = Report(str(run), "causal" if language_model else "embedder", origin.dtype, jax_only=jax_only,
                    versions={"conan_jax": __version__, "jax": jax.__version__, **versions_of(["tokenizers"])})
    progress("token ids")
    sentences = read_sentence_folder(folder)
    place = folder if sentences is None else sentences.transformer
    prompts = loaded.prompts.values() if origin.embedder else ()
    for prompt in dict.fromkeys(("", *prompts)):
        if origin.embedder:
            rows = RowReader(loaded.tokenizer, prompt, longest, replace(loaded.texts, include_prompt=True)).rows(texts)[0]
        else:
            rows = loaded.tokenizer.encode_batch(texts)
        _count(rows, _original_ids(place, sentences, [prompt + text for text in texts], longest), report)
    if not jax_only:
        report.versions |= torch_side.versions()
        if isinstance(loaded.mask, Bidirectional) and (problem := torch_side.ignores_flags()):
            report.problems.append(problem)
        with jax.default_matmul_precision("highest"):
            side = (_LanguageModel if language_model else _Embedder)(loaded, described)
            side.compare(place if sentences is None else folder, texts, report, progress, as_pooled=language_model or origin.embedder)
    return report


def _original_ids(folder: Path, sentences: SentenceFolder | None, texts: list[str], longest: int) -> list[list[int]]:
    """Token ids by the `tokenizers` library alone: of a sentence-transformers folder, what it reads; else those without special ids."""
    reader = tokenizers.Tokenizer.from_file(str(folder / JSON_FILE))
    reader.no_padding()
    reader.no_truncation()
    reader.encode_special_tokens = True
    if sentences is not None:
        reader.enable_truncation(longest)
        reader.encode_special_tokens = bool(read_json(folder / CONFIG_FILE, {}).get("split_special_tokens", False))
        if sentences.lower_case:
            given = [] if reader.normalizer is None else [reader.normalizer]
            reader.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Lowercase(), *given])
    return [row.ids for row in reader.encode_batch(texts, add_special_tokens=sentences is not None)]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _compare(name: str, ours: Float32[np.ndarray, "N D"], theirs: Float32[np.ndarray, "N D"], bar: float = FLOAT32_BAR) -> Check:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.where((norms == 0) & (ours == theirs).all(1), 1.0, np.minimum((ours * theirs).sum(1) / norms, 1.0))
    return Check(name, len(ours), float(cosines.min()), float(np.abs(ours - theirs).max()), bar)


class _Embedder:
    """The vectors of an embedder on both sides."""

    def __init__(self, loaded: Loaded, described: dict[str, Any]) -> None:
        self.dims, self.dtype, self.max_length = described["dims"], described["dtype"], described["max_length"]
        self.encoder = Encoder(*loaded._replace(model=replace(loaded.model, compute_dtype="float32")))

    def check_vectors(self, recorded: dict[str, Any]) -> Check:
        found = [self.encoder.encode(check["text"], prompt=check["prompt"], max_length=self.max_length) for check in _checks(recorded)]
        return _compare("check vectors, JAX", np.stack(found), np.array([check["vector"] for check in recorded["checks"]], np.float32))

    def compare(
        self, folder: Path, texts: list[str], report: Report, progress: Callable[[str], None], as_pooled: bool = True,
    ) -> None:
        """Add checks to `report`. `as_pooled` False: token vectors alone, of a model that says nothing of pooling."""
        progress("loading in PyTorch")
        theirs = torch_side.TorchEmbedder(folder, "float32" if self.dtype != "float32" else None)
        if not as_pooled:
            progress("layers")
            report.layers += _compare_layers(self.encoder.params, self.encoder.model, theirs, self._rows(texts, ""), self.encoder.mask)
            return
        prompts = list(dict.fromkeys(prompt for prompt in self.encoder.prompts.values() if prompt))[:PROMPTS]
        progress("token ids")
        for prompt in ("", *prompts):
            self._compare_ids(theirs, texts, prompt, report)
        progress("layers")
        report.layers += _compare_layers(self.encoder.params, self.encoder.model, theirs, self._rows(texts, ""), self.encoder.mask)
        progress("vectors")
        ours, alone = self._encode(texts), [i for i, row in enumerate(self._rows(texts, "")) if row]  # PyTorch takes no empty row alone
        report.checks += [
            _compare("batch, padded right", ours, theirs.encode(texts)),
            _compare("batch, padded left", ours, theirs.encode(texts, side="left")),
            _compare("one by one", ours[alone], theirs.encode([texts[i] for i in alone], batch_size=1)),
        ]
        for i, prompt in enumerate(prompts):
            progress(f"prompt {i + 1} of {len(prompts)}")
            prompted = self._encode(texts, prompt)
            for side in ("right", "left") if i == 0 else ("right",):
                name = f"prompt {self._name_of(prompt)}, padded {side}"
                report.checks.append(_compare(name, prompted, theirs.encode(texts, prompt=prompt, side=side)))
        for dim in self.dims:
            if dim < self.encoder.model.hidden_size:
                cut = ours[:, :dim] / np.linalg.norm(ours[:, :dim], axis=1, keepdims=True)
                report.checks.append(_compare(f"first {dim} of {self.encoder.model.hidden_size}", cut, theirs.encode(texts, dim=dim)))
        if self.dtype == "bfloat16":
            progress("bfloat16")
            del theirs  # two copies of the weights are not needed at a time
            report.checks.append(_compare("as loaded, bfloat16", ours, torch_side.TorchEmbedder(folder).encode(texts), BFLOAT16_BAR))

    def _encode(self, texts: list[str], prompt: str = "") -> Float32[np.ndarray, "N D"]:
        return self.encoder.encode(texts, prompt=prompt, batch_size=16, max_length=self.max_length)

    def _rows(self, texts: list[str], prompt: str) -> list[list[int]]:
        settings = replace(self.encoder.texts, include_prompt=True)  # the ids are the same, and no row is left empty
        return RowReader(self.encoder.tokenizer, prompt, self.max_length, settings).rows(texts)[0]

    def _compare_ids(self, theirs: torch_side.TorchEmbedder, texts: list[str], prompt: str, report: Report) -> None:
        _count(self._rows(texts, prompt), theirs.token_ids(texts, prompt), report)

    def _name_of(self, prompt: str) -> str:
        return next(name for name, full in self.encoder.prompts.items() if full == prompt)


class _LanguageModel:
    """The states and logits of a causal model on both sides."""

    def __init__(self, loaded: Loaded, described: dict[str, Any]) -> None:
        self.params, self.tokenizer, self.model = loaded.params, loaded.tokenizer, replace(loaded.model, compute_dtype="float32")
        self.dtype, self.max_length = described["dtype"], described["max_length"]
        self.embedder = Embedder(self.model)

    def check_vectors(self, recorded: dict[str, Any]) -> Check:
        found = [_states(self.params, self.model, check["ids"], Causal())[-1] for check in _checks(recorded)]
        return _compare("check vectors, JAX", np.stack(found), np.array([check["hidden"] for check in recorded["checks"]], np.float32))

    def compare(
        self, folder: Path, texts: list[str], report: Report, progress: Callable[[str], None], as_pooled: bool = True,
    ) -> None:
        progress("loading in PyTorch")
        theirs = torch_side.TorchLanguageModel(folder, "float32" if self.dtype != "float32" else None)
        rows = [list(ids) for ids in self.tokenizer.encode_batch(texts)]
        progress("token ids")
        _count(rows, theirs.token_ids(texts), report)
        rows = [ids[: self.max_length] for ids in rows if ids]
        progress("layers")
        report.layers += _compare_layers(self.params, self.model, theirs, rows, Causal())
        progress("logits")
        report.checks.append(self._logits("logits", rows, theirs, FLOAT32_BAR))
        if self.dtype == "bfloat16":
            progress("bfloat16")
            del theirs
            report.checks.append(self._logits("logits as loaded, bfloat16", rows, torch_side.TorchLanguageModel(folder), BFLOAT16_BAR))

    def _logits(self, name: str, rows: list[list[int]], theirs: torch_side.TorchLanguageModel, bar: float) -> Check:
        ours = [np.asarray(self.embedder.logits(self.params, _states(self.params, self.model, ids, Causal()))) for ids in rows]
        return _compare(name, np.concatenate(ours), np.concatenate([theirs.logits(ids) for ids in rows]), bar)


def _checks(recorded: dict[str, Any]) -> list[dict[str, Any]]:
    checks = recorded.get("checks")
    if not isinstance(checks, list) or not checks:
        raise DataError("check.json of the export holds no checks; export the run again with --force")
    return checks


def _count(ours: list[list[int]], theirs: list[list[int]], report: Report) -> None:
    report.token_rows += len(ours)
    report.token_rows_that_differ += sum(list(a) != list(b) for a, b in zip(ours, theirs, strict=True))


def _compare_layers(params: Any, model: config.Model, theirs: Any, rows: list[list[int]], mask: Mask) -> list[Check]:
    """Token vectors of each layer, through the final norm."""
    rows = [ids[:LAYER_TOKENS] for ids in rows if ids][:LAYER_TEXTS]
    expected = [theirs.states(ids) for ids in rows]
    checks = []
    for layer in range(model.num_layers + 1):
        ours = [_embeddings(params, ids) if layer == 0 else _states(*_first_layers(params, model, layer), ids, mask) for ids in rows]
        name = f"layer {layer}" if layer else "embeddings"
        checks.append(_compare(name, np.concatenate(ours), np.concatenate([states[layer] for states in expected])))
    return checks


def _first_layers(params: Any, model: config.Model, count: int) -> tuple[Any, config.Model]:
    return {**params, "layers": jax.tree.map(lambda a: a[:count], params["layers"])}, replace(model, num_layers=count)


def _embeddings(params: Any, ids: Sequence[int]) -> Float32[np.ndarray, "L D"]:
    return np.asarray(params["embedding"])[np.asarray(ids)]


def _states(params: Any, model: config.Model, ids: Sequence[int], mask: Mask) -> Float32[np.ndarray, "L D"]:
    """Final-norm states of one row. Rows are padded to 64, 256, 1024 ... tokens, so that few programs are compiled."""
    length = LAYER_TOKENS
    while length < len(ids):
        length *= 4
    row = np.zeros((1, length), np.int32)
    row[0, : len(ids)] = ids
    hidden = _hidden(Embedder(model), params, row, Layout.from_lengths(jnp.array([len(ids)]), length), mask)
    return np.asarray(hidden[0, : len(ids)], np.float32)


_hidden = jax.jit(Embedder.hidden, static_argnums=0)
