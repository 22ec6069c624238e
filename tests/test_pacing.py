"""Pacing, newest first and the gate for slow generators: how fewer leases than admitted can be better."""

from __future__ import annotations

from typing import Any

import pytest

from broker.leases import Refusal
from broker.pacing import REMEMBERED_STEPS, Pace
from broker.scheduler import Scheduler
from tests.schedules import PLENTY, finish, fresh, grants, refusal


def paced(num_running: int, num_finished: int = 2, margin: float = 2.0, **changes: Any) -> Scheduler:
    """A scheduler whose first step took 2 s and ended, at second 5, while so many groups ran and were left over."""
    scheduler = fresh(pacing_margin=margin, max_staleness=9, steps=100, **changes)
    given = grants(scheduler, room=2 * (num_running + num_finished))
    finish(scheduler, *given[:num_finished], now=3.0)
    scheduler.take(3.0)
    scheduler.advanced(1, 5.0)
    return scheduler


def test_pacing_keeps_a_batch_and_the_groups_that_still_run_when_a_step_ends() -> None:
    scheduler = paced(num_running=3)
    assert len(grants(scheduler, version=1, now=5.0)) == 2, "P of them beside the 3 that run"
    assert refusal(scheduler, version=1, now=5.0) is Refusal.PACING


def test_pacing_counts_what_is_finished_and_not_taken_as_stock() -> None:
    scheduler = paced(num_running=2, num_finished=3)
    assert len(grants(scheduler, version=1, now=5.0)) == 1, "2 run, 1 is left over from the batch"
    assert refusal(scheduler, version=1, now=5.0) is Refusal.PACING


def test_pacing_never_allows_less_than_a_batch() -> None:
    scheduler = paced(num_running=0)
    assert len(grants(scheduler, version=1, now=5.0)) == 2
    assert refusal(scheduler, version=1, now=5.0) is Refusal.PACING


def test_a_filtered_group_makes_place_for_another() -> None:
    scheduler = paced(num_running=0, filter_equal_rewards=True)
    given = grants(scheduler, version=1, now=5.0)
    finish(scheduler, given[0], equal=True, now=5.0)
    assert len(grants(scheduler, version=1, now=5.0)) == 1


@pytest.mark.parametrize(("margin", "limit"), [(0.0, 8 + 4), (1.0, 8 + 4 + 2), (2.0, 8 + 4 + 4)])
def test_the_margin_is_a_number_of_standard_deviations(margin: float, limit: float) -> None:
    pace = Pace(prompts_per_step=8, group_size=2, margin=margin)
    for num_running in (2, 6, 2, 6):
        pace.step_ended(1.0, num_running)
    assert pace.limit(waited_s=0.0) == limit


def test_pacing_forgets_a_slow_spell() -> None:
    pace = Pace(prompts_per_step=8, group_size=2, margin=2.0)
    pace.step_ended(1.0, 30)
    for _ in range(REMEMBERED_STEPS - 1):
        pace.step_ended(1.0, 0)
    assert pace.limit(waited_s=0.0) > 8
    pace.step_ended(1.0, 0)
    assert pace.limit(waited_s=0.0) == 8


def test_while_the_learner_waits_two_batches_more_are_opened_for_each_step_it_misses() -> None:
    scheduler = paced(num_running=3)
    assert len(grants(scheduler, version=1, now=6.0)) == 2 + 2, "it has waited for half a step"
    assert refusal(scheduler, version=1, now=6.0) is Refusal.PACING


def test_a_learner_that_does_not_come_for_a_batch_that_is_ready_does_not_wait() -> None:
    scheduler = paced(num_running=3, num_finished=4)
    assert scheduler.ready
    assert refusal(scheduler, version=1, now=1000.0) is Refusal.PACING


def test_without_measurements_admission_alone_decides() -> None:
    assert len(grants(fresh(pacing_margin=0.0))) == 4


def test_a_generator_that_can_have_newer_weights_gets_them_before_leases() -> None:
    scheduler = fresh(version=3)
    assert refusal(scheduler, version=2, newer=True) is Refusal.NEWER_VERSION
    assert grants(scheduler, version=2, room=2), "there is no newer snapshot to be had yet"
    assert isinstance(fresh(version=3, newest_first=False).pull("a", 2, PLENTY, 0.0, newer_available=True), list)


def with_a_slow_generator(slow_s: float, **changes: Any) -> Scheduler:
    """Generator a needs 1 s for a group, b needs `slow_s`; P = 2 groups of 2 samples, each has room for 4."""
    scheduler = fresh(max_staleness=3, steps=100, **changes)
    fast, slow = grants(scheduler, room=2, who="a"), grants(scheduler, room=2, who="b")
    finish(scheduler, *fast, now=1.0)
    finish(scheduler, *slow, now=slow_s)
    scheduler.pull("a", 0, 4, slow_s, newer_available=False)
    return scheduler


def test_a_generator_that_would_hold_up_the_others_gets_one_probe_a_minute() -> None:
    scheduler = with_a_slow_generator(4.5)
    assert refusal(scheduler, room=4, who="b", now=20.0) is Refusal.SLOW, "the 4 steps until its deadline take 4 s"
    assert len(grants(scheduler, room=4, who="b", now=60.0)) == 1
    assert refusal(scheduler, room=2, who="b", now=61.0) is Refusal.SLOW
    assert len(grants(scheduler, room=4, who="b", now=120.0)) == 1


def test_a_generator_that_keeps_up_is_not_gated() -> None:
    assert len(grants(with_a_slow_generator(3.5), room=4, who="b", now=20.0)) == 2
    assert len(grants(with_a_slow_generator(4.5, gate_slow_generators=False), room=4, who="b", now=20.0)) == 2


def test_twice_the_latency_of_the_fastest_is_not_slow() -> None:
    """Not even when only the next step can train the group: medians of five latencies differ so much by chance."""
    for slow_s, is_slow in ((1.9, False), (2.1, True)):
        scheduler = with_a_slow_generator(slow_s)
        fast, slow = (scheduler.leases.generators[name] for name in ("a", "b"))
        assert scheduler.pace.is_slow(slow, [fast], num_steps=1) is is_slow
        assert not scheduler.pace.is_slow(fast, [slow], num_steps=1)


def test_the_only_generator_is_never_too_slow() -> None:
    scheduler = with_a_slow_generator(1000.0)
    scheduler.holder_lost("a", crashed=True)
    assert grants(scheduler, room=2, who="b", now=1001.0)
