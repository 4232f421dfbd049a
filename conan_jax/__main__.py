"""`python -m conan_jax` is `conan`."""

from conan_jax.cli.main import run

if __name__ == "__main__":
    run()
