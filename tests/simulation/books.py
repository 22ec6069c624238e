"""What became of every prompt by its number: a second, independent ledger of a simulated run.

Used by simulations only. It is kept by `promises.py`, and rolled back with the first ledger.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Books:
    """What became of every prompt, as of one cut. Never changed: a later one is another object."""

    trained: frozenset[int] = frozenset()
    non_finite: frozenset[int] = frozenset()
    filtered: frozenset[int] = frozenset()
    quarantined: frozenset[int] = frozenset()
    last_batch: frozenset[int] = frozenset()
    failures: tuple[tuple[int, int], ...] = ()  # (prompt, count), of open prompts as of the cut
    crashes: tuple[tuple[int, int], ...] = ()  # likewise

    def cut(self, prompts: frozenset[int], failures: Counter[int], crashes: Counter[int]) -> Books:
        trained, counted = self.trained | prompts, (tuple(failures.items()), tuple(crashes.items()))
        return replace(self, trained=trained, last_batch=prompts, failures=counted[0], crashes=counted[1])

    def skip(self) -> Books:
        """The step of the last batch changed nothing."""
        trained, non_finite = self.trained - self.last_batch, self.non_finite | self.last_batch
        return replace(self, trained=trained, non_finite=non_finite, last_batch=frozenset())

    @property
    def settled(self) -> frozenset[int]:
        return self.trained | self.non_finite | self.filtered | self.quarantined

    @property
    def num_settled(self) -> int:
        return len(self.trained) + len(self.non_finite) + len(self.filtered) + len(self.quarantined)


@dataclass(eq=False, slots=True)
class Record:
    """What was seen and trained in a whole run, over all its epochs."""

    seen: Counter[str] = field(default_factory=Counter)
    staleness: list[int] = field(default_factory=list)  # of every token inside a loss
    num_left_out: int = 0  # tokens of remainders beyond the bound
    evaluated: list[int] = field(default_factory=list)  # versions
