"""The ledger: every prompt in exactly one state, and a snapshot that forgets nothing of it."""

from __future__ import annotations

from collections.abc import Callable

import msgpack
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.ledger import MAX_FAILURES, Ledger, LedgerSnapshot


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


def some(*states: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule that needs a prompt in one of these states."""
    return precondition(lambda machine: any(state in states for state in machine.model.values()))


class LedgerMachine(RuleBasedStateMachine):
    """Any order of legal moves, with a plain dictionary as the model."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.model: dict[int, str] = {}

    def pick(self, data: st.DataObject, *states: str) -> int:
        return data.draw(st.sampled_from([number for number, state in self.model.items() if state in states]))

    @rule()
    def offer(self) -> None:
        self.model[self.ledger.offer()] = "leased"

    @some("leased")
    @rule(data=st.data(), crashed=st.booleans())
    def requeue(self, data: st.DataObject, crashed: bool) -> None:
        number = self.pick(data, "leased")
        self.ledger.requeue(number, crashed)
        self.model[number] = "queued"

    @some("queued")
    @rule(data=st.data())
    def lease_again(self, data: st.DataObject) -> None:
        number = self.pick(data, "queued")
        self.ledger.lease_again(number)
        self.model[number] = "leased"

    @some("leased")
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        number = self.pick(data, "leased")
        self.ledger.finish(number)
        self.model[number] = "finished"

    @some("leased", "finished")
    @rule(data=st.data())
    def train(self, data: st.DataObject) -> None:
        number = self.pick(data, "leased", "finished")
        self.ledger.train([number])
        self.model[number] = "trained"

    @some("leased")
    @rule(data=st.data(), reason=st.sampled_from(["equal_rewards", "prompt_too_long"]))
    def filter(self, data: st.DataObject, reason: str) -> None:
        number = self.pick(data, "leased")
        self.ledger.filter(number, reason)
        self.model[number] = "filtered"

    @some("leased")
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        number = self.pick(data, "leased")
        if self.ledger.count_failure(number) == MAX_FAILURES:
            self.ledger.quarantine(number)
            self.model[number] = "failed"

    @rule()
    def restore(self) -> None:
        snapshot: LedgerSnapshot = msgpack.unpackb(msgpack.packb(self.ledger.snapshot()))
        failures = {number: self.ledger.failures(number) for number in self.model}
        self.ledger = Ledger.restore(snapshot)
        open_states = ("leased", "finished")
        self.model = {number: "queued" if state in open_states else state for number, state in self.model.items()}
        assert {number: self.ledger.failures(number) for number in self.model} == failures

    @invariant()
    def the_counts_are_those_of_the_model(self) -> None:
        self.ledger.check()
        counts, states = self.ledger.counts(), list(self.model.values())
        assert counts["offered"] == len(states)
        for state in ("queued", "leased", "finished", "trained", "filtered", "failed"):
            assert counts[state] == states.count(state)
        assert list(self.ledger.queue) == sorted(n for n, state in self.model.items() if state == "queued")


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
