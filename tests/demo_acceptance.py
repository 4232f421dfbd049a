"""The demo, from nothing, twice: its figures must reach their bars and repeat to the last digit, and its export hold in PyTorch.

Run by `make test-demo` with the interpreter that has PyTorch as its argument. Not collected by pytest: it takes minutes, not seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_demo(folder: Path) -> dict:
    """One demo in its own folder; returns its summary."""
    command = [sys.executable, "-m", "conan_jax", "demo", "--set", f"output_dir={folder}"]
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    print(f"the demo took {time.perf_counter() - began:.0f} s", flush=True)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def check(summary: dict) -> list[str]:
    """The bars of the demo that `summary` misses."""
    ndcg = summary["ndcg@10"]
    bars = {
        "weak is at least 3x sft": ndcg["weak"] >= 3 * ndcg["sft"],
        "supervised is above weak": ndcg["supervised"] > ndcg["weak"],
        "supervised is at least 0.25": ndcg["supervised"] >= 0.25,
        "every stage is there": set(ndcg) == {"untrained", "bm25", "pretrain", "sft", "weak", "supervised"} == set(summary["recall@10"]),
    }
    return [name for name, holds in bars.items() if not holds]


def main() -> int:
    """0 when both runs reach every bar with the same figures."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = (run_demo(Path(folder) / name) for name in ("first", "second"))
        search = [sys.executable, "-m", "conan_jax", "search", "how do I parse a date", "--run", f"{folder}/second", "--json"]
        answers = json.loads(subprocess.run(search, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        verify = [sys.argv[1], "-m", "conan_jax", "verify", f"{folder}/second/export", "--json"]
        verified = json.loads(subprocess.run(verify, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout)
    missed = check(first)
    if any(first[key] != second[key] for key in ("ndcg@10", "recall@10", "evaluations")):
        missed.append(f"the second run repeats the first: {first['ndcg@10']} against {second['ndcg@10']}")
    if not answers:
        missed.append("search answers")
    if not (verified["ok"] and verified["min_cosine"] >= 0.9999):
        missed.append(f"PyTorch computes what the export says: {verified}")
    print(json.dumps({"ndcg@10": first["ndcg@10"], "recall@10": first["recall@10"], "min_cosine": verified["min_cosine"]}, indent=2))
    print(f"{1 if not missed else 0} passed, {len(missed)} failed")
    for name in missed:
        print(f"FAILED: {name}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
