"""Averages of checkpoints against NumPy; checkpoints that cannot be averaged are refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from conan_jax import config_io
from conan_jax.cli.main import app
from conan_jax.errors import CheckpointError, ConanError, ConfigError
from conan_jax.export.merge import linear, merge, slerp
from conan_jax.hf.importer import import_folder
from conan_jax.inference.encoder import Encoder
from conan_jax.train import checkpoint, start_rule
from tests.hf import folders

RNG = np.random.default_rng(4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs of one model with other weights."""
    place = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        folder, _ = folders.write(place / f"hf{seed}", "qwen2", seed=seed)
        import_folder(folder, place / f"r{seed}")
    return place


def params_of(run):
    return checkpoint.restore_params(*start_rule.locate(run))


def leaves(run):
    return {jax.tree_util.keystr(p): np.float64(a) for p, a in jax.tree_util.tree_flatten_with_path(params_of(run))[0]}


@pytest.mark.parametrize("weights", [None, [0.5, 0.3, 0.2]])
def test_linear_is_the_weighted_sum(runs, tmp_path, weights):
    made = merge([str(runs / f"r{i}") for i in range(3)], tmp_path / "m", weights=weights)
    shares = weights or [1 / 3] * 3
    each = [leaves(runs / f"r{i}") for i in range(3)]
    for name, found in leaves(tmp_path / "m").items():
        np.testing.assert_allclose(found, sum(s * e[name] for s, e in zip(shares, each)), rtol=1e-6, atol=1e-8)
    assert made.straight == () and [share for _, _, share in made.sources] == pytest.approx(shares)
    assert json.loads((tmp_path / "m" / "merge.json").read_text())["method"] == "linear"


def test_slerp_goes_along_the_arc_of_every_tensor(runs, tmp_path):
    made = merge([str(runs / "r0"), str(runs / "r1/imported@1")], tmp_path / "m", weights=[0.7, 0.3], method="slerp")
    a, b, found = (params_of(run) for run in (runs / "r0", runs / "r1", tmp_path / "m"))

    def arc(x, y, t=0.3):
        """Another way to the same point: the direction of x turned by t W in the plane of both, in terms of the two, each at its length."""
        lengths = [np.linalg.norm(np.float64(v)) for v in (x, y)]
        u, w = (np.float64(v).ravel() / length for v, length in zip((x, y), lengths))
        normal = w - (w @ u) * u
        normal /= np.linalg.norm(normal)
        angle = np.arctan2(w @ normal, w @ u)
        point = np.cos(t * angle) * u + np.sin(t * angle) * normal  # = p u + q w
        q = (point @ normal) / (w @ normal)
        p = point @ u - q * (w @ u)
        return p * lengths[0] * u + q * lengths[1] * w

    def kernel(params):
        return params["layers"]["attention"]["q_proj"]["kernel"]

    for layer in range(folders.LAYERS):
        np.testing.assert_allclose(np.ravel(kernel(found)[layer]), arc(kernel(a)[layer], kernel(b)[layer]), atol=1e-6)
    np.testing.assert_allclose(np.ravel(found["embedding"]), arc(a["embedding"], b["embedding"]), atol=1e-6)
    assert made.straight == () and made.tensors == 2 + 12 * folders.LAYERS


def test_what_has_no_arc_is_averaged_linearly(runs, tmp_path):
    x = RNG.normal(size=(3, 4)).astype(np.float32)
    for y in (x, 2 * x, -x, np.zeros_like(x), x * np.float32(1 + 1e-7)):
        assert slerp(x, y, 0.5) is None and slerp(y, x, 0.5) is None
    y = RNG.normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_allclose(slerp(x, y, 0.0), x, atol=1e-6)
    np.testing.assert_allclose(slerp(x, y, 1.0), y, atol=1e-6)
    unit_x, unit_y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    assert np.linalg.norm(slerp(unit_x, unit_y, 0.4)) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(linear([unit_x, unit_y], [0.6, 0.4])) < 0.99
    made = merge([str(runs / "r0"), str(runs / "r0")], tmp_path / "m", method="slerp")
    assert len(made.straight) == made.tensors and "embedding" in made.straight
    for name, found in leaves(tmp_path / "m").items():
        np.testing.assert_array_equal(found, leaves(runs / "r0")[name])


def test_the_result_is_a_run(runs, tmp_path):
    places = [str(runs / "r0"), str(runs / "r1")]
    result = CliRunner().invoke(app, ["merge", *places, "--out", str(tmp_path / "m"), "--weights", "1,0", "--json"])
    said = json.loads(result.stdout)
    assert said["stage"] == "imported" and said["sources"] == [
        {"folder": str(runs / "r0/imported"), "step": 1, "weight": 1.0}, {"folder": str(runs / "r1/imported"), "step": 1, "weight": 0.0}]
    assert said["sources"] == json.loads((tmp_path / "m" / "merge.json").read_text())["sources"]
    texts = ["the reader", "a cat sits"]
    np.testing.assert_allclose(Encoder.load(tmp_path / "m").encode(texts), Encoder.load(runs / "r0").encode(texts), atol=1e-6)
    run = config_io.from_dict(json.loads((tmp_path / "m" / "config.json").read_text()))
    assert run.name == "m" and run.output_dir == str(tmp_path / "m")
    again = CliRunner().invoke(app, ["merge", str(tmp_path / "m"), str(runs / "r2"), "--out", str(tmp_path / "n"), "--method", "slerp"])
    assert again.exit_code == 0 and f"0.5 x {runs}/r2/imported (step 1)" in again.output.replace("\n", "")


@pytest.mark.parametrize("arguments, message", [
    ({"places": 1}, "two checkpoints or more"), ({"places": 3, "method": "slerp"}, "3 are named"),
    ({"method": "mean"}, "'mean' is not known"),
    ({"weights": [0.5]}, "2 checkpoints need as many weights, got 1"), ({"weights": [0.5, 0.6]}, "sum 1, got 0.5, 0.6"),
    ({"weights": [1.5, -0.5]}, "0 or more"), ({"weights": [float("nan"), 0.5]}, "0 or more"),
])
def test_arguments_that_mean_nothing_are_refused(runs, tmp_path, arguments, message):
    places = [str(runs / f"r{i}") for i in range(arguments.pop("places", 2))]
    with pytest.raises(ConfigError, match=message):
        merge(places, tmp_path / "m", **arguments)
    assert not (tmp_path / "m").exists()


def test_other_models_and_tokenizers_are_refused(runs, tmp_path):
    import_folder(folders.write(tmp_path / "a", "qwen2", rope_parameters={"rope_type": "default", "rope_theta": 7.0})[0], tmp_path / "rope")
    folder, _ = folders.write(tmp_path / "b", "qwen2")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<pad>"}))
    import_folder(folder, tmp_path / "end")
    for other, message in (("rope", "model.rope_theta is 7.0 there and 1000000.0 here.*one model"), ("end", "was trained with tokenizer")):
        with pytest.raises(CheckpointError, match=message):
            merge([str(runs / "r0"), str(tmp_path / other)], tmp_path / "m")
    with pytest.raises(ConanError, match="no complete checkpoint"):
        merge([str(runs / "r0"), str(tmp_path / "none")], tmp_path / "m")
    with pytest.raises(ConfigError, match="is there already"):
        merge([str(runs / "r0"), str(runs / "r1")], runs / "r2")


def test_steps_of_one_stage(runs, tmp_path):
    """The average stands where the newest of them stood."""
    stage, step = start_rule.locate(runs / "r0")
    metadata = checkpoint.read_metadata(stage, step)
    shutil.copytree(runs / "r0", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "imported")
    for step, source in ((3, "r0"), (7, "r1"), (5, "r2")):
        checkpoint.write_weights(tmp_path / "other" / str(step), step, params_of(runs / source), metadata)
        (tmp_path / "run/imported/checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / str(step) / "checkpoints" / str(step)).rename(tmp_path / "run/imported/checkpoints" / str(step))
    made = merge([f"{tmp_path}/run/imported@3", f"{tmp_path}/run", f"{tmp_path}/run@5"], tmp_path / "m", weights=[0.5, 0.25, 0.25])
    assert made.step == 7 and [step for _, step, _ in made.sources] == [3, 7, 5]
    each = [leaves(runs / f"r{i}") for i in range(3)]
    for name, found in leaves(tmp_path / "m").items():
        np.testing.assert_allclose(found, 0.5 * each[0][name] + 0.25 * each[1][name] + 0.25 * each[2][name], rtol=1e-6, atol=1e-8)
