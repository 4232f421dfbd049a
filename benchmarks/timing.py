"""What every benchmark shares: steps timed in turns, ratios of neighbours in time, figures with their bars. Measures nothing by itself."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import conan_jax  # sets the allocator before jax starts  # noqa: F401

import jax

Figure = dict[str, Any]


def seconds(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round, the steps taking turns; a first round warms up and is not kept.

    A step returns the arrays it made (they are waited for). One slow moment of the machine then touches one round of
    every step, not all rounds of one.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step())
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], step: str, reference: str) -> float:
    """Median over rounds of time(step) / time(reference): a machine that drifts moves both sides of a round's ratio."""
    return statistics.median(a / b for a, b in zip(times[step], times[reference], strict=True))


def temporary_bytes(compiled: Any) -> int:
    """What a compiled program holds beside its arguments and results, in bytes, as its compiler planned it."""
    return compiled.memory_analysis().temp_size_in_bytes


def plain(name: str, value: float, unit: str) -> Figure:
    """A figure that supports no choice and has no bar."""
    return {"name": name, "value": float(value), "unit": unit, "direction": None, "bar": None, "holds": True}


def at_most(bar: float, name: str, value: float, unit: str) -> Figure:
    """A figure that holds while `value <= bar`."""
    return plain(name, value, unit) | {"direction": "at most", "bar": bar, "holds": bool(value <= bar)}


def at_least(bar: float, name: str, value: float, unit: str) -> Figure:
    """A figure that holds while `value >= bar`."""
    return plain(name, value, unit) | {"direction": "at least", "bar": bar, "holds": bool(value >= bar)}


def show(figures: Iterable[Figure], as_json: bool) -> bool:
    """Print figures as they come, values to four significant digits: one JSON object a line, or a table. True if one misses its bar.

    `holds` is decided on the measured value, before it is rounded for print.
    """
    missed = False
    for figure in figures:
        missed |= not figure["holds"]
        figure = figure | {"value": float(f"{figure['value']:.4g}")}
        if as_json:
            print(json.dumps({key: figure[key] for key in ("name", "value", "unit", "bar", "holds")}), flush=True)
            continue
        bar = "" if figure["bar"] is None else f"   ({figure['direction']} {figure['bar']:g}: {'holds' if figure['holds'] else 'MISSED'})"
        print(f"{figure['value']:10.4g} {figure['unit']:3} {figure['name']}{bar}", flush=True)
    return missed


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options of every benchmark, `--rounds` (default `rounds`), `--json` and `--check`; a benchmark may add its own."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--rounds", type=_positive, default=rounds, help=f"rounds in which every step runs once (default {rounds})")
    result.add_argument("--json", action="store_true", help="print one JSON object a line")
    result.add_argument("--check", action="store_true", help="exit 1 when a figure misses its bar")
    return result


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
