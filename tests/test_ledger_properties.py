"""The ledger under every order of moves, legal or not: the books of a slow clerk who keeps one card per prompt."""

from __future__ import annotations

import random
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field

import msgpack
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.ledger import MAX_FAILURES, QUARANTINED_FLOOR, Ledger, LedgerSnapshot

OPEN = ("queued", "leased", "finished")
LEGAL_FROM = {
    "lease_again": ("queued",),
    "requeue": ("leased",),
    "finish": ("leased",),
    "train": ("leased", "finished"),
    "filter": ("leased",),
    "quarantine": ("leased",),
}
STATE_AFTER = {
    "lease_again": "leased",
    "requeue": "queued",
    "finish": "finished",
    "train": "trained",
    "quarantine": "failed/quarantined",
}
MOVES = sorted(LEGAL_FROM)
REASONS = ("equal_rewards", "prompt_too_long")
CHANCE = st.integers(0, 1 << 32).map(random.Random)


@dataclass
class Card:
    """All that is known of one prompt. A settled one's state is "trained", or how it was counted."""

    state: str = "leased"
    failures: int = 0
    crashes: int = 0


@dataclass
class Cards:
    """The clerk's books."""

    cards: list[Card] = field(default_factory=list)  # by prompt number
    last_batch: list[int] = field(default_factory=list)

    def standing(self, *states: str) -> list[int]:
        return [number for number, card in enumerate(self.cards) if card.state in states]

    def as_restored(self) -> Cards:
        """What a checkpoint brings back: everything that was open is queued, with its bad luck."""
        restored = deepcopy(self)
        for card in restored.cards:
            card.state = "queued" if card.state in OPEN else card.state
        return restored


class LedgerMachine(RuleBasedStateMachine):
    """Plays scheduler, learner and a clumsy caller; may go back to any older snapshot."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.clerk = Cards()
        self.kept: list[tuple[LedgerSnapshot, bytes, Cards]] = []  # snapshot, its bytes when it was taken, the cards

    @initialize(number=st.integers(2, 8))
    def offer_some(self, number: int) -> None:
        for _ in range(number):
            self._offer()

    def _offer(self) -> None:
        assert self.ledger.offer() == len(self.clerk.cards)
        self.clerk.cards.append(Card())

    @rule(chance=CHANCE)
    def live(self, chance: random.Random) -> None:
        """A dozen legal moves, whole batches and failures among them."""
        for _ in range(12):
            move = chance.choice([*MOVES, "train a batch", "fail"])
            if move == "train a batch":
                self._train(chance)
            elif legal := self.clerk.standing(*LEGAL_FROM.get(move, ("leased",))):
                self._move(move, chance.choice(legal), chance.random() < 0.5, chance.choice(REASONS))
            else:
                self._offer()

    def _move(self, move: str, number: int, crashed: bool, reason: str) -> None:
        card = self.clerk.cards[number]
        if move == "fail":
            card.failures += 1
            assert self.ledger.count_failure(number) == card.failures
            if card.failures < MAX_FAILURES:
                return
            move = "quarantine"
        self._act(move, number, crashed, reason)
        card.crashes += crashed and move == "requeue"
        card.state = {"filter": f"filtered/{reason}"}.get(move) or STATE_AFTER[move]
        self.clerk.last_batch = [number] if move == "train" else self.clerk.last_batch

    def _train(self, chance: random.Random) -> None:
        ripe = self.clerk.standing(*LEGAL_FROM["train"])
        numbers = chance.sample(ripe, min(len(ripe), chance.randint(0, 3)))
        self.ledger.train(numbers)
        for number in numbers:
            self.clerk.cards[number].state = "trained"
        self.clerk.last_batch = numbers

    @rule(move=st.sampled_from(MOVES), chance=CHANCE)
    def make_a_move_that_is_not_legal(self, move: str, chance: random.Random) -> None:
        """It is refused by the prompt's number, and nothing changes."""
        others = [number for number, card in enumerate(self.clerk.cards) if card.state not in LEGAL_FROM[move]]
        if others:
            number = chance.choice(others)
            with pytest.raises(AssertionError, match=f"prompt {number} is "):
                self._act(move, number, crashed=True, reason=REASONS[0])

    def _act(self, move: str, number: int, crashed: bool, reason: str) -> None:
        ledger = self.ledger
        match move:
            case "requeue":
                ledger.requeue(number, crashed)
            case "train":
                ledger.train([number])
            case "filter":
                ledger.filter(number, reason)
            case _:
                getattr(ledger, move)(number)

    @rule()
    def skip_the_step(self) -> None:
        self.ledger.skip_step()
        for number in self.clerk.last_batch:
            self.clerk.cards[number].state = "failed/non_finite"
        self.clerk.last_batch = []

    @rule(back=st.integers(0, 3), through_the_wire=st.booleans())
    def resume(self, back: int, through_the_wire: bool) -> None:
        """From now, or from an older snapshot; two resumes of one checkpoint are two equal lives."""
        snapshot = self.ledger.snapshot()
        self.kept.append((snapshot, msgpack.packb(snapshot), deepcopy(self.clerk)))
        snapshot, packed, cards = self.kept[-min(back + 1, len(self.kept))]
        self.ledger = Ledger.restore(msgpack.unpackb(packed) if through_the_wire else snapshot)
        self.clerk = cards.as_restored()

    @invariant()
    def every_prompt_stands_where_its_card_says(self) -> None:
        clerk, counts = self.clerk, self.ledger.counts()
        self.ledger.check()
        states = Counter(card.state for card in clerk.cards)
        wanted = {"offered": len(clerk.cards)} | {state: states[state] for state in (*OPEN, "trained")}
        for kind in ("filtered", "failed"):
            by_reason = {state: count for state, count in states.items() if state.startswith(kind + "/")}
            wanted |= {kind: sum(by_reason.values())} | by_reason
        assert {name: count for name, count in counts.items() if count} == {n: c for n, c in wanted.items() if c}
        assert list(self.ledger.queue) == clerk.standing("queued")
        assert sorted(self.ledger.last_batch) == sorted(clerk.last_batch)
        assert self.ledger.num_settled == len(clerk.cards) - len(clerk.standing(*OPEN))

    @invariant()
    def bad_luck_is_remembered_as_long_as_the_prompt_is_open(self) -> None:
        for number, card in enumerate(self.clerk.cards):
            luck = (card.failures, card.crashes) if card.state in OPEN else (0, 0)
            assert (self.ledger.failures(number), self.ledger.crashes(number)) == luck
        for at_least in (1, 2):
            often = [n for n in self.clerk.standing("queued") if self.clerk.cards[n].crashes >= at_least]
            assert self.ledger.queued_after_crashes(at_least) == often

    @invariant()
    def more_than_one_percent_of_bad_prompts_is_too_much(self) -> None:
        bad = len(self.clerk.standing("failed/quarantined"))
        settled = len(self.clerk.cards) - len(self.clerk.standing(*OPEN))
        assert self.ledger.too_many_quarantined == (bad > QUARANTINED_FLOOR and bad * 100 > settled)

    @invariant()
    def a_snapshot_never_changes_after_it_was_taken(self) -> None:
        assert all(msgpack.packb(snapshot) == packed for snapshot, packed, _ in self.kept)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=50, stateful_step_count=25)
