"""Configurations in and out: `configs/*.py` -> Run, `--set` overrides, JSON, and a text rendering.

Every door goes through `build`, which knows the dataclasses of `conan_jax.config`: an unknown key is refused
with the nearest valid name, a value of the wrong type with the type that was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import pydantic

from conan_jax import config
from conan_jax.errors import ConanError, ConfigError
from conan_jax.files import read_json

VARIANTS = ("full", "tiny")


def load_run(spec: str, overrides: typing.Sequence[str] = ()) -> config.Run:
    """The recipe of `PATH.py` or `PATH.py:VARIANT`, with `KEY=VALUE` overrides applied.

    The file defines `get_config(variant)`. Raises `ConfigError` naming the file or the key.
    """
    path, colon, variant = spec.partition(":")
    variant = variant if colon else "full"
    if variant not in VARIANTS:
        raise ConfigError(f"{spec}: no variant {variant!r}; there is {' and '.join(VARIANTS)}")
    file = Path(path)
    if not file.is_file():
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        raise ConfigError(f"no configuration file {path}" + (f"; configs/ holds {known}" if known else ""))
    if file.suffix != ".py":
        raise ConfigError(f"{path} is no configuration: a configuration is a .py file that defines get_config(variant)")
    module_spec = importlib.util.spec_from_file_location(f"conan_config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        run = module.get_config(variant)
    except ConanError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's file raises is a wrong configuration
        raise ConfigError(f"{path} could not be read: {type(error).__name__}: {error}") from error
    if not isinstance(run, config.Run):
        raise ConfigError(f"{path}: get_config() must return a conan_jax.config.Run, got {type(run).__name__}")
    return override(run, overrides)


def start_from(run: config.Run, place: str) -> config.Run:
    """`run` with the weights, the model and the tokenizer of another one: RUN, RUN/STAGE or RUN/STAGE@STEP, imported runs among them.

    How the model is computed (dtype, rematerialisation, attention, pooling, dropout) stays as `run` says. Raises `ConfigError` when
    there is no run.
    """
    folder = Path(re.sub(r"@\d+$", "", place))
    settings = next((path / "config.json" for path in (folder, folder.parent) if (path / "config.json").is_file()), None)
    if settings is None:
        raise ConfigError(f"there is no run in {folder}: it has no config.json. Import a model with `conan import hf`, or name another run")
    source = from_dict(read_json(settings))
    kept = {key: getattr(run.model, key) for key in
            ("compute_dtype", "scan_layers", "remat", "attention", "attention_block_size", "pooling", "hidden_dropout")}
    recorded = (read_json(settings.with_name("prepared.json"), {}).get("tokenizer") or {}).get("folder", "tokenizer")
    beside = settings.parent / "data" / recorded  # also when the run was moved since
    path = str(beside) if beside.is_dir() else source.tokenizer.path or str(Path(source.data_dir) / recorded)
    tokenizer = config.Tokenizer(vocab_size=source.tokenizer.vocab_size, path=path)
    return dataclasses.replace(run, init_from=place, model=dataclasses.replace(source.model, **kept), tokenizer=tokenizer)


def to_dict(value: Any) -> Any:
    """Plain dicts, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return value


def from_dict(data: dict[str, Any]) -> config.Run:
    """The inverse of `to_dict`; raises `ConfigError` naming the key."""
    if {"architectures", "model_type"} & data.keys():
        raise ConfigError("its config.json is that of a Hugging Face model, not of a run; import it first: "
                          "conan import hf FOLDER --out runs/NAME")
    return build(config.Run, data, "")


def flatten(run: config.Run) -> dict[str, Any]:
    """`{"weak.optimizer.learning_rate": 1e-4, ...}`: members of a list go by their name, stages without a prefix."""
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(item, f"{path}.{key}" if path else key)
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                name = _member_name(item, index)
                walk(item, name if path == "stages" else f"{path}.{name}")
        else:
            flat[path] = value

    walk(to_dict(run), "")
    return flat


def render(run: config.Run) -> str:
    """One `key = value` a line: what `conan config show` prints and the golden files hold."""
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in flatten(run).items())


def override(run: config.Run, assignments: typing.Sequence[str]) -> config.Run:
    """Apply `KEY=VALUE` strings, in order; VALUE is JSON, or a bare string.

    A key starts with a field of the run or the name of a stage: `model.num_layers=4`, `weak.steps=100`,
    `supervised.tasks.sts.weight=0.5`, `datasets.docs.limit=1000`.
    """
    data = to_dict(run)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write KEY=VALUE, for instance --set weak.steps=100")
        if key in ("output_dir", "data_dir", "name") and not text:
            raise ConfigError(f"--set {assignment}: the value is empty")
        _assign(data, key, _parse(text))
        if key == "name":  # the folders follow the name unless they were set by hand
            for folder, default in (("data_dir", f"{run.output_dir}/data"), ("output_dir", f"runs/{run.name}")):
                if data[folder] == default:
                    data[folder] = ""
        if key == "output_dir" and data["data_dir"] == f"{run.output_dir}/data":
            data["data_dir"] = ""
    return from_dict(data)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _member_name(item: dict[str, Any], index: int) -> str:
    return str(item.get("name") or item.get("dataset") or index)


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    parts = key.split(".")
    if parts[0] not in data and any(_member_name(s, i) == parts[0] for i, s in enumerate(data["stages"])):
        parts.insert(0, "stages")
    node: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            names = [_member_name(item, i) if isinstance(item, dict) else str(i) for i, item in enumerate(node)]
            if part not in names:
                raise ConfigError(_unknown(key, part, names))
            part = names.index(part)
        elif isinstance(node, dict):
            names = list(node) + ([s["name"] for s in data["stages"]] if depth == 0 else [])
            free_form = depth > 0 and parts[depth - 1] in ("fields", "options")
            if part not in node and not free_form:
                raise ConfigError(_unknown(key, part, names))
        else:
            raise ConfigError(f"{key}: {'.'.join(parts[:depth])} is a single value and has no key {part!r}")
        if last:
            node[part] = value
        else:
            node = node[part]


def _unknown(path: str, name: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown key {name!r} in {path}{hint} (known: {', '.join(known)})"


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def build(annotation: Any, value: Any, path: str) -> Any:
    """An object of `annotation` from plain data; `path` is the key shown in errors."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return _build_dataclass(annotation, value, path)
    if origin in (typing.Union, types.UnionType):
        choices = [a for a in args if dataclasses.is_dataclass(a)]
        if value is None and types.NoneType in args:
            return None
        if len(choices) == 1:
            return _build_dataclass(choices[0], value, path)
        if choices:
            return _build_dataclass(_stage_class(choices, value, path), value, path)
    if origin is tuple and args[-1] is Ellipsis:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} must be a list, got {value!r}")
        names = (_member_name(item, i) if isinstance(item, dict) else i for i, item in enumerate(value))
        return tuple(build(args[0], item, f"{path}.{name}") for name, item in zip(names, value, strict=True))
    try:
        return pydantic.TypeAdapter(annotation).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        if annotation is str and isinstance(value, int | float):
            return str(value)
        raise ConfigError(f"{path} = {value!r}: {error.errors()[0]['msg']}{_nearest_choice(annotation, value)}") from None


def _nearest_choice(annotation: Any, value: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal and isinstance(value, str):
        near = difflib.get_close_matches(value, [str(a) for a in typing.get_args(annotation)], n=1, cutoff=0.4)
        return f"; did you mean {near[0]!r}?" if near else ""
    return ""


def _stage_class(choices: list[type], value: Any, path: str) -> type:
    """The stage dataclass whose `kind` admits the value's; one with a free `kind` takes what has a colon."""
    kind = value.get("kind") if isinstance(value, dict) else None
    known: list[str] = []
    for cls in choices:
        hint = _fields(cls)["kind"]
        kinds = typing.get_args(hint)
        known += kinds
        if kind in kinds or (not kinds and ":" in str(kind)):
            return cls
    near = difflib.get_close_matches(str(kind), known, n=1, cutoff=0.4)
    raise ConfigError(f"{path}.kind = {kind!r} is no stage kind (known: {', '.join(known)}, or \"package.module:attr\")"
                      + (f"; did you mean {near[0]!r}?" if near else ""))


def _build_dataclass(cls: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{path or 'the run'} must be a mapping of {', '.join(_fields(cls))}; got {value!r}")
    fields = _fields(cls)
    for key in value:
        if key not in fields:
            raise ConfigError(_unknown(path or "the run", key, fields))
    required = [f.name for f in dataclasses.fields(cls)
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in value]
    if required:
        raise ConfigError(f"{path or 'the run'} lacks {', '.join(required)}")
    built = {key: build(fields[key], item, f"{path}.{key}" if path else key) for key, item in value.items()}
    try:
        return cls(**built)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path and path.split(".")[-1] not in str(error) else str(error)) from None
