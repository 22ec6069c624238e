"""What the processes of a simulated cluster share: the clock, chance, the load, and what was seen.

Used by simulations only. Events lie in a heap and nothing waits; everything random comes from one generator, so a
seed is a run.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

from broker.batches import ScheduleSettings
from tests.simulation.books import Record

TAIL_LIMIT = 20.0  # of the heavy tail's factor


@dataclass(frozen=True)
class Load:
    """What a simulated cluster is like; times in seconds, shares 0 to 1, and a mean time of 0 for "never"."""

    num_generators: int = 4
    groups_at_a_time: int = 4  # room of a generator
    step_s: float = 1.0
    apply_s: float = 0.05
    publish_s: float = 0.0  # from the end of a step to its announcement
    share_s: float = 0.0  # from the cut of a batch to its arrival
    latency_s: tuple[float, float] = (0.2, 1.2)  # of one completion, uniform
    straggler_share: float = 0.05
    straggler_factor: float = 8.0
    tail_shape: float = 0.0  # every latency is multiplied by a Pareto variable of this shape; 0: by 1
    slow_factors: tuple[float, ...] = ()  # of the first generators
    error_share: float = 0.0  # of completions
    equal_share: float = 0.0  # of groups whose rewards are equal
    unusable_every: int = 0  # every so many prompts one is too long; 0: none
    poison: frozenset[int] = frozenset()  # prompts that kill whoever runs them
    crash_every_s: float = 0.0  # of some generator
    host_crash_every_s: float = 0.0  # of all generators
    leave_every_s: float = 0.0  # a generator leaves in order, and another joins
    silence_every_s: float = 0.0  # a generator is cut off for up to 2.5 times to live
    lag_every_s: float = 0.0  # a generator applies nothing new for a while
    restart_s: float = 0.0  # until another generator takes a dead one's place: at most
    lost_grant_share: float = 0.0  # of pulls whose answer is lost
    failed_lease_share: float = 0.0  # of leases that a generator gives up
    released_lease_share: float = 0.0  # of leases that a generator hands back
    delayed_share: float = 0.0  # of results that arrive late
    repeated_share: float = 0.0  # of results whose verdict is lost
    zombie_share: float = 0.0  # of a crashed generator's results: they still arrive
    broker_restart_every_s: float = 0.0
    broker_dies_share: float = 0.0  # of the moments after a cut, before and after an advance
    broker_down_s: float = 0.0  # at most
    learner_crash_every_s: float = 0.0
    second_resume_share: float = 0.0  # of resumes after which another learner resumes the same checkpoint
    older_checkpoint_share: float = 0.0  # of resumes that find the newest checkpoint damaged
    skipped_share: float = 0.0  # of steps that are not finite
    faults_end_s: float = 60.0  # no more random deaths after that: then the run has to come to its end
    checkpoint_every: int = 3
    evaluate_every: int = 0
    num_evaluation_prompts: int = 6

    @property
    def calm(self) -> bool:
        """Nothing ever fails or lags."""
        return not any(getattr(self, name) for name in FAULTS)

    @property
    def longest_s(self) -> float:
        """No completion takes longer."""
        straggling = self.straggler_factor if self.straggler_share else 1.0
        tail = TAIL_LIMIT if self.tail_shape else 1.0
        return self.latency_s[1] * max((1.0, *self.slow_factors)) * straggling * tail


FAULTS = (
    "error_share",
    "poison",
    "crash_every_s",
    "host_crash_every_s",
    "leave_every_s",
    "silence_every_s",
    "lag_every_s",
    "lost_grant_share",
    "failed_lease_share",
    "released_lease_share",
    "delayed_share",
    "repeated_share",
    "broker_restart_every_s",
    "broker_dies_share",
    "learner_crash_every_s",
    "skipped_share",
)
"""Fields of a load without which nothing ever goes wrong."""


class World:
    """Time goes on with `play_next`; a process asks for things to happen `after` a while."""

    def __init__(self, settings: ScheduleSettings, load: Load, seed: int) -> None:
        self.settings, self.load = settings, load
        self.random = random.Random(seed)
        self.now = 0.0
        self.record = Record()
        self.seen = self.record.seen
        self.progress_at = 0.0  # when a run last came nearer to its end, or was last disturbed
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._last_number = 0

    def number(self) -> int:
        """One that nobody else has."""
        self._last_number += 1
        return self._last_number

    def chance(self, share: float) -> bool:
        return share > 0.0 and self.random.random() < share

    def up_to(self, limit_s: float) -> float:
        return self.random.uniform(0.0, limit_s) if limit_s else 0.0

    def after(self, delay_s: float, event: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._events, (self.now + delay_s, self.number(), event, arguments))

    def every(self, mean_s: float, event: Callable[[], None]) -> None:
        """`event` happens now and then, until faults end."""
        if mean_s:
            self.after(self.random.expovariate(1 / mean_s), self._repeat, mean_s, event)

    def _repeat(self, mean_s: float, event: Callable[[], None]) -> None:
        if self.faulty:
            event()
            self.every(mean_s, event)

    @property
    def faulty(self) -> bool:
        return self.now < self.load.faults_end_s

    def progressed(self, until_s: float = 0.0) -> None:
        """The run came nearer to its end, or something keeps it from that for so long."""
        self.progress_at = max(self.progress_at, self.now + until_s)

    def play_next(self) -> None:
        self.now, _, event, arguments = heapq.heappop(self._events)
        event(*arguments)
