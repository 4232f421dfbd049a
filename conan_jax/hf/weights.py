"""Our parameter tree as the tensors of a Hugging Face folder, and back: one table of names, safetensors, nothing pickled.

A tensor is read when it is asked for and made when it is written, so that beside the tree itself one tensor, or one shard of a
file, is in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from conan_jax import config
from conan_jax.errors import CheckpointError, ConfigError, DataError
from conan_jax.files import read_json, replacing, write_json
from conan_jax.model import Embedder

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
DAMAGED = "copy the folder anew"
LARGEST_FILE = 5_000_000_000  # bytes; more goes into shards

_BLOCK = {
    "attention_norm.scale": "input_layernorm.weight", "mlp_norm.scale": "post_attention_layernorm.weight",
    "attention.q_norm.scale": "self_attn.q_norm.weight", "attention.k_norm.scale": "self_attn.k_norm.weight",
    **{f"attention.{name}_proj.kernel": f"self_attn.{name}_proj.weight" for name in "qkvo"},
    **{f"attention.{name}_proj.bias": f"self_attn.{name}_proj.bias" for name in "qkvo"},
    **{f"mlp.{name}_proj.kernel": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
}
_HEAD = "lm_head.weight"
_NAMES = {"embedding": "embed_tokens.weight", "final_norm.scale": "norm.weight", "output_embedding": _HEAD,
          **{f"layers.{ours}": f"layers.{{}}.{theirs}" for ours, theirs in _BLOCK.items()}}
_PICKLED = re.compile(r"\.(bin|pt|pth|ckpt|pkl)$")
# Numbers that follow from the configuration, which old checkpoints hold all the same.
_DERIVED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


class Place(NamedTuple):
    """Where a tensor lies in our tree: its path, its layer (None outside of the blocks), its shape, and whether ours is its transpose."""

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, each made when it is asked for, and not kept. `shapes` and `dtypes` are known without making any."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype], get: Callable[[str], np.ndarray]) -> None:
        self.shapes, self.dtypes, self._get = dict(shapes), dict(dtypes), get

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._get(name)

    def size(self, name: str) -> int:
        """Bytes of one tensor."""
        return prod(self.shapes[name]) * self.dtypes[name].itemsize

    def without(self, name: str) -> Tensors:
        """All but one."""
        shapes = {other: shape for other, shape in self.shapes.items() if other != name}
        return Tensors(shapes, {other: self.dtypes[other] for other in shapes}, self._get)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def places(model: config.Model) -> dict[str, Place]:
    """Every tensor of `model` by its name without prefix, `layers.0.self_attn.q_proj.weight`; the output table is `lm_head.weight`.

    Raises `ConfigError` for a pooling with parameters, which no Hugging Face architecture has.
    """
    found = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(jax.eval_shape(Embedder(model).init, jax.random.key(0)))[0]:
        path = tuple(key.key for key in keys)
        if path[0] == "pooling":
            raise ConfigError(f"model.pooling {model.pooling!r} has parameters of its own, which a Hugging Face folder cannot hold")
        theirs, transposed = _NAMES[".".join(path)], path[-1] == "kernel"
        for layer in range(model.num_layers) if path[0] == "layers" else (None,):
            shape = leaf.shape if layer is None else leaf.shape[1:]
            found[theirs.format(layer)] = Place(path, layer, shape[::-1] if transposed else shape, transposed)
    return found


def to_tensors(params: Any, model: config.Model, *, dtype: str = "float32", causal: bool = False) -> Tensors:
    """The tensors of a Hugging Face folder.

    The bare model has names without prefix and no output table; the causal one has the prefix `model.`, and `lm_head.weight` where
    the tables are not one. An `embedding_multiplier` goes into the input table, which is then no longer the output table.

    Args:
        params: the Embedder's tree.
        dtype: a key of `DTYPES`.

    Raises:
        ConfigError: an unknown dtype, or a pooling with parameters.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known; use {', '.join(DTYPES)}")
    sources = {}
    for name, place in places(model).items():
        if name != _HEAD:
            sources[f"model.{name}" if causal else name] = (place, model.embedding_multiplier if place.path == ("embedding",) else 1.0)
        elif causal:
            sources[name] = (place, 1.0)
    if causal and model.tie_word_embeddings and model.embedding_multiplier != 1:
        sources[_HEAD] = (places(model)["embed_tokens.weight"], 1.0)

    def make(name: str) -> np.ndarray:
        place, factor = sources[name]
        leaf = params
        for key in place.path:
            leaf = leaf[key]
        array = np.asarray(leaf if place.layer is None else leaf[place.layer])
        if factor != 1:
            array = array * np.float32(factor)
        return np.ascontiguousarray((array.T if place.transposed else array).astype(DTYPES[dtype], copy=False))

    return Tensors({name: place.shape for name, (place, _) in sources.items()}, dict.fromkeys(sources, DTYPES[dtype]), make)


def is_causal_form(names: Mapping[str, Any]) -> bool:
    """Whether the names are those of a model with its head, `model.embed_tokens.weight`, and not of the bare one."""
    return any(name.startswith("model.") for name in names)


def from_tensors(
    tensors: Mapping[str, np.ndarray], model: config.Model, where: str = "the tensors", progress: Callable[[int], None] | None = None
) -> Any:
    """The Embedder's tree, float32 NumPy arrays with the layers stacked, from either form.

    A head that a tied `model` has no place for must equal the embeddings. `where` names the folder in errors, `progress` is
    called with the bytes of each tensor.

    Raises:
        CheckpointError: a tensor is missing, is not the model's, has another shape, or holds numbers that are not finite.
    """
    prefix = "model." if is_causal_form(tensors) else ""
    wanted = {name if name == _HEAD else prefix + name: place for name, place in places(model).items()}
    extra = [name for name in tensors if name not in wanted and name != _HEAD and not _DERIVED.search(name)]
    missing = [name for name in wanted if name not in tensors]
    for found, what in ((missing, "lacks"), (extra, "holds, and the model of its configuration does not have,")):
        if found:
            shown = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
            raise CheckpointError(f"{where} {what} {shown}; is its config.json that of another model?")
    params: dict[str, Any] = {}
    for name, place in wanted.items():
        array = _checked(tensors, name, place.shape, where)
        array = array.T if place.transposed else array
        node = params
        for key in place.path[:-1]:
            node = node.setdefault(key, {})
        if place.layer is None:
            node[place.path[-1]] = np.array(array, np.float32, order="C")
        else:
            stack = node.setdefault(place.path[-1], None)
            if stack is None:
                stack = node[place.path[-1]] = np.empty((model.num_layers, *array.shape), np.float32)
            stack[place.layer] = array
        if progress is not None:
            progress(array.nbytes)
    if _HEAD in tensors and _HEAD not in wanted:
        if not np.array_equal(_checked(tensors, _HEAD, wanted[f"{prefix}embed_tokens.weight"].shape, where), params["embedding"]):
            raise CheckpointError(f"{where}: tie_word_embeddings is true in its config.json, and {_HEAD} is not the table of the "
                                  "embeddings; set it to false there")
    return params


def _checked(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    array = tensors[name]
    if array.shape != shape:
        raise CheckpointError(f"{where}: {name} has the shape {list(array.shape)} and the model wants {list(shape)}; "
                              "is its config.json that of another model?")
    if array.dtype not in DTYPES.values():
        raise CheckpointError(f"{where}: {name} holds {array.dtype} numbers; {', '.join(DTYPES)} can be read")
    if not np.isfinite(array).all():
        raise CheckpointError(f"{where}: {name} holds numbers that are not finite; it is damaged, or training it went wrong")
    return array


def write_safetensors(folder: Path, tensors: Mapping[str, np.ndarray], largest_file: int = LARGEST_FILE) -> list[Path]:
    """Write `model.safetensors`, or shards of at most `largest_file` bytes and their index; returns the files.

    A tensor larger than that is a shard of its own. Each file appears whole or not at all, the index last.
    """
    folder, shards, sizes = Path(folder), [[]], [0]
    lazy = isinstance(tensors, Tensors)
    for name in tensors:
        shape, dtype = (tensors.shapes[name], tensors.dtypes[name]) if lazy else (tensors[name].shape, tensors[name].dtype)
        size = prod(shape) * dtype.itemsize
        if shards[-1] and sizes[-1] + size > largest_file:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    count = len(shards)
    files = [folder / SINGLE_FILE] if count == 1 else [folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, names in zip(files, shards):
        arrays = {name: np.ascontiguousarray(tensors[name]) for name in names}
        with replacing(file) as partial_file:
            safetensors.numpy.save_file(arrays, partial_file, metadata={"format": "pt"})
    if count > 1:
        weight_map = {name: file.name for file, names in zip(files, shards) for name in names}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})
        files.append(folder / INDEX_FILE)
    return files


def read_tensors(folder: Path) -> Tensors:
    """The tensors of a folder: of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Names, shapes and dtypes are read now and every shard is held to its index; numbers when they are asked for.

    Raises:
        CheckpointError: there is no such file, only a pickled one, a shard or tensor is missing, or a file is damaged.
        DataError: the index is no JSON object, or names a file outside of the folder.
    """
    folder = Path(folder)
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists() or single.is_symlink():
        files = {SINGLE_FILE: None}
    elif index.is_file():
        files = _indexed(index)
    else:
        raise CheckpointError(_nothing_to_read(folder))
    shapes, dtypes, homes = {}, {}, {}
    for path, names in [(_inside(folder, file), names) for file, names in files.items()]:  # every name before any file
        with _opened(path) as opened:
            there = set(opened.keys())
            if names is not None and names != there:
                lacking, more = sorted(names - there), sorted(there - names)
                found = f"lacks {lacking[0]}" if lacking else f"holds {more[0]}, which the index does not place there"
                raise CheckpointError(f"{path} {found}; shards and index are not of one model. Copy the folder anew")
            for name in there:
                part = opened.get_slice(name)
                shapes[name], dtypes[name], homes[name] = tuple(part.get_shape()), _dtype(part.get_dtype(), name, path), path

    def get(name: str) -> np.ndarray:
        with _opened(homes[name]) as opened:
            return opened.get_tensor(name)

    order = sorted(shapes, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)])
    return Tensors({name: shapes[name] for name in order}, dtypes, get)


def _indexed(index: Path) -> dict[str, set[str]]:
    """File -> the tensors that an index places in it."""
    weight_map = read_json(index, {}, DAMAGED).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise DataError(f"{index} has no weight_map from tensors to files; copy it anew")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, set()).add(name)
    return files


def _inside(folder: Path, file: str) -> Path:
    """The file called so in `folder`. One level, no way out of it; the links of a Hugging Face cache into its own blobs are none."""
    if Path(file).name != file or file in ("", ".", "..") or "\\" in file:
        raise DataError(f"{folder / INDEX_FILE} names the file {file!r}, which is not a plain name in this folder; it is not read")
    if _PICKLED.search(file):
        raise CheckpointError(f"{folder / file} is pickled, and to read a pickle is to run what is in it. {_CONVERT}")
    path = folder / file
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy the folder anew, with all of its shards")
    place, blobs = path.resolve().parent, folder.absolute().parent.parent / "blobs"
    if place != folder.resolve() and not (folder.absolute().parent.name == "snapshots" and place == blobs.resolve()):
        raise DataError(f"{path} is a link to {path.resolve()}, outside of the folder; copy the file itself there")
    return path


_CONVERT = "Load it where you trust it and save it with `safe_serialization=True`, or take a safetensors version of the model"


def _nothing_to_read(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}"
    pickled = sorted(path.name for path in folder.iterdir()
                     if path.is_file() and _PICKLED.search(path.name.removesuffix(".index.json")))
    if pickled:
        return f"{folder} holds its weights as {pickled[0]}, which is pickled, and to read a pickle is to run what is in it. {_CONVERT}"
    return f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}"


def _opened(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}); it is damaged or cut short. Copy it anew") from error


def _dtype(name: str, tensor: str, path: Path) -> np.dtype:
    known = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    if name not in known:
        raise CheckpointError(f"{path}: {tensor} holds {name} numbers; {', '.join(DTYPES)} can be read. A quantised model is none to train")
    return DTYPES[known[name]]
