"""Smoothed losses: the formula, one mean for each dataset, a resume that continues them."""

import json

import pytest

from conan_jax.train.smoothing import SMOOTHING_UPDATES, SmoothedLosses


def test_each_dataset_has_a_mean_of_its_own():
    losses = SmoothedLosses()
    for _ in range(30):
        losses.add({"loss": 4.0, "grad_norm": 1.0}, {"": "hard"})
        losses.add({"loss": 1.0}, {"": "easy"})
    means = losses.state()
    assert set(means) == {"loss", "loss/hard", "loss/easy"}
    assert (means["loss/hard"]["mean"], means["loss/easy"]["mean"]) == (4.0, 1.0)
    assert 2.3 < means["loss"]["mean"] < 2.7 and means["loss"]["updates"] == SMOOTHING_UPDATES


def test_the_first_updates_have_an_ordinary_mean_and_values_that_are_not_finite_are_left_out():
    losses = SmoothedLosses()
    for value in (1.0, 2.0, float("nan"), 6.0, float("inf")):
        losses.add({"loss": value, "loss/sts": float("nan")}, {})
    assert losses.state() == {"loss": {"mean": pytest.approx(3.0), "updates": 3}}


def test_tasks_with_several_datasets_have_both_means():
    losses = SmoothedLosses()
    losses.add({"loss": 3.0, "loss/retrieval": 2.0, "loss/sts": 1.0}, {"retrieval": "web"})
    assert {key: found["mean"] for key, found in losses.state().items()} == {
        "loss": 3.0, "loss/retrieval": 2.0, "loss/retrieval/web": 2.0, "loss/sts": 1.0}


@pytest.mark.parametrize("stop", [1, 7, 25])
def test_a_resume_from_the_last_record_continues_exactly(stop):
    values = [1 / (step + 1) for step in range(40)]
    whole, first = SmoothedLosses(), SmoothedLosses()
    for value in values:
        whole.add({"loss": value}, {})
    for value in values[:stop]:
        first.add({"loss": value}, {})
    second = SmoothedLosses(json.loads(json.dumps(first.state())))
    for value in values[stop:]:
        second.add({"loss": value}, {})
    assert second.state() == whole.state()
