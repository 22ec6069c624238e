"""One evaluation: prompts that are answered by exactly one policy version.

Owned by the scheduler, in the broker process; pure. Its leases stand outside the ledger and the bound on staleness.
That a result never mixes versions rests on `lease`, which serves only generators that hold exactly the version, on
`Grant.fault_of`, and on `restart_if_unanswerable`, which forgets every answer once nobody holds it any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from broker.leases import Generator, Grant, LeaseTable, OpenLease
from protocol.types import LeaseKind, Trajectory


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationResult:
    version: int
    trajectories: tuple[Trajectory, ...]  # by prompt, then sample; failed ones say why

    @property
    def by_prompt(self) -> list[tuple[Trajectory, ...]]:
        return [tuple(found) for _, found in groupby(self.trajectories, key=lambda one: one.prompt)]


class Evaluation:
    """What it still has to lease, and what came back."""

    def __init__(self, leases: LeaseTable, numbers: Sequence[int], samples: int, version: int) -> None:
        self.version = version
        self._leases = leases
        self._numbers = tuple(numbers)
        self._samples = samples
        self._waiting = deque(self._numbers)
        self._answers: dict[int, tuple[Trajectory, ...]] = {}

    @property
    def num_missing(self) -> int:
        return len(self._numbers) - len(self._answers)

    def lease(self, generator: Generator, now: float) -> Grant | None:
        """The next prompt, if this generator holds exactly the version that is evaluated."""
        if not self._waiting or generator.version != self.version:
            return None
        number, attempt = self._waiting.popleft(), self._leases.new_attempt()
        grant = Grant(LeaseKind.EVALUATE, number, attempt, self._samples, self.version, deadline=self.version)
        return self._leases.hand_out(grant, generator, now)

    def answered(self, lease: OpenLease) -> None:
        self._leases.close(lease)
        self._answers[lease.grant.prompt] = tuple(lease.results[sample] for sample in range(self._samples))

    def lost(self, lease: OpenLease) -> None:
        self._leases.close(lease)
        self._waiting.appendleft(lease.grant.prompt)

    def restart_if_unanswerable(self, newest_version: int) -> None:
        """Starts again at the newest version if answers are missing and no generator holds this one any more."""
        generators = self._leases.generators.values()
        if self.num_missing and all(generator.version != self.version for generator in generators):
            for lease in self._leases.evaluations:
                self._leases.close(lease)
            self.version = newest_version
            self._waiting = deque(self._numbers)
            self._answers = {}

    def result(self) -> EvaluationResult:
        answers = (trajectory for number in self._numbers for trajectory in self._answers[number])
        return EvaluationResult(self.version, tuple(answers))
