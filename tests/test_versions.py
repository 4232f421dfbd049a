"""A printed command installs what is missing, wherever it is typed and however conan_jax was installed."""

import shlex
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from conan_jax import versions

EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("installed", [True, False])
def test_an_extra_is_installed_by_its_requirements(monkeypatch, tmp_path, installed):
    monkeypatch.chdir(tmp_path)  # inside of a folder the interpreter is named from there
    marked = [f"{requirement}; extra == \"{extra}\"" for extra, found in EXTRAS.items() for requirement in found]

    def requires(name):
        if not installed:
            raise metadata.PackageNotFoundError(name)
        return ["jax>=0.10", *marked]

    monkeypatch.setattr(versions.metadata, "requires", requires)
    for extra, requirements in EXTRAS.items():
        command = shlex.split(versions.install_command(extra=extra))
        assert command == [sys.executable, "-m", "pip", "install", *requirements]


def test_the_path_of_a_clone_is_no_name_of_a_package(monkeypatch, tmp_path):
    clone = tmp_path / "conan_jax"
    (clone / "conan_jax").mkdir(parents=True)
    (clone / "pyproject.toml").touch()
    monkeypatch.setattr(versions, "__file__", str(clone / "conan_jax/versions.py"))
    for here, source in ((clone, ".[preflight]"), (tmp_path, "./conan_jax[preflight]"), (Path("/"), f"./{clone.relative_to('/')}[preflight]")):
        monkeypatch.chdir(here)
        make, install = versions.install_command(extra="preflight", environment=".venv-tpu").split(" && ")
        assert shlex.split(make)[1:] == ["-m", "venv", ".venv-tpu"]
        assert shlex.split(install) == [".venv-tpu/bin/python", "-m", "pip", "install", source]
