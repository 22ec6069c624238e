"""What is each rule of staleness worth? Whole clusters in simulated time around the real scheduler, no device needed.

Every load is played at S = 0, 1, 2, 4 with all rules on, and again with one of them switched off (or `split` on). Run
time is given against perfect overlap: the slower side at its own pace, the learner alone or every place of the
generators busy without a pause. Every figure is the median over the seeds.

    python bench/staleness.py [--seeds 3] [--steps 200] [--pictures FOLDER]

Prints tables and one JSON line; writes the pictures of docs/staleness.md where it is told to. About 5 minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.staleness_pictures import draw
from broker.batches import ScheduleSettings
from protocol.sections import AtBound
from tests.simulation.cluster import Cluster
from tests.simulation.world import Load

BOUNDS = (0, 1, 2, 4)

EVEN = Load(groups_at_a_time=3, latency_s=(0.4, 1.4), straggler_share=0.0)
LOADS: Mapping[str, Load] = {
    "balanced": replace(EVEN, step_s=0.7),
    "learner slower": EVEN,
    "generation slower": replace(EVEN, step_s=0.4),
    "long tail": replace(EVEN, groups_at_a_time=6, straggler_share=0.05, straggler_factor=8.0),
    "one slow generator": replace(EVEN, groups_at_a_time=4, slow_factors=(10.0,)),
    "slow to apply": replace(EVEN, apply_s=0.3),
}

ALL = "all rules"
RULES: Mapping[str, Mapping[str, Any]] = {
    ALL: {},
    "split": {"at_bound": AtBound.SPLIT},
    "no pacing": {"pacing_margin": None},
    "no newest first": {"newest_first": False},
    "no gate": {"gate_slow_generators": False},
}


@dataclass(frozen=True)
class Outcome:
    """One load at one bound under one set of rules."""

    load: str
    bound: int  # S
    rules: str
    mean: float  # staleness of a trained token
    max: float
    waiting: float  # share of the run in which the learner waits for groups
    time: float  # of the run, 1: perfect overlap
    left_out: float  # share of tokens, older than S, that `split` keeps out of the loss


def perfect_s(schedule: ScheduleSettings, load: Load) -> float:
    """How long the run would take if the slower side never stopped.

    A slow generator is left out here: what it adds is less than what it may cost.
    """
    latency_s = fmean(load.latency_s) * (1 + load.straggler_share * (load.straggler_factor - 1))
    num_generators = load.num_generators - len(load.slow_factors)
    completions_per_s = num_generators * load.groups_at_a_time * schedule.group_size / latency_s
    generation_s = schedule.prompts_per_step * schedule.group_size / completions_per_s
    return schedule.steps * max(load.step_s, generation_s)


def schedule_of(bound: int, rules: str, steps: int) -> ScheduleSettings:
    """P = 8 groups of G = 4 in a step."""
    schedule = ScheduleSettings(prompts_per_step=8, group_size=4, steps=steps, max_staleness=bound)
    return replace(schedule, **RULES[rules])


def measure(name: str, load: Load, schedule: ScheduleSettings, rules: str, seeds: int) -> Outcome:
    """Plays the schedule once with every seed."""
    ideal_s = perfect_s(schedule, load)
    rows = []
    for seed in range(seeds):
        run = Cluster(schedule, load, seed).run()
        num_tokens = len(run.staleness) + run.num_left_out
        shares = run.waited_s / run.now, run.now / ideal_s, run.num_left_out / num_tokens
        rows.append((fmean(run.staleness), max(run.staleness), *shares))
    figures = [round(median(column), 4) for column in zip(*rows, strict=True)]
    return Outcome(name, schedule.max_staleness, rules, *figures)


def print_tables(outcomes: Mapping[tuple[str, int, str], Outcome]) -> None:
    """First what S does with all rules on, then what each rule does to it."""
    print(f"\n{'all rules on':20}  S  staleness  max  waiting   time")
    for load in LOADS:
        for bound in BOUNDS:
            one = outcomes[load, bound, ALL]
            numbers = f"{one.mean:9.2f}  {one.max:3.0f}  {one.waiting:7.1%}  {one.time:5.2f}"
            print(f"{load if bound == BOUNDS[0] else '':20}  {bound}  {numbers}")
    others = [rules for rules in RULES if rules != ALL]
    print("\nwith one rule changed: mean staleness, and time against all rules on; split: tokens left out")
    print(f"{'':20}  S  " + "  ".join(f"{rules:>18}" for rules in others))
    for load in LOADS:
        for bound in BOUNDS:
            cells = []
            for rules in others:
                one, base = outcomes[load, bound, rules], outcomes[load, bound, ALL]
                left_out = f" {one.left_out:5.1%}" if rules == "split" else ""
                cells.append(f"{one.mean:.2f} {one.time / base.time - 1:+7.1%}{left_out}".rjust(18))
            print(f"{load if bound == BOUNDS[0] else '':20}  {bound}  " + "  ".join(cells))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pictures", type=Path, help="folder for the pictures; none: they are not drawn")
    args = parser.parse_args(argv)
    outcomes = {}
    for load in LOADS:
        for bound in BOUNDS:
            for rules in RULES:
                schedule = schedule_of(bound, rules, args.steps)
                outcomes[load, bound, rules] = measure(load, LOADS[load], schedule, rules, args.seeds)
        print(f"played: {load}", file=sys.stderr)
    print_tables(outcomes)
    runs = [asdict(outcome) for outcome in outcomes.values()]
    print(json.dumps({"bench": "staleness", "seeds": args.seeds, "steps": args.steps, "runs": runs}))
    if args.pictures:
        draw(runs, args.pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
