"""Rewrite the golden renderings after a deliberate change: python -m tests.update_golden."""

from conan_jax import config_io
from tests import shardings
from tests.test_config import GOLDEN, SPECS, load
from tests.test_shardings_golden import FILE

if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for spec in SPECS:
        (GOLDEN / (spec.replace(".py:", ".") + ".txt")).write_text(config_io.render(load(spec)), encoding="utf-8")
    FILE.write_text(shardings.render(load("conan_v2.py"), "v5e-256"), encoding="utf-8")
