"""Pacing, newest first and the gate for slow generators: how fewer leases than admitted can be better."""

from __future__ import annotations

from typing import Any

from broker.leases import Refusal
from broker.scheduler import Scheduler
from tests.schedules import PLENTY, finish, fresh, grants, refusal


def paced(latency_s: float, step_s: float, margin: float, **changes: Any) -> Scheduler:
    """A scheduler that has measured one latency and one step."""
    scheduler = fresh(pacing_margin=margin, max_staleness=9, steps=100, **changes)
    given = grants(scheduler, room=4)
    finish(scheduler, *given, now=latency_s)
    scheduler.take(latency_s)
    scheduler.advanced(1, latency_s + step_s)
    return scheduler


def test_pacing_keeps_a_batch_and_what_is_used_up_while_a_group_is_made() -> None:
    scheduler = paced(latency_s=3.0, step_s=2.0, margin=1.0)
    assert len(grants(scheduler, version=1)) == 5, "P * (1 + 3 / 2)"
    assert refusal(scheduler, version=1) is Refusal.PACING


def test_pacing_never_allows_less_than_a_batch() -> None:
    assert len(grants(paced(latency_s=0.001, step_s=2.0, margin=0.0), version=1)) == 2


def test_pacing_opens_more_groups_when_some_are_filtered() -> None:
    scheduler = paced(latency_s=3.0, step_s=2.0, margin=1.0, filter_equal_rewards=True)
    for grant in grants(scheduler, version=1, room=4, now=10.0):
        finish(scheduler, grant, equal=True, now=13.0)
    assert len(grants(scheduler, version=1)) == 10, "half of all groups were filtered"


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
    scheduler = with_a_slow_generator(8.5)
    assert refusal(scheduler, room=4, who="b", now=20.0) is Refusal.SLOW, "4 steps of 1 s, and twice that"
    assert len(grants(scheduler, room=4, who="b", now=60.0)) == 1
    assert refusal(scheduler, room=2, who="b", now=61.0) is Refusal.SLOW
    assert len(grants(scheduler, room=4, who="b", now=120.0)) == 1


def test_a_generator_that_keeps_up_is_not_gated() -> None:
    assert len(grants(with_a_slow_generator(7.5), room=4, who="b", now=20.0)) == 2
    assert len(grants(with_a_slow_generator(8.5, gate_slow_generators=False), room=4, who="b", now=20.0)) == 2


def test_the_only_generator_is_never_too_slow() -> None:
    scheduler = with_a_slow_generator(1000.0)
    scheduler.holder_lost("a", crashed=True)
    assert grants(scheduler, room=2, who="b", now=1001.0)
