"""Shorthands for tests of the scheduler: a small schedule, and what generators and learner do to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from broker.batches import Batch, ScheduleSettings
from broker.leases import Grant, Refusal, Wait
from broker.ledger import Ledger
from broker.scheduler import Scheduler
from tests.simulation.generator import answer

PLAIN = ScheduleSettings(prompts_per_step=2, group_size=2, steps=10, max_staleness=1, pacing_margin=None)
PLENTY = 1000  # room for any number of completions


def fresh(version: int = 0, **changes: Any) -> Scheduler:
    return Scheduler(replace(PLAIN, **changes), Ledger(), version)


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
