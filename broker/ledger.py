"""What became of every prompt, and what a checkpoint must remember of it.

Owned by the scheduler, in the broker process; pure. Prompts are numbers 0, 1, 2, ... of the run's stream. One that
was offered is queued again, leased or finished until it is settled: trained, filtered or failed, each exactly once
and for ever. A finished group is settled when its batch is cut, so the ledger as of a cut is what a checkpoint must
hold.

"Nothing is lost, nothing is trained twice" rests on `_move` and `_settle`, the only places where a prompt changes its
state, and on `check`; that it survives a crash rests on `snapshot` and `restore`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import TypedDict

QUARANTINED = "quarantined"  # a reason of `fail`: the prompt failed too often
NON_FINITE = "non_finite"  # a reason of `fail`: the step that trained it was skipped
MAX_FAILURES = 3  # a prompt that failed so often is given up
QUARANTINED_FLOOR = 3  # so many bad prompts stop no run, however small
QUARANTINED_SHARE = 0.01  # of the settled prompts; above it (and above the floor) the run stops


class Open(StrEnum):
    """Where an offered prompt stands until it is settled."""

    QUEUED = "queued"  # was leased before; goes out again ahead of the stream
    LEASED = "leased"
    FINISHED = "finished"  # its group waits for a batch


class LedgerSnapshot(TypedDict):
    """A ledger as plain values. Its size follows what is open, not the length of the run."""

    offered: int
    unsettled: list[int]  # ascending; every other number below `offered` is settled
    failures: list[tuple[int, int]]  # (number, count)
    crashes: list[tuple[int, int]]  # (number, count)
    trained: int
    last_batch: list[int]
    filtered: dict[str, int]  # by reason
    failed: dict[str, int]  # by reason


class Ledger:
    """The books of one run. Reasons are categories, not sentences: they are counted and become names of curves."""

    def __init__(self) -> None:
        self.offered = 0  # every number below it has been offered
        self.trained = 0
        self.filtered: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.last_batch: list[int] = []  # settled as trained at the last cut
        self._open: dict[int, Open] = {}
        self._queue: list[int] = []  # ascending
        self._failures: Counter[int] = Counter()  # of open prompts only, as the next one
        self._crashes: Counter[int] = Counter()

    # Out and back

    @property
    def queue(self) -> Sequence[int]:
        """The prompts that go out again, first one first."""
        return self._queue

    def offer(self) -> int:
        """Leases the next number of the stream."""
        number = self.offered
        self.offered += 1
        self._open[number] = Open.LEASED
        return number

    def lease_again(self, number: int) -> None:
        self._move(number, Open.QUEUED, Open.LEASED)
        del self._queue[bisect_left(self._queue, number)]

    def requeue(self, number: int, crashed: bool = False) -> None:
        """A lost or failed lease: the prompt goes out again, ahead of all that were never offered."""
        self._move(number, Open.LEASED, Open.QUEUED)
        if crashed:
            self._crashes[number] += 1
        insort(self._queue, number)

    def finish(self, number: int) -> None:
        self._move(number, Open.LEASED, Open.FINISHED)

    # Settled, once and for ever

    def train(self, numbers: Sequence[int]) -> None:
        """Settles the prompts of a batch: their groups are finished or (split at the deadline) still leased."""
        for number in numbers:
            self._settle(number, Open.LEASED, Open.FINISHED)
        self.trained += len(numbers)
        self.last_batch = list(numbers)

    def filter(self, number: int, reason: str) -> None:
        self._settle(number, Open.LEASED)
        self.filtered[reason] += 1

    def quarantine(self, number: int) -> None:
        self._settle(number, Open.LEASED)
        self.failed[QUARANTINED] += 1

    def skip_step(self) -> None:
        """The step of the last batch changed nothing: its prompts, settled as trained at the cut, have failed."""
        self.trained -= len(self.last_batch)
        self.failed[NON_FINITE] += len(self.last_batch)
        self.last_batch = []

    # Bad luck

    def failures(self, number: int) -> int:
        return self._failures[number]

    def crashes(self, number: int) -> int:
        return self._crashes[number]

    def queued_after_crashes(self, at_least: int) -> list[int]:
        """The queued prompts that were lost in so many crashes, first one first."""
        often = (number for number, count in self._crashes.items() if count >= at_least)
        return sorted(number for number in often if self._open.get(number) is Open.QUEUED)

    def count_failure(self, number: int) -> int:
        self._failures[number] += 1
        return self._failures[number]

    @property
    def too_many_quarantined(self) -> bool:
        """More than 1% of the settled prompts, and more than three."""
        return self.num_quarantined > max(QUARANTINED_FLOOR, QUARANTINED_SHARE * self.num_settled)

    # The sum

    @property
    def num_quarantined(self) -> int:
        return self.failed[QUARANTINED]

    @property
    def num_settled(self) -> int:
        return self.trained + self.filtered.total() + self.failed.total()

    def counts(self) -> dict[str, int]:
        """Prompts by state, as curves name them; reasons come as `filtered/<reason>` and `failed/<reason>`."""
        states = Counter(self._open.values())
        return {
            "offered": self.offered,
            **{state.value: states[state] for state in Open},
            "trained": self.trained,
            "filtered": self.filtered.total(),
            "failed": self.failed.total(),
            **{f"filtered/{reason}": count for reason, count in self.filtered.items()},
            **{f"failed/{reason}": count for reason, count in self.failed.items()},
        }

    def check(self) -> None:
        """Asserts that every prompt ever offered is in exactly one state."""
        counts = self.counts()
        states = ("queued", "leased", "finished", "trained", "filtered", "failed")
        assert counts["offered"] == sum(counts[state] for state in states), f"the ledger does not add up: {counts}"
        assert len(self._queue) == counts["queued"], f"{len(self._queue)} prompts in the queue of {counts}"

    # What a checkpoint holds

    def snapshot(self) -> LedgerSnapshot:
        return LedgerSnapshot(
            offered=self.offered,
            unsettled=sorted(self._open),
            failures=sorted(self._failures.items()),
            crashes=sorted(self._crashes.items()),
            trained=self.trained,
            last_batch=self.last_batch,
            filtered=dict(self.filtered),
            failed=dict(self.failed),
        )

    @classmethod
    def restore(cls, snapshot: LedgerSnapshot) -> Ledger:
        """The same books with every open prompt queued again. Raises ValueError if the snapshot does not add up."""
        ledger = cls()
        ledger.offered = snapshot["offered"]
        ledger.trained = snapshot["trained"]
        ledger.last_batch = list(snapshot["last_batch"])
        ledger.filtered.update(snapshot["filtered"])
        ledger.failed.update(snapshot["failed"])
        ledger._failures.update(dict(snapshot["failures"]))
        ledger._crashes.update(dict(snapshot["crashes"]))
        ledger._queue = sorted(set(snapshot["unsettled"]))
        ledger._open = dict.fromkeys(ledger._queue, Open.QUEUED)
        if len(ledger._open) + ledger.num_settled != ledger.offered or any(n >= ledger.offered for n in ledger._open):
            raise ValueError(
                f"the ledger in this checkpoint does not add up: {ledger.offered} prompts offered, "
                f"{ledger.num_settled} settled, {len(ledger._open)} open; resume from an older checkpoint"
            )
        return ledger

    # The two places where a prompt changes its state

    def _move(self, number: int, origin: Open, target: Open) -> None:
        assert self._open.get(number) is origin, f"prompt {number} is {self._open.get(number, 'settled')}, not {origin}"
        self._open[number] = target

    def _settle(self, number: int, *origins: Open) -> None:
        state = self._open.get(number)
        assert state in origins, f"prompt {number} is {state or 'settled'}, not {' or '.join(origins)}"
        del self._open[number]
        self._failures.pop(number, None)
        self._crashes.pop(number, None)
