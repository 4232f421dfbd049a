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
import traceback
import types
import typing
from pathlib import Path
from typing import Any

import pydantic

from conan_jax import config
from conan_jax.config.checks import saved_configuration
from conan_jax.errors import ConanError, ConfigError
from conan_jax.files import read_json

VARIANTS = {"full": "", "tiny": ""}  # of a file that names none
_ALIKE = 0.45  # likeness from which a key is suggested
_STEP = re.compile(r"(?P<folder>.+)@(?P<step>[0-9]{1,18})")


def load_run(spec: str, overrides: typing.Sequence[str] = ()) -> config.Run:
    """The recipe of `PATH.py` or `PATH.py:VARIANT`, with `KEY=VALUE` overrides applied.

    The file defines `get_config(variant)`, and may name its variants: `VARIANTS = {"full": "one line about it", ...}`. The first is
    taken where the spec names none. Raises `ConfigError` naming the file, its line, or the key.
    """
    path, colon, variant = (spec, "", "") if Path(spec).is_file() else spec.partition(":")
    module = _load_file(path)
    known = _variants(module, path)
    variant = variant if colon else next(iter(known))
    if variant not in known:
        raise ConfigError(f"{spec}: no variant {variant!r}; there is {', '.join(known)} (`conan config list {path}`)")
    run = _run_file(path, lambda: module.get_config(variant))
    if not isinstance(run, config.Run):
        raise ConfigError(f"{path}: get_config() must return a conan_jax.config.Run, got {type(run).__name__}")
    return override(run, overrides)


def variants(path: str) -> dict[str, str]:
    """The variants of a recipe file with a line about each. Raises `ConfigError` as `load_run`."""
    return _variants(_load_file(path), path)


def _load_file(path: str) -> types.ModuleType:
    file = Path(path)
    if not file.is_file():
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        raise ConfigError(f"no configuration file {path}" + (f"; configs/ holds {known}" if known else ""))
    if file.suffix != ".py":
        raise ConfigError(f"{path} is no configuration: a configuration is a .py file that defines get_config(variant)")
    module_spec = importlib.util.spec_from_file_location(f"conan_config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    _run_file(path, lambda: module_spec.loader.exec_module(module))
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{path} defines no function get_config(variant)")
    return module


def _variants(module: types.ModuleType, path: str) -> dict[str, str]:
    known = getattr(module, "VARIANTS", VARIANTS)
    if not isinstance(known, dict) or not known or not all(isinstance(text, str) for item in known.items() for text in item):
        raise ConfigError(f'{path}: VARIANTS must map names to one line each, for instance {{"full": "the published size"}}; got {known!r}')
    return known


def _run_file(path: str, work: typing.Callable[[], Any]) -> Any:
    """The value of `work`, which runs code of the user's file. Any error becomes a `ConfigError` with the file and the line."""
    try:
        return work()
    except (Exception, SystemExit) as error:
        text = f"{error}" if isinstance(error, ConanError) else f"{type(error).__name__}: {error}"
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == Path(path).absolute()
                 or frame.filename == path]
        number = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        raise ConfigError(f"{path}{f':{number}' if number else ''} could not be read: {text}") from error


def start_from(run: config.Run, place: str) -> config.Run:
    """`run` with the weights, the model and the tokenizer of another one: RUN, RUN/STAGE or RUN/STAGE@STEP, imported runs among them.

    How the model is computed (dtype, rematerialisation, attention, pooling, dropout) stays as `run` says. Raises `ConfigError` when
    there is no run.
    """
    folder, _ = split_step(place)
    settings = next((path / "config.json" for path in (folder, folder.parent) if (path / "config.json").is_file()), None)
    if settings is None:
        raise ConfigError(f"there is no run in {folder}: it has no config.json. Import a model with `conan import hf`, or name another run")
    source = from_dict(read_json(settings))
    recorded = (read_json(settings.with_name("prepared.json"), {}).get("tokenizer") or {}).get("folder", "tokenizer")
    beside = settings.parent / "data" / recorded  # also when the run was moved since
    path = str(beside) if beside.is_dir() else source.tokenizer.path or str(Path(source.data_dir) / recorded)
    return with_start(run, place, source.model, config.Tokenizer(path=path))


def with_start(run: config.Run, place: str, model: config.Model, tokenizer: config.Tokenizer) -> config.Run:
    """`run` started from the weights in `place`, whose model and tokenizer these are; how they are computed stays as `run` says."""
    kept = {key: getattr(run.model, key) for key in
            ("compute_dtype", "scan_layers", "remat", "attention", "attention_block_size", "pooling", "hidden_dropout")}
    return dataclasses.replace(run, init_from=place, model=dataclasses.replace(model, **kept), tokenizer=tokenizer)


def split_step(place: str | Path) -> tuple[Path, int | None]:
    """(folder, step) of `FOLDER@STEP`; (folder, None) without a step, or when a folder of the whole name exists."""
    found = _STEP.fullmatch(str(place))
    if found is None or Path(place).exists():
        return Path(place), None
    return Path(found["folder"]), int(found["step"])


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
    """The inverse of `to_dict` for a configuration that was saved, by this version or an earlier one; raises `ConfigError` naming the key.

    An option that nothing reads, which earlier versions accepted, is dropped.
    """
    if {"architectures", "model_type"} & data.keys():
        raise ConfigError("its config.json is that of a Hugging Face model, not of a run; import it first: "
                          "conan import hf FOLDER --out runs/NAME")
    with saved_configuration():
        return build(config.Run, data, "")


def flatten(run: config.Run) -> dict[str, Any]:
    """`{"weak.optimizer.learning_rate": 1e-4, ...}`: members of a list go by their name, stages without a prefix."""
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if not isinstance(value, dict) or not value:
            flat[path] = value
            return
        for key, item in value.items():
            walk(item, key if path in ("", "stages") else f"{path}.{key}")

    walk(_by_name(to_dict(run)), "")
    return flat


def render(run: config.Run) -> str:
    """One `key = value` a line: what `conan config show` prints and the golden files hold."""
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in flatten(run).items())


def override(run: config.Run, assignments: typing.Sequence[str]) -> config.Run:
    """`run` with `KEY=VALUE` strings applied; VALUE is JSON, or a bare string.

    A key starts with a field of the run or the name of a stage: `model.num_layers=4`, `weak.steps=100`,
    `supervised.tasks.sts.weight=0.5`, `datasets.docs.limit=1000`. A new name with a JSON object adds a member,
    `datasets.notes={"kind": "text", "source": "notes.txt"}`, and `null` drops one, `stages.weak=null`. A new stage is the last.

    The order does not matter: a whole object is set before its parts, and folders that follow from `name` and `output_dir` are filled in
    last. Where one key is given twice, the later value counts. Raises `ConfigError` naming the key.
    """
    data = _by_name(to_dict(run))
    given: dict[tuple[str, ...], tuple[str, Any]] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write KEY=VALUE, for instance --set weak.steps=100")
        if key in ("output_dir", "data_dir", "name") and not text:
            raise ConfigError(f"--set {assignment}: the value is empty")
        given[tuple(key.split("."))] = (key, _parse(key, text))
    given = _with_stages(given, data)
    for parts in sorted(given, key=len):
        _assign(data, parts, *given[parts])
    for folder, follows in (("data_dir", f"{run.output_dir}/data"), ("output_dir", f"runs/{run.name}")):
        if (folder,) not in given and data[folder] == follows:
            data[folder] = ""
    changed = build(config.Run, _without_names(data), "")
    _refuse_unread(changed, given)
    return changed


def _with_stages(given: dict[tuple[str, ...], tuple[str, Any]], data: dict[str, Any]) -> dict[tuple[str, ...], tuple[str, Any]]:
    """The keys that begin with the name of a stage, also of one that is added, with `stages` before it."""
    added = given.get(("stages",), (None, None))[1]
    names = {*data["stages"], *(parts[1] for parts in given if parts[0] == "stages" and len(parts) > 1),
             *(_member_names(added) if isinstance(added, list) else ())}

    def whole(parts: tuple[str, ...]) -> tuple[str, ...]:
        begins = any(".".join(parts[:size]) in names for size in range(1, len(parts) + 1))
        return ("stages", *parts) if begins and parts[0] not in data else parts

    return {whole(parts): item for parts, item in given.items()}


def _refuse_unread(run: config.Run, given: dict[tuple[str, ...], tuple[str, Any]]) -> None:
    """Raises `ConfigError` for a value that was given and that the configuration does not hold, because nothing reads it."""
    flat = flatten(run)
    for parts, (key, value) in given.items():
        value = value.value if isinstance(value, _Bare) else value
        where = ".".join(parts[1:] if parts[0] == "stages" else parts)
        if value is not None and flat.get(where, value) is None:
            raise ConfigError(f"{key} means nothing beside the other settings; nothing would read it. Leave it out")


@dataclasses.dataclass(frozen=True)
class _Bare:
    """A number or truth value of the command line, and its text, which a field of text takes as it is: `name=1e5` is no number."""

    value: Any
    text: str


def _parse(key: str, text: str) -> Any:
    def distinct_keys(pairs: list[tuple[str, Any]]) -> _Given:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{key}: the JSON object has the key {name!r} twice")
        return _Given(pairs)

    try:
        value = json.loads(text, object_pairs_hook=distinct_keys)
    except (ValueError, RecursionError):
        return text
    return _Bare(value, text) if isinstance(value, bool | int | float) else value


class _Given(dict[str, Any]):
    """An object of the command line: `build` checks its keys, as those that it leaves out are not there yet."""


class _Members(dict[str, Any]):
    """The members of a list by their name, in order; None marks one to drop."""


def _member_names(items: typing.Sequence[Any]) -> list[str]:
    """A name for each member of a list: its own, or its number where it has none or the name was there before."""
    names: list[str] = []
    for index, item in enumerate(items):
        own = str(item.get("name") or item.get("dataset") or index) if isinstance(item, dict) else str(index)
        names.append(own if own not in names else str(index) if str(index) not in names else f"{own}#{index}")
    return names


def _by_name(value: Any) -> Any:
    """Plain data with each list of mappings as `_Members`."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return _Members(zip(_member_names(value), map(_by_name, value), strict=True))
    if isinstance(value, dict):
        return type(value)((key, item if key == "options" else _by_name(item)) for key, item in value.items())
    return value


def _without_names(value: Any) -> Any:
    """The inverse of `_by_name`; members that are None are left out."""
    if isinstance(value, _Members):
        return [_without_names(item) for item in value.values() if item is not None]
    if isinstance(value, dict):
        return {key: _without_names(item) for key, item in value.items()}
    return value


def _assign(data: dict[str, Any], parts: tuple[str, ...], key: str, value: Any) -> None:
    """Set one key of the data that `_by_name` gives."""
    node, holder, depth, options = data, "", 0, False
    while True:
        free_form = options or isinstance(node, _Given)
        size = next((n for n in range(len(parts) - depth, 0, -1) if ".".join(parts[depth:depth + n]) in node), 1)  # names may hold dots
        part = ".".join(parts[depth:depth + size])
        last = depth + size == len(parts)
        if part not in node and not free_form:
            if not (last and isinstance(node, _Members) and _may_add(node, part, value)):
                raise ConfigError(_unknown(key, part, parts[:depth], node, data))
            own = "dataset" if holder == "datasets" and parts[0] == "stages" else "name"
            if isinstance(value, dict) and holder != "buckets":
                if value.get(own, part) != part:
                    raise ConfigError(f"{key}: the new member is called {_shown(value[own])} in its own {own}; give it one name")
                value = _Given({own: part, **value})
        if last:
            node[part] = _by_name(value)
            return
        below = node.setdefault(part, _Given()) if free_form else node[part]
        options = options or not isinstance(node, _Members) and part in ("fields", "options")
        depth += size
        if isinstance(below, list):
            below = node[part] = _Members({str(index): item for index, item in enumerate(below)})
        if not isinstance(below, dict):
            what = "was dropped" if below is None and isinstance(node, _Members) else f"is a single value and has no key {parts[depth]!r}"
            raise ConfigError(f"{key}: {'.'.join(parts[:depth])} {what}")
        node, holder = below, part


def _may_add(members: _Members, name: str, value: Any) -> bool:
    """True for the next number where members have numbers, else for an object under any name."""
    if members and all(isinstance(item, dict) and ("name" in item or "dataset" in item) for item in members.values() if item is not None):
        return isinstance(value, dict)
    return name == str(len(members)) if members else isinstance(value, dict)


def _unknown(key: str, name: str, prefix: tuple[str, ...], node: dict[str, Any], data: dict[str, Any]) -> str:
    """An error text for the part `name` of a key that `node` does not have, with the nearest key below `node`."""
    known = [*node, *(data["stages"] if node is data else ())]
    near = max(_below(dict.fromkeys(known) | node), key=lambda other: _likeness(name, other), default="")
    whole = ".".join([*prefix, near]).removeprefix("stages.")
    hint = f"; did you mean {whole!r}?" if near and _likeness(name, near) >= _ALIKE else ""
    return f"unknown key {name!r} in {key}{hint} (known: {', '.join(map(str, known))})"


def _below(node: Any, prefix: str = "") -> list[str]:
    """The keys of nested mappings, joined with dots."""
    if not isinstance(node, dict):
        return []
    return [key for name, item in node.items() for key in (f"{prefix}{name}", *_below(item, f"{prefix}{name}."))]


def _likeness(name: str, key: str) -> float:
    """Likeness of a mistyped name to a key, in [0, 1]: to its last part, or to the first letters of the words of that."""
    leaf = key.rsplit(".", 1)[-1]
    initials = "".join(word[:1] for word in leaf.split("_"))
    ratios = [difflib.SequenceMatcher(None, name.lower(), leaf.lower()).ratio(), 0.9 * (len(initials) > 1 and name.lower() == initials)]
    return max(ratios) - 0.01 * key.count(".")


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


_adapter = functools.cache(pydantic.TypeAdapter)


def build(annotation: Any, value: Any, path: str) -> Any:
    """An object of `annotation` from plain data; `path` is the key shown in errors."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(value, _Bare):
        value = value.text if annotation is str or str in args else value.value
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
            raise ConfigError(f"{path} must be a list, got {_shown(value)}")
        return tuple(build(args[0], item, f"{path}.{name}") for name, item in zip(_member_names(value), value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: build(args[1], item, f"{path}.{key}") for key, item in value.items()}
    try:
        return _adapter(annotation).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path} = {_shown(value)}: {error.errors()[0]['msg']}{_nearest_choice(annotation, value)}") from None


def _shown(value: Any) -> str:
    """A value in an error, not longer than a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, too deep a nesting
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


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
        raise ConfigError(f"{path or 'the run'} must be a mapping of {', '.join(_fields(cls))}; got {_shown(value)}")
    fields = _fields(cls)
    for key in value:
        if key not in fields:
            near = max(fields, key=lambda name: _likeness(str(key), name))
            hint = f"; did you mean {near!r}?" if _likeness(str(key), near) >= _ALIKE else ""
            raise ConfigError(f"unknown key {key!r} in {path or 'the run'}{hint} (known: {', '.join(fields)})")
    required = [f.name for f in dataclasses.fields(cls)
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in value]
    if required:
        raise ConfigError(f"{path or 'the run'} lacks {', '.join(required)}")
    built = {key: build(fields[key], item, f"{path}.{key}" if path else key) for key, item in value.items()}
    try:
        return cls(**built)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None
