"""Each rule of the scheduler by itself, in the words of the design."""

from __future__ import annotations

from dataclasses import replace

import pytest

from broker.batches import Batch, ScheduleSettings
from broker.leases import Grant, Refusal, ResultStatus, Wait
from broker.ledger import Ledger
from broker.scheduler import Scheduler
from protocol.config import AtBound
from protocol.types import LeaseKind
from tests.simulated_cluster import answer

PLAIN = ScheduleSettings(prompts_per_step=2, group_size=2, steps=10, max_staleness=1, pacing_margin=None)
PLENTY = 1000  # room for any number of completions


def fresh(version: int = 0, **changes: object) -> Scheduler:
    return Scheduler(replace(PLAIN, **changes), Ledger(), version)  # type: ignore[arg-type]


def grants(scheduler: Scheduler, version: int = 0, room: int = PLENTY, who: str = "a", now: float = 0.0) -> list[Grant]:
    given = scheduler.pull(who, version, room, now, newer_available=False)
    assert not isinstance(given, Wait), f"{who} got no lease: {given.reason}"
    return given


def refusal(
    scheduler: Scheduler, version: int = 0, room: int = PLENTY, who: str = "a", now: float = 0.0, newer: bool = False
) -> Refusal:
    given = scheduler.pull(who, version, room, now, newer_available=newer)
    assert isinstance(given, Wait), f"{who} got {given}"
    return given.reason


def finish(scheduler: Scheduler, *finished: Grant, now: float = 0.0, error: str = "", equal: bool = False) -> None:
    for grant in finished:
        for sample in range(grant.samples):
            scheduler.finished(answer(grant, sample, 0.0 if equal else float(sample), error=error), now)


def train(scheduler: Scheduler, now: float = 0.0) -> Batch:
    batch = scheduler.take(now)
    scheduler.advanced(scheduler.version + 1, now)
    return batch


def prompts(batch: Batch) -> list[int]:
    return [group.prompt for group in batch.groups]


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
    assert scheduler.learner_waits_for() == "", "a step is in training"


def test_a_batch_waits_for_a_straggler_that_no_later_step_may_train() -> None:
    scheduler = fresh()
    straggler, *others = grants(scheduler)
    finish(scheduler, *others)
    train(scheduler)
    finish(scheduler, *grants(scheduler, version=1))
    assert not scheduler.ready
    assert scheduler.learner_waits_for() == (
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


# At the bound: split


def at_its_deadline(num_finished: int, **changes: object) -> tuple[Scheduler, Grant]:
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


# Results


def test_every_result_gets_one_final_status() -> None:
    scheduler = fresh(max_staleness=0)
    first, second = grants(scheduler)
    assert scheduler.finished(answer(first, 0, 1.0), 0.0) is ResultStatus.ACCEPTED
    assert scheduler.finished(answer(first, 0, 1.0), 0.0) is ResultStatus.DUPLICATE
    assert scheduler.finished(answer(first, 1, 1.0), 0.0) is ResultStatus.ACCEPTED
    assert scheduler.finished(answer(first, 1, 1.0), 0.0) is ResultStatus.DUPLICATE, "finished, not yet in a batch"
    finish(scheduler, second)
    scheduler.take(0.0)
    assert scheduler.finished(answer(first, 1, 1.0), 0.0) is ResultStatus.LATE


def test_a_late_result_of_a_lost_lease_is_not_taken_for_the_next_attempt() -> None:
    scheduler = fresh()
    lost = grants(scheduler, room=2)[0]
    scheduler.holder_lost("a", crashed=True)
    again = grants(scheduler, room=2, who="b")[0]
    assert (again.prompt, again.attempt != lost.attempt) == (lost.prompt, True)
    assert scheduler.finished(answer(lost, 0, 1.0), 0.0) is ResultStatus.LATE
    assert scheduler.finished(answer(again, 0, 1.0), 0.0) is ResultStatus.ACCEPTED


def test_a_result_that_contradicts_its_lease_is_invalid_and_counts_as_failed() -> None:
    scheduler = fresh(version=3, group_size=3)
    grant = grants(scheduler, version=3)[0]
    assert scheduler.finished(answer(grant, 0, 1.0, newest_version=4), 0.0) is ResultStatus.INVALID
    older = replace(grant, version=2)
    assert scheduler.finished(answer(older, 1, 1.0), 0.0) is ResultStatus.INVALID
    scheduler.finished(answer(grant, 2, 1.0), 0.0)
    assert scheduler.ledger.failures(grant.prompt) == 1, "one good sample is no group"
    assert list(scheduler.ledger.queue) == [grant.prompt]


def test_a_sample_that_was_never_asked_for_fails_its_lease() -> None:
    scheduler = fresh()
    grant = grants(scheduler, room=2)[0]
    assert scheduler.finished(answer(grant, 2, 1.0), 0.0) is ResultStatus.INVALID
    assert scheduler.finished(answer(grant, 0, 1.0), 0.0) is ResultStatus.LATE


def test_a_failed_sample_is_missing_from_its_group() -> None:
    scheduler = fresh(group_size=3, prompts_per_step=1)
    grant = grants(scheduler, room=3)[0]
    scheduler.finished(answer(grant, 0, 1.0, error="reward timed out"), 0.0)
    scheduler.finished(answer(grant, 1, 1.0), 0.0)
    scheduler.finished(answer(grant, 2, 1.0), 0.0)
    assert [one.sample for one in scheduler.take(0.0).groups[0].trajectories] == [1, 2]


def test_one_good_sample_is_enough_where_one_is_all_there_is() -> None:
    scheduler = fresh(group_size=1, prompts_per_step=1)
    finish(scheduler, grants(scheduler, room=1)[0])
    assert scheduler.ready


# Failures and crashes


def test_three_failures_quarantine_a_prompt_with_the_reason() -> None:
    scheduler = fresh()
    for failures in range(3):
        grant = grants(scheduler, room=2)[0]
        assert (grant.prompt, grant.failures) == (0, failures)
        scheduler.failed(grant.attempt, f"timeout {failures}", 0.0)
    assert scheduler.quarantined == [(0, "timeout 2")]
    assert scheduler.ledger.counts()["failed/quarantined"] == 1
    assert grants(scheduler, room=2)[0].prompt == 1


def test_a_lease_that_is_given_up_keeps_the_samples_that_came_before() -> None:
    scheduler = fresh(group_size=3, prompts_per_step=1)
    grant = grants(scheduler, room=3)[0]
    finish(scheduler, replace(grant, samples=2))
    scheduler.failed(grant.attempt, "timeout", 0.0)
    assert len(scheduler.take(0.0).groups[0].trajectories) == 2


def test_too_many_quarantined_prompts_end_the_run_with_a_verdict() -> None:
    scheduler = fresh()
    for _ in range(12):
        scheduler.failed(grants(scheduler, room=2)[0].attempt, "no such column", 0.0)
    assert scheduler.verdict == "4 of 4 prompts failed 3 times each; the last one, prompt 3: no such column"
    assert refusal(scheduler) is Refusal.STOPPED


def test_drained_and_revoked_leases_count_nothing() -> None:
    scheduler = fresh()
    for _ in range(5):
        grant, other = grants(scheduler, room=4)
        assert (grant.prompt, grant.failures, grant.alone) == (0, 0, False)
        scheduler.released(grant.attempt)
        scheduler.released(other.attempt)
        scheduler.holder_lost("a", crashed=False)


def crash_twice(scheduler: Scheduler, room: int = 2) -> None:
    for session in ("x", "y"):
        grants(scheduler, room=room, who=session)
        scheduler.holder_lost(session, crashed=True)


def test_a_prompt_that_was_lost_in_two_crashes_is_leased_alone() -> None:
    scheduler = fresh()
    crash_twice(scheduler)
    (grant,) = grants(scheduler)
    assert (grant.prompt, grant.alone, grant.failures) == (0, True, 0)
    assert refusal(scheduler) is Refusal.ALONE
    assert not grants(scheduler, who="b", room=2)[0].alone, "others go on"
    finish(scheduler, grant)
    assert grants(scheduler, room=2)[0].alone is False


def test_a_generator_empties_itself_for_a_prompt_that_runs_alone() -> None:
    scheduler = fresh()
    crash_twice(scheduler)
    scheduler.ledger.lease_again(0)
    (busy,) = grants(scheduler, room=2)
    scheduler.ledger.requeue(0)
    assert refusal(scheduler) is Refusal.ALONE
    assert grants(scheduler, room=2, who="b")[0].alone is False, "one generator is enough"
    finish(scheduler, busy)
    assert grants(scheduler)[0].alone is True


def test_a_crash_counts_as_a_failure_only_while_the_prompt_runs_alone() -> None:
    scheduler = fresh()
    crash_twice(scheduler)
    for failures in range(3):
        (grant,) = grants(scheduler, who=f"alone-{failures}")
        assert (grant.prompt, grant.failures) == (0, failures)
        scheduler.holder_lost(f"alone-{failures}", crashed=True)
    assert scheduler.quarantined == [(0, "its generator crashed while it ran alone")]


def test_a_lease_that_is_not_renewed_goes_out_again() -> None:
    scheduler = fresh(lease_ttl_s=30.0)
    kept, dropped = grants(scheduler, room=4)
    assert scheduler.renew(kept.attempt, 17, now=20.0)
    assert scheduler.expire(now=29.0) == []
    assert [lease.grant for lease in scheduler.expire(now=31.0)] == [dropped]
    assert not scheduler.renew(dropped.attempt, 1, now=32.0)
    assert scheduler.ledger.crashes(dropped.prompt) == 0, "its generator is alive: the answer with the lease was lost"


def test_a_generator_that_falls_silent_counts_as_crashed() -> None:
    scheduler = fresh(lease_ttl_s=30.0)
    grants(scheduler, room=4)
    assert len(scheduler.expire(now=30.0)) == 2
    assert [scheduler.ledger.crashes(prompt) for prompt in (0, 1)] == [1, 1]


def test_results_keep_a_lease_alive() -> None:
    scheduler = fresh(lease_ttl_s=30.0)
    (grant,) = grants(scheduler, room=2)
    scheduler.finished(answer(grant, 0, 1.0), now=25.0)
    assert scheduler.expire(now=40.0) == []


def test_finished_groups_do_not_expire_and_outlive_their_generator() -> None:
    scheduler = fresh(lease_ttl_s=30.0)
    finish(scheduler, *grants(scheduler, room=4))
    assert scheduler.expire(now=1000.0) == []
    assert scheduler.ready


# Filtering


def test_a_group_with_equal_rewards_is_filtered_and_refilled() -> None:
    scheduler = fresh(filter_equal_rewards=True)
    given = grants(scheduler)
    finish(scheduler, given[0], equal=True)
    assert scheduler.ledger.counts()["filtered/equal_rewards"] == 1
    assert [grant.prompt for grant in grants(scheduler)] == [4], "it left N at once"


def test_equal_rewards_are_trained_where_no_filter_is_asked_for() -> None:
    scheduler = fresh()
    finish(scheduler, *grants(scheduler), equal=True)
    assert scheduler.ready


def test_a_prompt_that_cannot_be_used_is_settled_with_its_reason() -> None:
    scheduler = fresh()
    grant = grants(scheduler, room=2)[0]
    scheduler.filtered(grant.attempt, "prompt_too_long")
    assert scheduler.ledger.counts()["filtered/prompt_too_long"] == 1
    assert grants(scheduler, room=2)[0].prompt == 1


def test_four_batches_of_filtered_groups_in_a_row_end_the_run() -> None:
    scheduler = fresh(filter_equal_rewards=True)
    finish(scheduler, *[grants(scheduler, room=2)[0] for _ in range(3)], equal=True)
    finish(scheduler, grants(scheduler, room=2)[0])
    for _ in range(7):
        finish(scheduler, grants(scheduler, room=2)[0], equal=True)
    assert scheduler.verdict == "", "7 of 8 in a row: one was kept before"
    finish(scheduler, grants(scheduler, room=2)[0], equal=True)
    assert scheduler.verdict == "no signal: 8 groups in a row were filtered, the last one: equal_rewards"


# Pacing, newest first, slow generators


def paced(latency_s: float, step_s: float, margin: float, **changes: object) -> Scheduler:
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


def with_a_slow_generator(slow_s: float, **changes: object) -> Scheduler:
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


# Evaluation


def test_an_evaluation_goes_to_its_version_before_anything_else_and_outside_the_ledger() -> None:
    scheduler = fresh(version=3)
    scheduler.evaluate([7, 8])
    given = grants(scheduler, version=3, room=4)
    assert [(g.kind, g.prompt, g.samples) for g in given[:2]] == [
        (LeaseKind.EVALUATE, 7, 1),
        (LeaseKind.EVALUATE, 8, 1),
    ]
    assert given[2].kind is LeaseKind.TRAIN
    assert scheduler.ledger.counts()["offered"] == len(scheduler.leases.open) == 1
    finish(scheduler, given[1])
    assert scheduler.take_evaluation() is None
    finish(scheduler, given[0])
    result = scheduler.take_evaluation()
    assert result is not None
    assert (result.version, [one.prompt for one in result.trajectories]) == (3, [7, 8])
    assert scheduler.take_evaluation() is None


def test_a_generator_of_another_version_gets_no_evaluation() -> None:
    scheduler = fresh(version=3)
    scheduler.evaluate([7])
    assert grants(scheduler, version=2, room=2)[0].kind is LeaseKind.TRAIN


def test_while_it_evaluates_a_generator_gets_leases_although_newer_weights_are_there() -> None:
    scheduler = fresh()
    scheduler.evaluate([7])
    grants(scheduler, room=1)
    finish(scheduler, *grants(scheduler, room=4, who="b"))
    train(scheduler)
    assert scheduler.pull("a", 0, 2, 0.0, newer_available=True) != Wait(Refusal.NEWER_VERSION)


def test_an_evaluation_is_finished_by_whoever_still_holds_its_version() -> None:
    scheduler = fresh()
    scheduler.evaluate([7, 8])
    first, _ = (grants(scheduler, room=1, who=who)[0] for who in ("a", "b"))
    finish(scheduler, *grants(scheduler, room=4, who="a"))
    train(scheduler)
    finish(scheduler, first)
    scheduler.holder_lost("b", crashed=True)
    (again,) = grants(scheduler, version=0, room=1, who="a")
    assert (again.kind, again.prompt, again.version) == (LeaseKind.EVALUATE, 8, 0)


def test_an_evaluation_whose_version_nobody_holds_starts_again_at_the_newest() -> None:
    scheduler = fresh()
    scheduler.evaluate([7, 8])
    done, lost = grants(scheduler, room=2, who="a")
    finish(scheduler, done)
    finish(scheduler, *grants(scheduler, room=4, who="b"))
    train(scheduler)
    scheduler.pull("b", 1, 0, 0.0, newer_available=False)
    scheduler.holder_lost("a", crashed=True)
    again = grants(scheduler, version=1, room=2, who="b")
    assert [(g.prompt, g.version) for g in again] == [(7, 1), (8, 1)]
    assert scheduler.finished(answer(lost, 0, 1.0), 0.0) is ResultStatus.LATE


def test_an_answer_of_another_version_spoils_no_evaluation() -> None:
    scheduler = fresh()
    scheduler.evaluate([7])
    (grant,) = grants(scheduler, room=1)
    finish(scheduler, *grants(scheduler, room=4, who="b"))
    train(scheduler)
    assert scheduler.finished(answer(grant, 0, 1.0, newest_version=1), 0.0) is ResultStatus.INVALID
    result = scheduler.take_evaluation()
    assert result is not None
    assert result.trajectories[0].error == "tokens of versions 0 to 1, expected 0 to 0"


def test_the_run_is_not_done_before_its_last_version_is_evaluated() -> None:
    scheduler = fresh(steps=1, evaluate_at_end=True)
    finish(scheduler, *grants(scheduler))
    train(scheduler)
    assert scheduler.trained_out
    assert not scheduler.done
    scheduler.evaluate([7])
    assert refusal(scheduler, version=0, newer=True) is Refusal.NEWER_VERSION
    (grant,) = grants(scheduler, version=1)
    assert refusal(scheduler, version=1, who="b") is Refusal.EVALUATION
    finish(scheduler, grant)
    assert not scheduler.done, "the result was not taken yet"
    scheduler.take_evaluation()
    assert scheduler.done


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
    told = scheduler.describe(now=11.0)
    lease = told["generators"]["a"]["leases"][0]
    assert (lease["prompt"], lease["tokens"], lease["samples"], lease["for_s"]) == (0, 55, "0/2", 10.0)
    assert (told["generators"]["b"]["waits"], told["generators"]["b"]["waits_s"]) == ("at_bound", 6.0)
    assert told["open_by_deadline"] == {"0": 0, "1": 4}
    assert told["learner_waits_for"] == "0 of 2 groups finished, 4 open"
