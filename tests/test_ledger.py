"""The ledger: every prompt in exactly one state, and a snapshot that forgets nothing of it."""

from __future__ import annotations

import msgpack
import pytest

from broker.ledger import Ledger


def offered(num_prompts: int) -> Ledger:
    ledger = Ledger()
    for _ in range(num_prompts):
        ledger.offer()
    return ledger


def through_the_wire(ledger: Ledger) -> Ledger:
    return Ledger.restore(msgpack.unpackb(msgpack.packb(ledger.snapshot())))


def test_prompts_are_offered_in_order_and_counted_as_leased() -> None:
    ledger = Ledger()
    assert [ledger.offer() for _ in range(3)] == [0, 1, 2]
    assert ledger.counts()["leased"] == 3


def test_a_lost_prompt_goes_out_again_in_prompt_order() -> None:
    ledger = offered(4)
    for number in (3, 0, 2):
        ledger.requeue(number)
    assert list(ledger.queue) == [0, 2, 3]
    ledger.lease_again(2)
    assert list(ledger.queue) == [0, 3]


def test_a_settled_prompt_cannot_be_settled_again() -> None:
    ledger = offered(1)
    ledger.finish(0)
    ledger.train([0])
    with pytest.raises(AssertionError, match="prompt 0 is settled"):
        ledger.train([0])
    with pytest.raises(AssertionError, match="prompt 0 is settled"):
        ledger.requeue(0)


def test_a_queued_prompt_cannot_be_trained() -> None:
    ledger = offered(1)
    ledger.requeue(0)
    with pytest.raises(AssertionError, match="prompt 0 is queued"):
        ledger.train([0])


def test_every_reason_has_its_own_count() -> None:
    ledger = offered(4)
    ledger.filter(0, "prompt_too_long")
    ledger.filter(1, "equal_rewards")
    ledger.filter(2, "equal_rewards")
    ledger.quarantine(3)
    counts = ledger.counts()
    assert counts["filtered"] == 3
    assert counts["filtered/equal_rewards"] == 2
    assert counts["filtered/prompt_too_long"] == 1
    assert counts["failed/quarantined"] == 1
    ledger.check()


def test_a_skipped_step_moves_its_prompts_from_trained_to_failed() -> None:
    ledger = offered(3)
    ledger.train([0])
    ledger.train([1, 2])
    ledger.skip_step()
    assert ledger.counts()["trained"] == 1
    assert ledger.counts()["failed/non_finite"] == 2
    ledger.check()


def test_a_step_can_be_skipped_after_the_broker_was_restored() -> None:
    ledger = offered(2)
    ledger.train([0, 1])
    restored = through_the_wire(ledger)
    restored.skip_step()
    assert restored.counts()["failed/non_finite"] == 2


def test_a_restored_ledger_queues_leased_and_finished_prompts_in_prompt_order() -> None:
    ledger = offered(6)
    ledger.finish(4)
    ledger.train([1])
    ledger.requeue(5)
    restored = through_the_wire(ledger)
    assert list(restored.queue) == [0, 2, 3, 4, 5]
    assert restored.offer() == 6


def test_failures_and_crashes_survive_a_restore() -> None:
    ledger = offered(2)
    ledger.count_failure(0)
    ledger.requeue(1, crashed=True)
    restored = through_the_wire(ledger)
    assert (restored.failures(0), restored.crashes(0)) == (1, 0)
    assert (restored.failures(1), restored.crashes(1)) == (0, 1)


def test_a_snapshot_of_a_long_run_stays_small() -> None:
    ledger = Ledger()
    for number in range(100_000):
        ledger.offer()
        if number % 7:
            ledger.train([number])
        else:
            ledger.filter(number, "equal_rewards")
    for _ in range(64):
        ledger.offer()
    assert len(msgpack.packb(ledger.snapshot())) < 1000


def test_a_snapshot_that_does_not_add_up_is_refused() -> None:
    snapshot = offered(3).snapshot()
    snapshot["trained"] = 1
    with pytest.raises(ValueError, match="does not add up: 3 prompts offered, 1 settled, 3 open"):
        Ledger.restore(snapshot)


def test_three_bad_prompts_stop_no_run_and_the_fourth_stops_a_small_one() -> None:
    ledger = offered(10)
    for number in range(3):
        ledger.quarantine(number)
    assert not ledger.too_many_quarantined
    ledger.quarantine(3)
    assert ledger.too_many_quarantined


def test_one_percent_of_bad_prompts_is_tolerated_in_a_long_run() -> None:
    ledger = offered(1000)
    ledger.train(range(980))
    for number in range(980, 989):
        ledger.quarantine(number)
    assert not ledger.too_many_quarantined, "9 of 989"
    for number in range(989, 991):
        ledger.quarantine(number)
    assert ledger.too_many_quarantined, "11 of 991"
