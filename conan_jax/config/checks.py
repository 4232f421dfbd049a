"""What every dataclass of a recipe checks itself with."""

from __future__ import annotations

from conan_jax.errors import ConfigError


def check(ok: bool, message: str) -> None:
    """Raises `ConfigError` unless `ok`."""
    if not ok:
        raise ConfigError(message)


def positive(owner: object, *names: str) -> None:
    """Raises `ConfigError` naming the first of the fields that is not above 0."""
    for name in names:
        value = getattr(owner, name)
        check(value > 0, f"{type(owner).__name__}.{name} must be positive, got {value}")
