"""What each rule of staleness is worth: switched off, it shows the damage that it prevents.

The loads are those of bench/staleness.py, which gives the whole table; here each rule is held to its purpose.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from bench.staleness import ALL, BOUNDS, LOADS, RULES, Outcome, main, measure, schedule_of


@cache
def played(load: str, bound: int, rules: str = ALL) -> Outcome:
    return measure(load, LOADS[load], schedule_of(bound, rules, steps=100), rules, seeds=1)


def test_splitting_at_the_bound_beats_waiting_for_a_long_tail() -> None:
    wait, split = played("long tail", bound=2), played("long tail", bound=2, rules="split")
    assert split.time < 0.6 * wait.time
    assert split.max == 2
    assert 0 < split.left_out < 0.05
    assert wait.left_out == 0


def test_pacing_keeps_staleness_far_below_the_bound_where_the_learner_is_slower() -> None:
    free, paced = played("learner slower", bound=4, rules="no pacing"), played("learner slower", bound=4)
    assert free.mean > 3.5
    assert paced.mean < 2
    assert paced.waiting < 0.02
    assert paced.time < 1.01 * free.time


@pytest.mark.parametrize("load", ["balanced", "generation slower", "long tail", "slow to apply"])
def test_pacing_costs_hardly_any_time(load: str) -> None:
    free, paced = played(load, bound=4, rules="no pacing"), played(load, bound=4)
    assert paced.time < 1.03 * free.time
    assert paced.mean <= 1.02 * free.mean


def test_newest_first_saves_staleness_where_weights_are_slow_to_apply() -> None:
    newest, anything = played("slow to apply", bound=4), played("slow to apply", bound=4, rules="no newest first")
    assert newest.mean < 0.85 * anything.mean
    assert newest.time < 1.01 * anything.time


@pytest.mark.parametrize("bound", [0, 2, 4])
def test_a_slow_generator_is_hardly_worse_than_none(bound: int) -> None:
    gated, free = played("one slow generator", bound), played("one slow generator", bound, rules="no gate")
    others = replace(LOADS["one slow generator"], num_generators=3, slow_factors=())
    alone = measure("no slow generator", others, schedule_of(bound, ALL, steps=100), ALL, seeds=1)
    assert free.time > 1.8 * gated.time
    assert gated.time < 1.35 * alone.time


def test_the_more_staleness_is_allowed_the_shorter_the_run() -> None:
    times = [played("balanced", bound).time for bound in BOUNDS]
    assert times == sorted(times, reverse=True)
    assert times[0] > 2, "S = 0 is serial"
    assert times[-1] < 1.05


def test_the_bench_prints_one_line_and_draws_for_light_and_dark_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--seeds", "1", "--steps", "4", "--pictures", str(tmp_path)]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    runs = [Outcome(**run) for run in line["runs"]]
    assert {(run.load, run.bound, run.rules) for run in runs} == {
        (load, bound, rules) for load in LOADS for bound in BOUNDS for rules in RULES
    }
    assert all(run.mean <= run.max <= run.bound for run in runs)
    for name in ("bound", "rules"):
        light, dark = ((tmp_path / f"{name}-{ground}.svg").read_text() for ground in ("light", "dark"))
        assert "staleness" in light
        assert light != dark
