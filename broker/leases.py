"""Leases, and the generators that hold them: the books on which the scheduler decides.

Part of the broker process; pure. What may be leased, and to whom, is decided in `scheduler.py`. That an answer to a
lost lease is never taken for an answer to the next one rests on `LeaseTable.new_attempt`: no two leases of an epoch
share it.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from protocol.types import LeaseKind, Trajectory

REMEMBERED_LATENCIES = 5  # their median ignores single stragglers, and forgets a slow spell after three groups


class Refusal(StrEnum):
    """Why a generator that pulls gets no lease now."""

    STOPPED = "stopped"  # the run ends with a verdict
    NO_VERSION = "no_version"  # it holds no weights yet
    UNKNOWN_VERSION = "unknown_version"  # it claims weights that were never announced
    NO_ROOM = "no_room"  # it has what it asked for, or asked for nothing
    ALONE = "alone"  # it runs a prompt alone, empties itself for one, or nothing else is left to lease
    NEWER_VERSION = "newer_version"  # newer weights can be had at once: leases follow when they are applied
    END_OF_DATA = "end_of_data"  # every prompt that the run still needs is leased or settled
    EVALUATION = "evaluation"  # the same, and the run waits for answers of other generators to an evaluation
    TOO_OLD = "too_old"  # every step that may train a group of its version is cut
    AT_BOUND = "at_bound"  # one more group could only be trained staler than allowed
    PACING = "pacing"  # one more open group would only be staler, nothing sooner
    SLOW = "slow"  # its groups take so long that the cluster is faster without them


class ResultStatus(StrEnum):
    """What became of one result: final, and told to its generator."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # this sample of this lease was accepted before
    LATE = "late"  # the lease is lost, or its batch is cut
    INVALID = "invalid"  # it contradicts its lease, and counts as a failed sample


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease as it is handed out: `protocol.types.Lease` with the prompt by its number."""

    kind: LeaseKind
    prompt: int
    attempt: int
    samples: int  # G
    version: int
    deadline: int  # the last step that may train it; of an evaluation: its version
    failures: int = 0
    alone: bool = False  # generators crashed while they ran this prompt: it gets one for itself

    def fault_of(self, result: Trajectory, newest_version: int) -> str:
        """What in a result contradicts this lease; "" if nothing does."""
        if not 0 <= result.sample < self.samples:
            return f"sample {result.sample} of a lease of {self.samples} samples"
        if result.error:
            return ""
        if result.completion is None or not result.completion.spans:
            return "a result without tokens and without an error"
        oldest, newest = result.completion.oldest_version, result.completion.spans[-1].version
        limit = self.version if self.kind is LeaseKind.EVALUATE else newest_version
        if oldest < self.version or newest > limit:
            return f"tokens of versions {oldest} to {newest}, expected {self.version} to {limit}"
        return ""


@dataclass(frozen=True, slots=True)
class Wait:
    """No lease for now."""

    reason: Refusal


@dataclass(slots=True, eq=False)
class OpenLease:
    """A lease from its grant until it is lost, or its group is in a batch."""

    grant: Grant
    holder: str  # session of its generator
    granted_at: float
    expires_at: float
    results: dict[int, Trajectory] = field(default_factory=dict)  # by sample
    handed_over: frozenset[int] = frozenset()  # samples that an earlier batch took; the rest is a remainder
    num_tokens: int = 0  # generated so far, as heartbeats say

    @property
    def complete(self) -> bool:
        return len(self.results) == self.grant.samples

    @property
    def good(self) -> list[Trajectory]:
        """The samples that did not fail, in order."""
        return [self.results[sample] for sample in sorted(self.results) if not self.results[sample].error]

    @property
    def errors(self) -> list[str]:
        return [self.results[sample].error for sample in sorted(self.results) if self.results[sample].error]

    def describe(self, now: float) -> dict[str, Any]:
        return {
            "kind": self.grant.kind.value,
            "prompt": self.grant.prompt,
            "attempt": self.grant.attempt,
            "version": self.grant.version,
            "deadline": self.grant.deadline,
            "samples": f"{len(self.results)}/{self.grant.samples}",
            "tokens": self.num_tokens,
            "alone": self.grant.alone,
            "remainder": bool(self.handed_over),
            "for_s": round(now - self.granted_at, 1),
        }


@dataclass(slots=True, eq=False)
class Generator:
    """What is known of one session that pulls leases."""

    session: str
    version: int = -1  # what it holds, as its last pull said; -1: nothing
    heard_at: float = 0.0
    room: int = 0  # completions that it could start now
    running: dict[int, OpenLease] = field(default_factory=dict)  # by attempt: leases that it has not answered in full
    leased_at: float = -math.inf  # its newest lease
    emptying: bool = False  # gets nothing more until it is empty, to run a prompt alone
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED_LATENCIES))  # s
    latency_s: float | None = None  # their median: from grant to last sample of its latest groups
    waiting: Refusal = Refusal.NO_ROOM  # why it was given no more
    waiting_since: float = 0.0

    def pulls(self, version: int, room: int, now: float) -> None:
        self.version, self.room, self.heard_at = version, room, now
        self.emptying = False

    def has_room_for(self, samples: int) -> bool:
        """An empty generator takes any group: its engine queues what it cannot run at once."""
        return self.room >= samples or (self.room > 0 and not self.running)

    def answers(self, latency_s: float) -> None:
        """It sent the last sample of a group, so long after the grant."""
        self.latencies.append(latency_s)
        self.latency_s = sorted(self.latencies)[len(self.latencies) // 2]

    def waits_for(self, reason: Refusal, now: float) -> None:
        if reason is not self.waiting:
            self.waiting, self.waiting_since = reason, now

    @property
    def capacity(self) -> int:
        """Completions at a time."""
        return self.room + sum(lease.grant.samples - len(lease.results) for lease in self.running.values())

    @property
    def evaluates(self) -> bool:
        return any(lease.grant.kind is LeaseKind.EVALUATE for lease in self.running.values())

    @property
    def runs_alone(self) -> bool:
        return any(lease.grant.alone for lease in self.running.values())

    def describe(self, now: float) -> dict[str, Any]:
        return {
            "version": self.version,
            "room": self.room,
            "latency_s": self.latency_s,
            "waits": self.waiting.value,
            "waits_s": round(now - self.waiting_since, 1),
            "leases": [lease.describe(now) for lease in self.running.values()],
        }


class LeaseTable:
    """Who holds what, and until when."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self.generators: dict[str, Generator] = {}  # by session
        self.open: dict[int, OpenLease] = {}  # by attempt: leased or finished, not yet in a batch; what N counts
        self.aside: dict[int, OpenLease] = {}  # by attempt: remainders and evaluations, which N does not count
        self.num_open: Counter[int] = Counter()  # by deadline: groups in `open`
        self.num_finished: Counter[int] = Counter()  # by deadline: those of them that are complete
        self._num_leases = 0

    def new_attempt(self) -> int:
        self._num_leases += 1
        return self._num_leases

    def hand_out(self, grant: Grant, generator: Generator, now: float) -> Grant:
        lease = OpenLease(grant, generator.session, granted_at=now, expires_at=now + self.ttl_s)
        generator.running[grant.attempt] = lease
        if grant.kind is LeaseKind.EVALUATE:
            self.aside[grant.attempt] = lease
        else:
            self.open[grant.attempt] = lease
            self.num_open[grant.deadline] += 1
        generator.room = max(0, generator.room - grant.samples)
        generator.leased_at = now
        return grant

    def find(self, attempt: int) -> OpenLease | None:
        return self.open.get(attempt) or self.aside.get(attempt)

    def renew(self, lease: OpenLease, now: float) -> None:
        lease.expires_at = now + self.ttl_s
        if generator := self.generators.get(lease.holder):
            generator.heard_at = now

    def answered(self, lease: OpenLease, now: float) -> None:
        """All samples of a lease are in: its generator has room again."""
        if lease.grant.attempt in self.open:
            self.num_finished[lease.grant.deadline] += 1
        if generator := self.generators.get(lease.holder):
            del generator.running[lease.grant.attempt]
            generator.answers(now - lease.granted_at)

    def close(self, lease: OpenLease) -> None:
        """Forgets a lease: results that still come are late."""
        if lease.grant.attempt in self.open:
            self._leaves_open(lease)
        self.aside.pop(lease.grant.attempt, None)
        if generator := self.generators.get(lease.holder):
            generator.running.pop(lease.grant.attempt, None)

    def set_aside(self, lease: OpenLease) -> None:
        """What a split group handed over is in a batch; the samples that still run are a remainder."""
        self._leaves_open(lease)
        self.aside[lease.grant.attempt] = lease
        lease.handed_over = frozenset(lease.results)

    def _leaves_open(self, lease: OpenLease) -> None:
        del self.open[lease.grant.attempt]
        self.num_open -= Counter([lease.grant.deadline])
        if lease.complete:
            self.num_finished -= Counter([lease.grant.deadline])

    def silent(self, now: float) -> list[Generator]:
        return [generator for generator in self.generators.values() if generator.heard_at + self.ttl_s <= now]

    def expired(self, now: float) -> list[OpenLease]:
        running = [lease for generator in self.generators.values() for lease in generator.running.values()]
        return [lease for lease in running if lease.expires_at <= now]

    @property
    def remainders(self) -> list[OpenLease]:
        return [lease for lease in self.aside.values() if lease.handed_over]

    @property
    def evaluations(self) -> list[OpenLease]:
        return [lease for lease in self.aside.values() if lease.grant.kind is LeaseKind.EVALUATE]
