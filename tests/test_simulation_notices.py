"""That a simulated cluster notices what it is there to notice: rules and guards are broken one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from broker.batches import each_num_due
from broker.groups import Groups
from broker.leases import LeaseTable, OpenLease
from broker.ledger import Ledger, LedgerSnapshot
from protocol.messages import Status
from protocol.types import Trajectory
from tests.simulation.broker import SimulatedBroker, Standing
from tests.simulation.cluster import Cluster
from tests.simulation.generator import SimulatedGenerator
from tests.simulation.learner import Learned
from tests.simulation.random_schedules import play

NUM_SCHEDULES = 200  # one of them notices
sound_requeue, sound_restore = Ledger.requeue, Ledger.restore
sound_result, sound_restart = SimulatedBroker.result, SimulatedBroker._restore
sound_apply, sound_resume = SimulatedGenerator._apply, Cluster._resume


def admits_one_too_many(num_open: Counter[int], deadline: int, next_step: int, last_deadline: int, size: int) -> bool:
    steps = range(deadline, last_deadline + 1)
    return all(num <= (d - next_step + 1) * size for d, num in zip(steps, each_num_due(num_open, steps), strict=True))


def admits_by_its_own_deadline(
    num_open: Counter[int], deadline: int, next_step: int, last_deadline: int, size: int
) -> bool:
    return next(each_num_due(num_open, range(deadline, deadline + 1))) < (deadline - next_step + 1) * size


def is_enough_without_what_is_due(
    num_open: Counter[int], num_ready: Counter[int], step: int, last_deadline: int, size: int, num_groups: int
) -> bool:
    return num_ready.total() >= num_groups


def chooses_the_latest(ready: Iterable[OpenLease], num_groups: int) -> list[OpenLease]:
    return sorted(ready, key=lambda lease: -lease.grant.deadline)[:num_groups]


def forgets_who_left(self: LeaseTable, lease: OpenLease) -> None:
    del self.open[lease.grant.attempt]


def repeats_attempts(self: LeaseTable) -> int:
    return len(self.open) + len(self.aside) + 1


def requeues_without_the_crash(self: Ledger, number: int, crashed: bool = False) -> None:
    sound_requeue(self, number)


def restores_without_failures(snapshot: LedgerSnapshot) -> Ledger:
    return sound_restore({**snapshot, "failures": []})


def throws_remainders_away(self: Groups, lease: OpenLease) -> None:
    self._leases.close(lease)


def takes_results_of_any_epoch(
    self: SimulatedBroker, session: int, epoch: int, of_epoch: int, trajectory: Trajectory
) -> Status:
    return sound_result(self, session, epoch, self.epoch, trajectory)


def restarts_without_the_step_in_training(self: SimulatedBroker, standing: Standing) -> None:
    sound_restart(self, replace(standing, training=None))


def applies_what_another_history_had(self: SimulatedGenerator, fetched: tuple[int, int], epoch: int) -> None:
    sound_apply(self, fetched, self._epoch)


def resumes_without_its_ledger(self: Cluster, learned: Learned) -> None:
    sound_resume(self, replace(learned, standing=Standing(learned.version)))


BREAKS: dict[str, tuple[str, Any]] = {
    "one group too many is admitted": ("broker.scheduler.admits", admits_one_too_many),
    "admission forgets the later deadlines": ("broker.scheduler.admits", admits_by_its_own_deadline),
    "a batch does not wait for what must go": ("broker.scheduler.is_enough", is_enough_without_what_is_due),
    "a batch takes the latest deadlines": ("broker.scheduler.choose", chooses_the_latest),
    "groups that left are counted as open": ("broker.leases.LeaseTable._leaves_open", forgets_who_left),
    "a lost grant is never missed": ("broker.leases.LeaseTable.expired", lambda self, now: []),
    "the silent are never given up": ("broker.leases.LeaseTable.silent", lambda self, now: []),
    "attempts repeat": ("broker.leases.LeaseTable.new_attempt", repeats_attempts),
    "crashes are not counted": ("broker.ledger.Ledger.requeue", requeues_without_the_crash),
    "a skipped step counts as trained": ("broker.ledger.Ledger.skip_step", lambda self: None),
    "a restored ledger forgets failures": ("broker.ledger.Ledger.restore", restores_without_failures),
    "bad prompts never end a run": ("broker.ledger.Ledger.too_many_quarantined", False),
    "filtered groups never end a run": ("broker.groups.BATCHES_WITHOUT_SIGNAL", 1_000_000),
    "remainders are thrown away": ("broker.groups.Groups.end_remainder", throws_remainders_away),
    "pacing asks for less than a batch": ("broker.pacing.Pace.limit", 0.5),
    "an evaluation never starts again": (
        "broker.evaluation.Evaluation.restart_if_unanswerable",
        lambda self, newest: None,
    ),
    "results of an older epoch are taken": (
        "tests.simulation.broker.SimulatedBroker.result",
        takes_results_of_any_epoch,
    ),
    "a restarted broker forgets the step in training": (
        "tests.simulation.broker.SimulatedBroker._restore",
        restarts_without_the_step_in_training,
    ),
    "a generator applies weights of another history": (
        "tests.simulation.generator.SimulatedGenerator._apply",
        applies_what_another_history_had,
    ),
    "a checkpoint has no ledger": ("tests.simulation.cluster.Cluster._resume", resumes_without_its_ledger),
}


def play_many() -> None:
    for seed in range(NUM_SCHEDULES):
        play(seed)


@pytest.mark.parametrize("what", BREAKS)
def test_the_simulation_notices_when(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BREAKS[what])
    with pytest.raises(AssertionError, match=r"^seed"):
        play_many()
