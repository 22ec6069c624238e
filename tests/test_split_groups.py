"""Groups that still run at their deadline: what they hand over, and what becomes of the remainder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from broker.leases import Grant
from broker.scheduler import Scheduler
from protocol.sections import AtBound
from tests.schedules import finish, fresh, grants, prompts, train
from tests.simulation.generator import answer


def at_its_deadline(num_finished: int, **changes: Any) -> tuple[Scheduler, Grant]:
    """Step 1 is next; prompt 0 of version 0 must go, and has so many of its 4 samples; the others are finished."""
    scheduler = fresh(group_size=4, at_bound=AtBound.SPLIT, **changes)
    straggler, *others = grants(scheduler)
    finish(scheduler, *others)
    train(scheduler)
    finish(scheduler, *grants(scheduler, version=1))
    for sample in range(num_finished):
        scheduler.finished(answer(straggler, sample, float(sample)), 0.0)
    return scheduler, straggler


def test_a_group_at_its_deadline_hands_over_what_is_finished() -> None:
    scheduler, straggler = at_its_deadline(3)
    batch = train(scheduler)
    assert prompts(batch) == [0, 3]
    assert [one.sample for one in batch.groups[0].trajectories] == [0, 1, 2]
    assert not batch.groups[0].remainder
    scheduler.finished(answer(straggler, 3, 3.0, newest_version=2), 0.0)
    remainder = train(scheduler).groups[-1]
    assert (remainder.prompt, remainder.version, remainder.remainder) == (0, 0, True)
    assert [one.sample for one in remainder.trajectories] == [3]
    assert remainder.baseline_rewards == (0.0, 1.0, 2.0, 3.0)
    scheduler.ledger.check()


def test_a_group_with_one_finished_completion_is_waited_for() -> None:
    scheduler, straggler = at_its_deadline(1)
    assert not scheduler.ready
    scheduler.finished(answer(straggler, 1, 1.0), 0.0)
    assert scheduler.ready


def test_failed_samples_do_not_count_as_finished_completions() -> None:
    scheduler, straggler = at_its_deadline(1)
    scheduler.finished(answer(straggler, 1, 1.0, error="no reward"), 0.0)
    assert not scheduler.ready


def test_a_group_before_its_deadline_is_not_split() -> None:
    scheduler = fresh(group_size=4, at_bound=AtBound.SPLIT)
    for grant in grants(scheduler):
        for sample in range(2):
            scheduler.finished(answer(grant, sample, float(sample)), 0.0)
    assert not scheduler.ready


def test_no_more_than_one_batch_of_remainders_runs_at_a_time() -> None:
    scheduler = fresh(group_size=4, max_staleness=0, prompts_per_step=1, at_bound=AtBound.SPLIT)
    for version in (0, 1):
        (grant,) = grants(scheduler, version=version)
        for sample in range(2):
            scheduler.finished(answer(grant, sample, float(sample)), 0.0)
        if version == 0:
            train(scheduler)
    assert not scheduler.ready, "the remainder of prompt 0 still runs"
    scheduler.holder_lost("a", crashed=False)
    (grant,) = grants(scheduler, version=1)
    for sample in range(2):
        scheduler.finished(answer(grant, sample, float(sample)), 0.0)
    assert scheduler.ready


def test_a_lost_remainder_is_counted_and_what_it_had_is_trained() -> None:
    scheduler, straggler = at_its_deadline(2)
    train(scheduler)
    scheduler.finished(answer(straggler, 3, 3.0), 0.0)
    scheduler.holder_lost("a", crashed=True)
    assert scheduler.groups.num_lost_samples == 1
    assert 0 not in scheduler.ledger.queue
    finish(scheduler, *grants(scheduler, version=2))
    remainder = train(scheduler).groups[-1]
    assert remainder.baseline_rewards == (0.0, 1.0, 3.0)
    assert [one.sample for one in remainder.trajectories] == [3]


def test_the_last_step_waits_for_remainders() -> None:
    scheduler, straggler = at_its_deadline(2, steps=3)
    train(scheduler)
    assert not scheduler.ready, "no later step would train what is left of prompt 0"
    finish(scheduler, straggler)
    assert prompts(train(scheduler))[-1] == 0
    assert scheduler.done


def test_the_last_step_splits_nothing() -> None:
    scheduler = fresh(group_size=4, steps=1, at_bound=AtBound.SPLIT)
    first, second = grants(scheduler)
    finish(scheduler, first, replace(second, samples=3))
    assert not scheduler.ready, "no later step would train what is left of prompt 1"
    scheduler.finished(answer(second, 3, 3.0), 0.0)
    assert scheduler.ready


def test_remainders_that_end_after_the_stream_make_a_batch_of_their_own() -> None:
    scheduler = fresh(group_size=3, max_staleness=0, num_prompts=2, at_bound=AtBound.SPLIT)
    first, second = grants(scheduler)
    for sample in range(2):
        scheduler.finished(answer(first, sample, float(sample)), 0.0)
    finish(scheduler, second)
    train(scheduler)
    assert not scheduler.ready
    assert not scheduler.done
    scheduler.finished(answer(first, 2, 2.0), 0.0)
    assert prompts(train(scheduler)) == [0]
    assert scheduler.done
