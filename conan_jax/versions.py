"""Versions of the installed packages, which figures and pages are kept with, and the command that installs more of them."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

PACKAGE = "conan_jax"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The version of each package, in their order; those that are not installed are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def install_command(*packages: str, extra: str | None = None, environment: str | None = None) -> str:
    """The shell command that installs `packages` and the requirements of an `extra` of conan_jax.

    The requirements are named one by one: that works for a clone, for an installed package and in every folder, and leaves conan_jax
    as it is. They go into the environment of this process, or, with conan_jax, into a new one in the folder `environment`.
    """
    python = _from_here(sys.executable)
    if environment is not None:
        made = shlex.join([python, "-m", "venv", environment])
        return f"{made} && {shlex.join([f'{environment}/bin/python', '-m', 'pip', 'install', *packages, _own_source(extra)])}"
    wanted = [*packages, *(_requirements(extra) if extra is not None else ())]
    if not importlib.util.find_spec("pip"):  # as in environments made by uv
        return shlex.join(["uv", "pip", "install", "--python", python, *wanted])
    return shlex.join([python, "-m", "pip", "install", *wanted])


def _own_source(extra: str | None) -> str:
    """What pip installs conan_jax from: the clone that this package runs from, or where it was installed from."""
    clone, suffix = Path(__file__).parents[1], "" if extra is None else f"[{extra}]"
    if not (clone / "pyproject.toml").is_file():
        origin = json.loads(metadata.distribution(PACKAGE).read_text("direct_url.json") or "{}").get("url")
        return f"{PACKAGE}{suffix}" + (f" @ {origin}" if origin else "")
    path = _from_here(str(clone))
    return f"{path if path.startswith(('.', '/')) else f'./{path}'}{suffix}"  # without a slash pip looks the name up in its index


def _requirements(extra: str) -> list[str]:
    """The requirements of an extra, without their markers."""
    try:
        marked = re.compile(rf"""(?P<requirement>[^;]+);.*\bextra *== *["']{re.escape(extra)}["']""")
        found = (marked.match(requirement) for requirement in metadata.requires(PACKAGE) or ())
        return [match["requirement"].strip() for match in found if match]
    except metadata.PackageNotFoundError:  # a clone that is on PYTHONPATH and not installed
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
        return project["project"]["optional-dependencies"][extra]


def _from_here(path: str) -> str:
    """`path` relative to the current folder when it is inside of it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
