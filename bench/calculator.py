"""What is a tool worth? Held-out accuracy of the calculator's demo with the calculator and without it, by seed.

    python bench/calculator.py [--seeds 0 1] [--out FOLDER]

Prints a table and one JSON line; every run is of `launch/recipes/demo_calculator.yaml`. Exits 1 unless each run came to
its end, and the tool was worth at least 50 points of accuracy with every seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.demo import Outcome, run_demo

RECIPE = "demo_calculator"
WORTH = 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the runs are written")
    args = parser.parse_args()
    pairs = [both(seed, args.out) for seed in args.seeds]
    print("\nseed  with: before  after  without: before  after")
    for tool, alone in pairs:
        print(f"{tool.seed:4}  {tool.before:12.1%}  {tool.after:5.1%}  {alone.before:15.1%}  {alone.after:5.1%}")
    rows = [{"seed": t.seed, "with": (t.before, t.after), "without": (a.before, a.after)} for t, a in pairs]
    print(json.dumps({"bench": "calculator", "accuracy": rows}))
    kept = [t.exit_code == a.exit_code == 0 and t.after - a.after >= WORTH for t, a in pairs]
    return 0 if all(kept) else 1


def both(seed: int, out: Path) -> tuple[Outcome, Outcome]:
    """The same run with the tool and in a single turn."""
    tool = run_demo(seed, out / "with", recipe=RECIPE)
    return tool, run_demo(seed, out / "without", ["--rollout", "single_turn"], recipe=RECIPE)


if __name__ == "__main__":
    sys.exit(main())
