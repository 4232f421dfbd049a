"""The soft mask and the contrastive objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conan_jax.config.checks import check, check_values, one_of, positive, read_under


@dataclass(frozen=True)
class SoftMask:
    """The causal -> bidirectional anneal of METHODS 1.3. `steps=None` means the whole stage.

    "constant" is bidirectional from the first step; the other fields have no meaning with it.
    """

    apply: Literal["log", "multiply"] | None = None  # "log" by default
    index: Literal["key", "query"] | None = None  # "key" by default
    schedule: Literal["linear", "accelerate", "decelerate", "constant"] = "linear"
    steps: int | None = None

    def __post_init__(self) -> None:
        check_values(self)
        positive(self, "steps")
        annealed = ("linear", "accelerate", "decelerate")
        one_of("schedule", self.schedule, (*annealed, "constant"))
        read_under(self, "schedule", self.schedule, {"apply": (annealed, "log"), "index": (annealed, "key"), "steps": (annealed, None)})


@dataclass(frozen=True)
class Contrastive:
    """InfoNCE over the global batch (METHODS 1.5).

    `false_negative_margin` drops a candidate that scores higher than the positive by more than this; None turns that
    test off. A candidate whose text is the positive's or the query's is dropped always: it is no negative.
    """

    temperature: float = 0.02
    false_negative_margin: float | None = 0.1
    query_query: bool = False
    passage_passage: bool = False
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_values(self)
        positive(self, "temperature")


@dataclass(frozen=True)
class HardNegatives:
    """Dynamic hard-negative mining (METHODS 1.4): slots per query, candidates carried per query, the rule.

    The candidates of a query come hardest first: by falling `scores` where its record has them, else in the order of the record.

    v2 replaces one slot when `s0 < low_score`, or when `drop_ratio * s < s0 and s < ceiling`. v1 swaps all slots
    every `every` steps when, on the sample's means, `drop_ratio * s < s0 and |s| < ceiling`.
    `None` takes the published constant of the rule (v2: 1.2, 0.7; v1: 1.15, 0.8).
    """

    rule: Literal["v2", "v1", "off"] = "v2"
    num_negatives: int = 7
    pool_size: int = 32
    skip_top: int | None = None  # None: 10 under v1, 0 under v2
    low_score: float | None = None  # v2; 0.4 by default
    drop_ratio: float | None = None  # v1 and v2
    ceiling: float | None = None  # v1 and v2
    every: int | None = None  # v1; 100 by default

    def __post_init__(self) -> None:
        check_values(self)
        positive(self, "num_negatives", "pool_size", "every")
        one_of("rule", self.rule, ("v2", "v1", "off"))
        read_under(self, "rule", self.rule, {"low_score": (("v2",), 0.4), "drop_ratio": (("v1", "v2"), None),
                                             "ceiling": (("v1", "v2"), None), "every": (("v1",), 100)})
        check(self.pool_size >= self.num_negatives,
               f"hard_negatives.pool_size {self.pool_size} must be at least num_negatives {self.num_negatives}")
        check(self.skip_top is None or self.skip_top >= 0, f"hard_negatives.skip_top must not be negative, got {self.skip_top}")


@dataclass(frozen=True)
class Matryoshka:
    """MRL: the wrapped loss on the first `dims` coordinates, re-normalised. Empty `dims`: the full width only."""

    dims: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()  # empty: equal weights

    def __post_init__(self) -> None:
        check_values(self)
        dims, weights = self.dims, self.weights
        check(all(d > 0 for d in dims) and len(set(dims)) == len(dims), f"matryoshka.dims must be positive and distinct, got {dims}")
        check(not weights or len(weights) == len(dims), f"matryoshka.weights {weights} needs one weight for each of dims {dims}")
        check(not weights or (min(weights) >= 0 and sum(weights) > 0),
               f"matryoshka.weights must be non-negative with a positive sum, got {weights}")
