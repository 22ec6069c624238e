"""Results, failures, crashes and filters: what becomes of a group that was leased."""

from __future__ import annotations

from dataclasses import replace

from broker.groups import UNUSABLE_IN_A_ROW
from broker.leases import Refusal, ResultStatus
from broker.scheduler import Scheduler
from protocol.types import Trajectory
from tests.schedules import finish, fresh, grants, refusal
from tests.simulation.generator import answer

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
    assert scheduler.verdict == "no signal: 8 groups in a row had equal rewards and were filtered"


def test_a_stream_without_any_signal_ends_the_run_with_its_last_prompt_and_is_not_complete() -> None:
    scheduler = fresh(filter_equal_rewards=True, num_prompts=5)
    for number in range(5):
        assert scheduler.verdict == "", number
        finish(scheduler, grants(scheduler, room=2)[0], equal=True)
    assert scheduler.verdict.startswith("no signal: 5 groups in a row")


def test_prompts_that_cannot_be_used_are_no_missing_signal_but_nothing_else_in_a_row_ends_the_run() -> None:
    scheduler = fresh()
    for number in range(2 * UNUSABLE_IN_A_ROW - 1):
        [grant] = grants(scheduler, room=2)
        if number != UNUSABLE_IN_A_ROW - 1:  # that one runs
            scheduler.filtered(grant.attempt, "prompt_too_long")
        assert scheduler.verdict == ""
    scheduler.filtered(grants(scheduler, room=2)[0].attempt, "prompt_too_long")
    assert scheduler.verdict == "no usable prompt: 100 in a row were filtered, the last one: prompt_too_long"


def test_a_stream_of_which_nothing_can_be_used_ends_the_run_with_its_last_prompt() -> None:
    scheduler = fresh(num_prompts=5)
    for number in range(5):
        assert scheduler.verdict == "", number
        scheduler.filtered(grants(scheduler, room=2)[0].attempt, "prompt_too_long")
    assert scheduler.verdict.startswith("no usable prompt: 5 in a row")


def test_a_group_without_its_greedy_completion_is_made_again() -> None:
    scheduler = fresh(group_size=3, baseline_sample=2)
    grant = grants(scheduler, room=3)[0]
    for sample in range(2):
        scheduler.finished(answer(grant, sample, float(sample)), 0.0)
    scheduler.finished(Trajectory(grant.prompt, grant.attempt, 2, None, error="no luck"), 0.0)
    assert (scheduler.ledger.counts()["queued"], scheduler.ledger.failures(grant.prompt)) == (1, 1)
    [again] = grants(scheduler, room=3)
    assert again.prompt == grant.prompt
    for sample in (0, 2):
        scheduler.finished(answer(again, sample, 1.0), 0.0)
    scheduler.finished(Trajectory(again.prompt, again.attempt, 1, None, error="no luck"), 0.0)
    assert scheduler.ledger.counts()["finished"] == 1, "one that was sampled may be missing"


def test_rewards_that_only_float64_tells_apart_are_no_signal() -> None:
    """What the learner computes advantages from is float32."""
    scheduler = fresh(filter_equal_rewards=True)
    sums, apart = grants(scheduler)[:2]
    for grant, rewards in ((sums, (0.1 + 0.2, 0.3)), (apart, (0.3, 0.3001))):
        for sample, reward in enumerate(rewards):
            scheduler.finished(answer(grant, sample, reward), 0.0)
    assert 0.1 + 0.2 != 0.3
    assert scheduler.ledger.counts()["filtered"] == 1
    open_prompts = {lease.grant.prompt for lease in scheduler.leases.open.values()}
    assert (sums.prompt in open_prompts, apart.prompt in open_prompts) == (False, True)
