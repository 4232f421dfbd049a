"""Smoothed losses: the loss of a single batch depends on the dataset that the batch comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping

SMOOTHING_UPDATES = 20


class SmoothedLosses:
    """An exponential mean of each loss, and of each dataset of a mixture.

        n = min(n + 1, SMOOTHING_UPDATES);    mean = mean + (loss - mean) / n

    Keys are those of the metrics, `loss` and `loss/TASK`. The mean of one dataset has `/DATASET` after the key.
    """

    def __init__(self, saved: Mapping[str, Mapping[str, float]] | None = None) -> None:
        """`saved`: the `state` that the last record holds, so that a resumed stage continues its means."""
        self._means = {key: (float(found["mean"]), int(found["updates"])) for key, found in (saved or {}).items()}

    def add(self, metrics: Mapping[str, float], datasets: Mapping[str, str]) -> None:
        """Add one update. `datasets`: {task: dataset of this batch}, as `Pipeline.datasets_of`. A loss that is not finite is left out."""
        for key, value in metrics.items():
            name, _, task = key.partition("/")
            if name != "loss" or not math.isfinite(value):
                continue
            for of in (key, f"{key}/{datasets[task]}") if task in datasets else (key,):
                mean, updates = self._means.get(of, (0.0, 0))
                updates = min(updates + 1, SMOOTHING_UPDATES)
                self._means[of] = (mean + (value - mean) / updates, updates)

    def state(self) -> dict[str, dict[str, float]]:
        """{key: {"mean": value, "updates": number of updates in it}}."""
        return {key: {"mean": mean, "updates": updates} for key, (mean, updates) in self._means.items()}
