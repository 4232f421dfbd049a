"""Random `--set` values: each gives a run that JSON keeps, or a ConfigError."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conan_jax import config, config_io
from conan_jax.errors import ConfigError

RUN = config_io.load_run(str(Path(__file__).parents[1] / "configs" / "demo.py:tiny"))
KEYS = sorted({*config_io.flatten(RUN), *(key.rpartition(".")[0] for key in config_io.flatten(RUN)), "stages", "datasets",
               "evaluations", "stages.new", "datasets.new", "weak.datasets.docs", "supervised.tasks.new", "weak.buckets.1",
               "weak.options.x", "a..b"} - {""})

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-2, 70), st.floats(), st.text(max_size=8),
                    st.sampled_from([2**31, 2**63, 2**200, 1e-60, 1e308, "weak", "text", "docs", "v1", "constant", "off", "\0", "\ud800"]))
names = st.sampled_from(["name", "kind", "source", "steps", "dataset", "datasets", "weight", "path", "query_length", "options", "x"])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.text(max_size=3), inner, max_size=4),
                      max_leaves=6)
texts = st.one_of(values.map(json.dumps), st.text(max_size=12), st.sampled_from(
    ["[" * 100_000, "9" * 5000, "-0", "1e999", "1_0", "NaN", "-Infinity", "{", "", "=", '{"a": 1, "a": 2}', "null", "[null]"]))
assignments = st.builds(lambda key, text: f"{key}={text}", st.sampled_from(KEYS) | st.text(max_size=10), texts)


@settings(max_examples=1000, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(assignments, min_size=1, max_size=3))
def test_any_override_gives_a_run_or_a_config_error(sets: list[str]) -> None:
    try:
        run = config_io.override(RUN, sets)
    except ConfigError:
        return
    assert isinstance(run, config.Run)
    saved = json.dumps(config_io.to_dict(run), allow_nan=False, ensure_ascii=False).encode()
    assert config_io.from_dict(json.loads(saved)) == run
    assert config_io.override(run, []) == run
    assert config_io.render(run)
