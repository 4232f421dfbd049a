"""Presets are good datasets of this project, and name columns that the TFDS sets really have."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from conan_jax.config import Dataset
from conan_jax.data.presets import find_preset, load_presets
from conan_jax.data.schema import parse
from conan_jax.data.tfds_reader import open_builder, split_source
from conan_jax.errors import ConfigError

PRESETS = load_presets(Path(__file__).parents[2] / "configs" / "tfds_presets.yaml")


def made_up(feature, name="x"):
    """A value a TFDS feature could give; texts differ by column so that no positive equals its query."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {key: made_up(f, key) for key, f in feature.items()}
    if isinstance(feature, tfds.features.Sequence):
        inner = made_up(feature.feature, name)
        return {key: [value] for key, value in inner.items()} if isinstance(inner, dict) else [inner]
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(0) if feature.names else "0"
    return name if np.dtype(feature.np_dtype).kind in "OSU" else 1.0


@pytest.mark.parametrize("name", PRESETS)
def test_preset_fits_the_features_of_its_tfds_set(name, tmp_path):
    dataset = PRESETS[name]
    tfds_name, split = split_source(dataset.source)
    builder = open_builder(tfds_name, str(tmp_path))
    assert builder.info.features and split
    parsed = parse(made_up(builder.info.features), dataset.kind, dataset.fields)
    assert not any(reason.startswith("no_") for reason in parsed.dropped)


def test_the_sets_people_ask_for_are_there():
    assert {"wiki40b_en", "xquad_zh", "stsb"} <= set(PRESETS)
    assert PRESETS["stsb"] == Dataset("stsb", "sts", "tfds:glue/stsb:train", {"score": "label"})


def test_an_unknown_preset_names_its_neighbours():
    assert find_preset(PRESETS, "stsb").kind == "sts"
    with pytest.raises(ConfigError, match="did you mean stsb"):
        find_preset(PRESETS, "stbs")


@pytest.mark.parametrize(("text", "said"), [
    ("a: {kind: text, source: x, colour: red}", "unknown key 'colour'"), ("a: {kind: texts, source: x}", "unknown kind 'texts'"),
    ("a: {kind: text}", "needs at least kind and source"), ("a: [1]", "needs at least"), ("- a", "must map preset names"),
    ("a: {", "is not YAML"),
    ("a: {kind: pair, source: x, fields: {positive: y}}", "fields maps 'positive'"), ("a: {kind: text, source: x, limit: -1}", "limit"),
    ("a: {kind: text, source: x, fields: [1]}", "fields must map"), ("a: !!python/object/apply:os.getcwd []", "is not YAML")])
def test_a_bad_presets_file_says_where(tmp_path, text, said):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_presets(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_presets(tmp_path / "none.yaml")
