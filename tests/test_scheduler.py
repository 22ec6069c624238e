"""Admission, batches and restore: each rule of the scheduler by itself, in the words of the design."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from broker.leases import Refusal
from broker.ledger import Ledger
from broker.outlook import describe, learner_waits_for
from broker.scheduler import Scheduler
from protocol.types import LeaseKind
from tests.schedules import PLAIN, PLENTY, finish, fresh, grants, prompts, refusal, train

# Admission


def test_a_generator_may_open_as_many_groups_as_the_bound_has_room_for() -> None:
    scheduler = fresh()
    assert [grant.prompt for grant in grants(scheduler)] == [0, 1, 2, 3], "(S + 1) * P groups"
    assert refusal(scheduler) is Refusal.AT_BOUND


def test_room_counts_completions_and_a_group_needs_room_for_all_of_its_own() -> None:
    scheduler = fresh()
    assert len(grants(scheduler, room=5)) == 2
    assert refusal(scheduler, room=1) is Refusal.NO_ROOM
    assert refusal(scheduler, room=0) is Refusal.NO_ROOM


def test_an_empty_generator_gets_one_group_even_if_it_is_larger_than_its_room() -> None:
    assert len(grants(fresh(group_size=8), room=3)) == 1


def test_a_version_that_was_never_announced_gets_no_lease() -> None:
    assert refusal(fresh(), version=1) is Refusal.UNKNOWN_VERSION
    assert refusal(fresh(), version=-1) is Refusal.NO_VERSION


def test_a_lease_is_good_until_its_version_and_the_bound_but_not_beyond_the_last_step() -> None:
    assert grants(fresh(version=5), version=4)[0].deadline == 5
    assert grants(fresh(version=9), version=9)[0].deadline == 9, "T - 1"


def test_a_generator_that_lags_behind_may_fill_only_the_steps_that_can_still_train_its_groups() -> None:
    scheduler = fresh(version=5)
    assert len(grants(scheduler, version=4)) == 2
    assert refusal(scheduler, version=4) is Refusal.AT_BOUND
    assert len(grants(scheduler, version=5, who="b")) == 2


def test_a_group_due_early_takes_no_place_that_a_later_one_has_already() -> None:
    scheduler = fresh(version=5)
    assert len(grants(scheduler, version=5)) == 4
    assert refusal(scheduler, version=4, who="b") is Refusal.AT_BOUND, (
        "step 5 has two places free, steps 5 and 6 have none"
    )


def test_a_version_whose_last_step_is_cut_gets_no_lease() -> None:
    scheduler = fresh(version=5)
    finish(scheduler, *grants(scheduler, version=5, room=4))
    scheduler.take(0.0)
    assert refusal(scheduler, version=4) is Refusal.TOO_OLD
    assert grants(scheduler, version=5)


def test_at_staleness_zero_nothing_is_leased_while_the_step_trains() -> None:
    scheduler = fresh(max_staleness=0)
    finish(scheduler, *grants(scheduler))
    assert prompts(scheduler.take(0.0)) == [0, 1]
    assert refusal(scheduler) is Refusal.TOO_OLD
    scheduler.advanced(1, 0.0)
    assert [grant.prompt for grant in grants(scheduler, version=1)] == [2, 3]


def test_a_cut_makes_room_for_one_more_batch() -> None:
    scheduler = fresh()
    finish(scheduler, *grants(scheduler)[:2])
    train(scheduler)
    assert len(grants(scheduler, version=1)) == 2


def test_no_more_is_leased_than_the_last_steps_need() -> None:
    scheduler = fresh(version=9)
    assert len(grants(scheduler, version=9)) == 2, "one batch of one step"


# Taking a batch


def test_a_batch_takes_what_is_done_and_does_not_wait_for_a_straggler_before_its_deadline() -> None:
    scheduler = fresh()
    first, second, third, _ = grants(scheduler)
    finish(scheduler, second)
    assert not scheduler.ready
    finish(scheduler, third)
    assert prompts(scheduler.take(0.0)) == [1, 2]
    finish(scheduler, first)
    assert learner_waits_for(scheduler) == "", "a step is in training"


def test_a_batch_waits_for_a_straggler_that_no_later_step_may_train() -> None:
    scheduler = fresh()
    straggler, *others = grants(scheduler)
    finish(scheduler, *others)
    train(scheduler)
    finish(scheduler, *grants(scheduler, version=1))
    assert not scheduler.ready
    assert learner_waits_for(scheduler) == (
        "3 of 2 groups finished, 4 open; no later step may train prompts [0], which still run"
    )
    finish(scheduler, straggler)
    assert prompts(scheduler.take(0.0)) == [0, 3]


def test_a_batch_waits_for_a_group_whose_last_free_place_it_is() -> None:
    """All of 2 P groups are due at step 1: two of them must go at step 0, although later ones are finished too."""
    scheduler = fresh(version=5, max_staleness=2)
    old = grants(scheduler, version=4)
    new = grants(scheduler, version=5, who="b")
    assert ([grant.deadline for grant in old], [grant.deadline for grant in new]) == ([6] * 4, [7] * 2)
    finish(scheduler, *new, old[0])
    assert not scheduler.ready
    finish(scheduler, old[3])
    assert prompts(scheduler.take(0.0)) == [0, 3]


def test_the_earliest_deadlines_go_first_and_ties_by_prompt() -> None:
    scheduler = fresh(version=5, max_staleness=3)
    new = grants(scheduler, version=5, room=4, who="b")
    old = grants(scheduler, version=4, room=4)
    finish(scheduler, *new, *reversed(old))
    assert prompts(scheduler.take(0.0)) == [old[0].prompt, old[1].prompt]


def test_the_last_batch_of_a_stream_may_be_short() -> None:
    scheduler = fresh(num_prompts=3)
    first, second, third = grants(scheduler)
    finish(scheduler, first, second)
    train(scheduler)
    assert not scheduler.ready
    finish(scheduler, third)
    assert prompts(train(scheduler)) == [2]
    assert scheduler.done
    assert refusal(scheduler, version=2) is Refusal.END_OF_DATA


def test_a_batch_stays_full_while_a_lost_prompt_can_still_come() -> None:
    scheduler = fresh(num_prompts=2)
    first, second = grants(scheduler)
    finish(scheduler, first)
    scheduler.released(second.attempt)
    assert not scheduler.ready
    finish(scheduler, *grants(scheduler))
    assert prompts(scheduler.take(0.0)) == [0, 1]


def test_the_run_ends_after_its_steps_although_the_stream_goes_on() -> None:
    scheduler = fresh(steps=1)
    finish(scheduler, *grants(scheduler))
    assert not scheduler.done
    train(scheduler)
    assert scheduler.done
    assert refusal(scheduler, version=1) is Refusal.END_OF_DATA


def test_versions_advance_one_by_one_and_only_after_a_cut() -> None:
    scheduler = fresh()
    with pytest.raises(AssertionError, match="without a step in training"):
        scheduler.advanced(1, 0.0)
    finish(scheduler, *grants(scheduler))
    scheduler.take(0.0)
    assert not scheduler.ready, "one step at a time"
    with pytest.raises(AssertionError, match="version 2 after 0"):
        scheduler.advanced(2, 0.0)


def test_prompts_of_a_skipped_step_count_as_failed() -> None:
    scheduler = fresh()
    finish(scheduler, *grants(scheduler))
    scheduler.take(0.0)
    scheduler.advanced(1, 0.0, skipped=True)
    counts = scheduler.ledger.counts()
    assert (counts["trained"], counts["failed/non_finite"]) == (0, 2)


# Restore


def test_a_restored_broker_queues_what_was_open_and_knows_the_step_in_training() -> None:
    scheduler = fresh()
    given = grants(scheduler)
    finish(scheduler, *given[1:])
    batch = scheduler.take(0.0)
    restored = Scheduler(PLAIN, Ledger.restore(scheduler.ledger.snapshot()), version=0, training=0)
    assert prompts(batch) == [1, 2]
    assert restored.next_step == 1
    assert [grant.prompt for grant in grants(restored)] == [0, 3]
    assert refusal(restored) is Refusal.AT_BOUND, "S * P while step 0 trains"
    restored.advanced(1, 0.0, skipped=True)
    assert restored.ledger.counts()["failed/non_finite"] == 2


def test_a_scheduler_refuses_to_restore_a_step_that_cannot_be_in_training() -> None:
    with pytest.raises(AssertionError, match="step 4 cannot be in training at version 5"):
        Scheduler(PLAIN, Ledger(), version=5, training=4)


# The console


def test_the_description_says_who_holds_what_and_why_who_waits() -> None:
    scheduler = fresh()
    grant = grants(scheduler, room=PLENTY, now=1.0)[0]
    scheduler.renew(grant.attempt, 55, now=4.0)
    assert refusal(scheduler, who="b", now=5.0) is Refusal.AT_BOUND
    refusal(scheduler, who="b", now=9.0)
    told = describe(scheduler, now=11.0)
    lease = told["generators"]["a"]["leases"][0]
    assert (lease["prompt"], lease["tokens"], lease["samples"], lease["for_s"]) == (0, 55, "0/2", 10.0)
    assert (told["generators"]["b"]["waits"], told["generators"]["b"]["waits_s"]) == ("at_bound", 6.0)
    assert told["open_by_deadline"] == {"0": 0, "1": 4}
    assert told["learner_waits_for"] == "0 of 2 groups finished, 4 open"


def num_calls(work: Callable[[], object]) -> int:
    """How many functions a piece of work calls: what it costs, the same on every machine."""
    calls = Counter[str]()
    before = sys.getprofile()
    gc.disable()  # what it calls is not the work's
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        work()
    finally:
        sys.setprofile(before)
        gc.enable()
    return calls["call"] + calls["c_call"]


def test_asking_in_vain_costs_the_same_however_many_groups_are_open() -> None:
    costs = set()
    for size in (2, 500):
        full, paced = fresh(prompts_per_step=size), fresh(prompts_per_step=size, max_staleness=9, pacing_margin=2.0)
        for scheduler in (full, paced):
            finish(scheduler, *grants(scheduler, room=4 * size)[:size], now=1.0)
            train(scheduler, now=2.0)
            grants(scheduler, version=1, now=2.0)
        assert [refusal(one, 1, who="b", now=3.0) for one in (full, paced)] == [Refusal.AT_BOUND, Refusal.PACING]
        asking = [num_calls(lambda one=one: refusal(one, 1, who="b", now=3.0)) for one in (full, paced)]
        costs.add((*asking, num_calls(lambda one=paced: one.ready)))
    assert len(costs) == 1, f"calls of a pull at the bound, of one beyond its pace, of the learner's question: {costs}"


def test_a_lease_costs_the_same_however_many_prompts_are_queued() -> None:
    """So it is after every restart: all that was open goes out again."""
    costs = set()
    for size in (4, 500):
        lost = fresh(prompts_per_step=size)
        grants(lost, room=2 * size)
        restored = Scheduler(replace(PLAIN, prompts_per_step=size), Ledger.restore(lost.ledger.snapshot()))
        grants(restored, room=2)
        costs.add(num_calls(lambda s=restored: grants(s, room=2)))
    assert len(costs) == 1, f"{costs} calls"


def test_no_evaluation_waits_for_a_generator_that_only_said_it_held_its_version() -> None:
    scheduler = fresh(version=1)
    assert refusal(scheduler, version=2, who="liar") is Refusal.UNKNOWN_VERSION
    finish(scheduler, *grants(scheduler, version=1))
    train(scheduler)
    scheduler.evaluate([0])
    train(scheduler)
    [grant, *_] = grants(scheduler, version=3)
    assert (grant.kind, grant.version) == (LeaseKind.EVALUATE, 3)
