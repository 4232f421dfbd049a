"""`python -m conan_jax` is `conan`."""

from typing import NoReturn

from conan_jax import allocator
from conan_jax.cli import exits


def run() -> NoReturn:
    """Entry point. Signals are heard before the commands are imported."""
    exits.run(_command)


def _command() -> None:
    allocator.start_with_huge_pages()
    from conan_jax.cli.main import app

    app()


if __name__ == "__main__":
    run()
