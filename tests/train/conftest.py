"""Programs compiled by one test serve the others: the toy stage is one program, and each run would compile it anew."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")


@pytest.fixture(scope="package", autouse=True)
def shared_programs(tmp_path_factory):
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name, value in zip(OPTIONS, (str(tmp_path_factory.mktemp("programs")), 0.0, -1)):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
