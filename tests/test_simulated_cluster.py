"""Whole clusters in simulated time: hundreds of seeds with every kind of death, and what each rule is worth.

The comparisons hold the rules to their purpose: 80 steps of 1 s, P = 8, 4 generators, completions of 0.2 to 1.2 s.
"""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import fmean

import pytest

from broker.batches import ScheduleSettings
from protocol.config import AtBound
from tests.simulated_cluster import Cluster, Load

STEADY = ScheduleSettings(prompts_per_step=8, group_size=1, steps=80, max_staleness=4)
UNPACED = replace(STEADY, pacing_margin=None, newest_first=False, gate_slow_generators=False)
EVEN = Load(straggler_share=0.0)


def any_schedule(random_: random.Random) -> ScheduleSettings:
    size, steps, evaluates = random_.choice([1, 2, 4]), random_.choice([3, 8, 20]), random_.random() < 0.5
    return ScheduleSettings(
        prompts_per_step=size,
        group_size=random_.choice([2, 3, 4]),
        steps=steps,
        max_staleness=random_.choice([0, 1, 2, 4]),
        num_prompts=random_.choice([None, size * steps, max(1, size * steps - 1), size * steps // 2 + 1]),
        at_bound=random_.choice(list(AtBound)),
        lease_ttl_s=6.0,
        filter_equal_rewards=random_.random() < 0.5,
        newest_first=random_.random() < 0.7,
        pacing_margin=random_.choice([None, 0.0, 1.0]),
        gate_slow_generators=random_.random() < 0.7,
        evaluate_at_end=evaluates,
    )


def any_load(random_: random.Random, evaluates: bool) -> Load:
    return Load(
        num_generators=random_.choice([1, 2, 4]),
        groups_at_a_time=random_.choice([1, 2, 6]),
        apply_s=random_.choice([0.0, 0.05, 0.5]),
        straggler_share=random_.choice([0.0, 0.05]),
        slow_factors=random_.choice([(), (10.0,)]),
        error_share=random_.choice([0.0, 0.02]),
        equal_share=random_.choice([0.0, 0.3]),
        poison=random_.choice([frozenset(), frozenset({0}), frozenset({1, 3})]),
        crash_every_s=random_.choice([0.0, 5.0, 20.0]),
        lost_grant_share=random_.choice([0.0, 0.05]),
        zombie_share=random_.choice([0.0, 0.5]),
        broker_restart_every_s=random_.choice([0.0, 0.0, 7.0]),
        learner_crash_every_s=random_.choice([0.0, 0.0, 15.0]),
        evaluate_every=random_.choice([1, 3]) if evaluates else 0,
    )


@pytest.mark.parametrize("first_seed", range(0, 300, 50))
def test_runs_with_every_kind_of_death_end_and_keep_all_promises(first_seed: int) -> None:
    """`Cluster` asserts the promises as it plays; a failure names its seed."""
    for seed in range(first_seed, first_seed + 50):
        random_ = random.Random(seed)
        schedule = any_schedule(random_)
        try:
            cluster = Cluster(schedule, any_load(random_, schedule.evaluate_at_end), seed).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        if schedule.evaluate_at_end and cluster.scheduler.done:
            assert cluster.evaluated[-1] == cluster.scheduler.version, f"seed {seed}"


def test_the_same_seed_plays_the_same_run() -> None:
    load = Load(crash_every_s=5.0, broker_restart_every_s=30.0)
    first, second = (Cluster(STEADY, load, seed=7).run() for _ in range(2))
    assert (first.now, first.trained, first.staleness) == (second.now, second.trained, second.staleness)


def test_poisoned_prompts_are_quarantined_and_nothing_else_is() -> None:
    schedule = replace(STEADY, steps=20, num_prompts=160, lease_ttl_s=6.0)
    cluster = Cluster(schedule, Load(poison=frozenset({3, 40})), seed=1).run()
    assert cluster.quarantined == {3, 40}
    assert sorted(cluster.trained) == [prompt for prompt in range(160) if prompt not in (3, 40)]


def test_at_staleness_zero_every_token_is_of_the_version_that_trains_it() -> None:
    cluster = Cluster(replace(STEADY, max_staleness=0, steps=30), Load(), seed=1).run()
    assert set(cluster.staleness) == {0}


def played(schedule: ScheduleSettings, load: Load) -> tuple[float, float, Cluster]:
    """(seconds, mean staleness) over two seeds, and the last of the runs."""
    runs = [Cluster(schedule, load, seed).run() for seed in range(2)]
    return fmean(run.now for run in runs), fmean(fmean(run.staleness) for run in runs), runs[-1]


def test_splitting_at_the_bound_beats_waiting_for_a_long_tail() -> None:
    schedule = replace(UNPACED, group_size=4, max_staleness=2)
    wait_s, _, _ = played(schedule, Load())
    split_s, _, run = played(replace(schedule, at_bound=AtBound.SPLIT), Load())
    assert split_s < 0.6 * wait_s, f"{split_s:.0f} s against {wait_s:.0f} s"
    assert 0 < run.num_left_out < 0.05 * len(run.staleness)


def test_pacing_halves_staleness_at_no_cost() -> None:
    free_s, free_staleness, _ = played(UNPACED, EVEN)
    paced_s, paced_staleness, _ = played(STEADY, EVEN)
    assert paced_s < 1.01 * free_s, f"{paced_s:.0f} s against {free_s:.0f} s"
    assert paced_staleness < 0.5 * free_staleness, f"{paced_staleness:.2f} against {free_staleness:.2f}"


def test_newest_first_saves_staleness_and_waiting() -> None:
    schedule, load = replace(STEADY, max_staleness=2), replace(EVEN, groups_at_a_time=3, apply_s=0.3)
    newest_s, newest_staleness, _ = played(schedule, load)
    any_s, any_staleness, _ = played(replace(schedule, newest_first=False), load)
    assert newest_s < 0.95 * any_s, f"{newest_s:.0f} s against {any_s:.0f} s"
    assert newest_staleness < 0.95 * any_staleness, f"{newest_staleness:.2f} against {any_staleness:.2f}"


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_slow_generator_is_hardly_worse_than_none(max_staleness: int) -> None:
    schedule = replace(STEADY, max_staleness=max_staleness)
    none_s, _, _ = played(schedule, replace(EVEN, num_generators=3))
    slow = replace(EVEN, slow_factors=(10.0,))
    gated_s, _, _ = played(schedule, slow)
    free_s, _, _ = played(replace(schedule, gate_slow_generators=False), slow)
    assert free_s > 2 * gated_s, f"{free_s:.0f} s without the gate, {gated_s:.0f} s with it"
    assert gated_s < 1.4 * none_s, f"{gated_s:.0f} s against {none_s:.0f} s without the slow generator"
