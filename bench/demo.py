"""Runs the demo for several seeds and says whether each kept its promise: `make demo-seeds`.

The promise: held-out greedy accuracy starts between 15% and 55%, ends at least 20 points higher, and the whole run
takes at most six minutes. Exits 1 if a seed broke it. Further flags go to each run, as in

    python bench/demo.py --seeds 0 1 --algorithm.advantage gae          the demo by PPO with a critic
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
STARTS_BETWEEN, GAINS, TAKES_AT_MOST_S = (0.15, 0.55), 0.20, 360.0


class Outcome(NamedTuple):
    """One demo: held-out accuracy before and after, and how long it took from command to summary."""

    seed: int
    exit_code: int
    before: float
    after: float
    seconds: float

    @property
    def kept(self) -> bool:
        low, high = STARTS_BETWEEN
        in_time = self.seconds <= TAKES_AT_MOST_S
        return self.exit_code == 0 and low <= self.before <= high and self.after - self.before >= GAINS and in_time


def run_demo(seed: int, out: Path, arguments: Sequence[str] = (), *, recipe: str = "demo") -> Outcome:
    """One demo as a user starts it; its folder is out/<recipe>-seed-<seed>."""
    name = f"{recipe}-seed-{seed}-{time.strftime('%H%M%S')}"
    command = [sys.executable, str(ROOT / "launch" / "cluster.py"), "--recipe", recipe, "--seed", str(seed)]
    started = time.monotonic()
    ended = subprocess.run([*command, "--out", str(out), "--run-name", name, *arguments], check=False)
    seconds = time.monotonic() - started
    evaluations = out / name / "evaluations.jsonl"
    lines = evaluations.read_text(encoding="utf-8").splitlines() if evaluations.exists() else []
    found = {row["version"]: row["accuracy"] for row in map(json.loads, lines)}
    nan = float("nan")
    return Outcome(
        seed, ended.returncode, found.get(min(found, default=0), nan), found.get(max(found, default=0), nan), seconds
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the runs are written")
    args, further = parser.parse_known_args(argv)
    outcomes = [run_demo(seed, args.out, further) for seed in args.seeds]
    print("\nseed  before   after    gain  seconds  kept")
    for outcome in outcomes:
        gain = 100 * (outcome.after - outcome.before)
        kept = "yes" if outcome.kept else "NO"
        numbers = f"{outcome.before:6.1%}  {outcome.after:6.1%}  {gain:+6.1f}  {outcome.seconds:7.0f}"
        print(f"{outcome.seed:4}  {numbers}  {kept}")
    return 0 if all(outcome.kept for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
