"""A cluster in simulated time around the real scheduler: generators, a learner, a network, and every kind of death.

Used by tests only. Events lie in a heap; nothing waits. What it asserts on the way is what the design promises: the
bound on staleness of every token, the bound on memory, and that every prompt influences the surviving weights at most
once.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from broker.batches import Batch, ScheduleSettings
from broker.leases import Grant, Refusal, Wait
from broker.ledger import Ledger, LedgerSnapshot
from broker.scheduler import Scheduler
from protocol.types import Completion, FinishReason, LeaseKind, Trajectory, VersionSpan

TOKENS = np.arange(2, dtype=np.int32)
LOGPROBS = np.full(2, -1.0, np.float32)


def answer(grant: Grant, sample: int, reward: float, newest_version: int | None = None, error: str = "") -> Trajectory:
    """A result of two tokens: the first of the lease's version, the second of `newest_version`."""
    if error:
        return Trajectory(grant.prompt, grant.attempt, sample, None, error=error)
    newest = grant.version if newest_version is None else newest_version
    mixed = (VersionSpan(grant.version, 0, 1), VersionSpan(newest, 1, 2))
    spans = mixed if newest != grant.version else (VersionSpan(newest, 0, 2),)
    completion = Completion(TOKENS, LOGPROBS, spans, FinishReason.STOP)
    return Trajectory(grant.prompt, grant.attempt, sample, completion, reward)


@dataclass(frozen=True)
class Load:
    """What a simulated cluster is like; times in seconds."""

    num_generators: int = 4
    groups_at_a_time: int = 4  # room of a generator
    step_s: float = 1.0
    apply_s: float = 0.05
    latency_s: tuple[float, float] = (0.2, 1.2)  # of one completion, uniform
    straggler_share: float = 0.05
    straggler_factor: float = 8.0
    slow_factors: tuple[float, ...] = ()  # of the first generators
    error_share: float = 0.0  # of completions
    equal_share: float = 0.0  # of groups whose rewards are equal
    poison: frozenset[int] = frozenset()  # prompts that kill whoever runs them
    crash_every_s: float = 0.0  # mean time between deaths of generators; 0: none
    lost_grant_share: float = 0.0  # of pulls whose answer is lost
    zombie_share: float = 0.0  # of crashed generators whose results still arrive, late
    broker_restart_every_s: float = 0.0
    learner_crash_every_s: float = 0.0
    faults_end_s: float = 60.0  # no more random deaths after that: then the run has to come to its end
    checkpoint_every: int = 3
    evaluate_every: int = 0
    num_evaluation_prompts: int = 6


@dataclass(eq=False)
class SimulatedGenerator:
    session: str
    slowness: float
    version: int = -1
    fetching: bool = False
    alive: bool = True
    held: dict[int, tuple[Grant, int]] = field(default_factory=dict)  # attempt -> (grant, samples to come)

    @property
    def evaluates(self) -> bool:
        return any(grant.kind is LeaseKind.EVALUATE for grant, _ in self.held.values())


@dataclass
class Checkpoint:
    version: int
    ledger: LedgerSnapshot
    trained: list[int]


class Cluster:
    """`run` plays until the run is done, and fails if a promise is broken or the end does not come."""

    def __init__(self, settings: ScheduleSettings, load: Load, seed: int) -> None:
        self.settings, self.load = settings, load
        self.random = random.Random(seed)
        self.now = 0.0
        self.scheduler = Scheduler(settings, Ledger())
        self.trained: list[int] = []  # prompts that the surviving weights have seen, without remainders
        self.staleness: list[int] = []  # of every trained token
        self.num_left_out = 0  # tokens of remainders beyond the bound
        self.evaluated: list[int] = []
        self.quarantined: set[int] = set()
        self.waited_s = 0.0  # by the learner, for trajectories
        self._idle_since = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._num_sessions = 0
        self._epoch = 0
        self._learner_life = 0
        self._at_cut = self.scheduler.ledger.snapshot()
        self._checkpoint = Checkpoint(0, self._at_cut, [])
        self._wants_evaluation = False
        self._generators: list[SimulatedGenerator] = []
        for index in range(load.num_generators):
            self._start_generator(load.slow_factors[index] if index < len(load.slow_factors) else 1.0)
        self._now_and_then(load.crash_every_s, self._crash_a_generator)
        self._now_and_then(load.broker_restart_every_s, self._restart_broker)
        self._now_and_then(load.learner_crash_every_s, self._crash_learner)
        self._heartbeats()

    def run(self, limit_s: float = 10_000) -> Cluster:
        self._settle_down()
        while not (self.scheduler.done or self.scheduler.verdict):
            self.now, _, event = heapq.heappop(self._events)
            assert self.now < limit_s, f"not done after {limit_s} s: {self.scheduler.describe(self.now)}"
            event()
            self._settle_down()
        ledger = self.scheduler.ledger
        ledger.check()
        assert ledger.trained == len(self.trained), (
            f"{ledger.trained} prompts count as trained, {len(self.trained)} were"
        )
        if self.scheduler.done and self.scheduler.num_steps_left:
            assert ledger.num_settled == self.settings.num_prompts, f"the stream ended with {ledger.counts()}"
        return self

    # --- The learner and the broker -----------------------------------------------------------------------------------

    def _settle_down(self) -> None:
        """What the server does after every event: answer those who wait, cut what is ready, start evaluations."""
        scheduler = self.scheduler
        for generator in self._generators:
            self._pull(generator)
        if scheduler.ready:
            self._train(scheduler.take(self.now))
        if result := scheduler.take_evaluation():
            spans = [span for answer in result.trajectories if answer.completion for span in answer.completion.spans]
            assert {span.version for span in spans} <= {result.version}, f"evaluation {result.version}: {spans}"
            self.evaluated.append(result.version)
        is_last_due = scheduler.trained_out and scheduler.evaluated_version != scheduler.version
        if self.load.evaluate_every and scheduler.evaluation is None and (self._wants_evaluation or is_last_due):
            self._wants_evaluation = False
            scheduler.evaluate(range(self.load.num_evaluation_prompts))
        self.quarantined |= {prompt for prompt, _ in scheduler.quarantined}
        scheduler.quarantined.clear()
        bound = (self.settings.max_staleness + 1) * self.settings.prompts_per_step
        assert len(scheduler.leases.open) <= bound, f"{len(scheduler.leases.open)} groups are open, {bound} are allowed"

    def _train(self, batch: Batch) -> None:
        for group in batch.groups:
            if not group.remainder:
                assert group.prompt not in self.trained, f"prompt {group.prompt} is trained twice"
                self.trained.append(group.prompt)
            completions = [answer.completion for answer in group.trajectories if answer.completion]
            for span in (span for completion in completions for span in completion.spans):
                staleness = batch.step - span.version
                if staleness > self.settings.max_staleness:
                    assert group.remainder, f"step {batch.step} trains {span} of prompt {group.prompt}"
                    self.num_left_out += span.end - span.start
                else:
                    self.staleness += [staleness] * (span.end - span.start)
        self.waited_s += self.now - self._idle_since
        self._at_cut = self.scheduler.ledger.snapshot()
        self._after(self.load.step_s, self._advance, self._learner_life)

    def _advance(self, learner_life: int) -> None:
        if learner_life != self._learner_life:
            return
        version = self.scheduler.version + 1
        self.scheduler.advanced(version, self.now)
        self._idle_since = self.now
        if version % self.load.checkpoint_every == 0:
            self._checkpoint = Checkpoint(version, self._at_cut, list(self.trained))
        if self.load.evaluate_every and version % self.load.evaluate_every == 0:
            self._wants_evaluation = True

    def _restart_broker(self) -> None:
        old = self.scheduler
        self._restore(self._at_cut, old.version, old.training)

    def _crash_learner(self) -> None:
        self._learner_life += 1
        self.trained = list(self._checkpoint.trained)
        self._at_cut = self._checkpoint.ledger
        self._idle_since = self.now
        self._restore(self._checkpoint.ledger, self._checkpoint.version, None)

    def _restore(self, ledger: LedgerSnapshot, version: int, training: int | None) -> None:
        self._epoch += 1
        self.scheduler = Scheduler(self.settings, Ledger.restore(ledger), version, training)
        self._wants_evaluation = False
        for generator in self._generators:
            generator.held.clear()
            generator.version = min(generator.version, version)  # another history's version is fetched again
            generator.fetching = False

    # --- Generators ---------------------------------------------------------------------------------------------------

    def _start_generator(self, slowness: float) -> None:
        self._num_sessions += 1
        self._generators.append(SimulatedGenerator(f"generator-{self._num_sessions}", slowness))

    def _pull(self, generator: SimulatedGenerator) -> None:
        newest = self.scheduler.version
        if generator.version < newest and not generator.fetching and not generator.evaluates:
            generator.fetching = True
            self._after(self.load.apply_s, self._apply, generator, self._epoch)
        room = self.load.groups_at_a_time * self.settings.group_size - sum(left for _, left in generator.held.values())
        newer_available = generator.version < newest
        answer = self.scheduler.pull(generator.session, generator.version, room, self.now, newer_available)
        if isinstance(answer, Wait):
            assert answer.reason is not Refusal.UNKNOWN_VERSION, f"{generator} is ahead of version {newest}"
        elif self.random.random() >= self.load.lost_grant_share:
            for grant in answer:
                self._generate(generator, grant)

    def _apply(self, generator: SimulatedGenerator, epoch: int) -> None:
        if epoch != self._epoch:
            return
        generator.fetching = False
        if not generator.evaluates:
            generator.version = self.scheduler.version

    def _generate(self, generator: SimulatedGenerator, grant: Grant) -> None:
        generator.held[grant.attempt] = grant, grant.samples
        if grant.kind is LeaseKind.TRAIN and grant.prompt in self.load.poison:
            self._after(0.1, self._crash, generator)
        has_equal_rewards = self.random.random() < self.load.equal_share
        for sample in range(grant.samples):
            latency_s = self.random.uniform(*self.load.latency_s) * generator.slowness
            if self.random.random() < self.load.straggler_share:
                latency_s *= self.load.straggler_factor
            reward = 1.0 if has_equal_rewards else float(sample)
            self._after(latency_s, self._finish, generator, grant, sample, reward, self._epoch)

    def _finish(self, generator: SimulatedGenerator, grant: Grant, sample: int, reward: float, epoch: int) -> None:
        if epoch != self._epoch or not (generator.alive or self.random.random() < self.load.zombie_share):
            return
        error = "no answer" if self.random.random() < self.load.error_share else ""
        self.scheduler.finished(answer(grant, sample, reward, generator.version, error), self.now)
        _, num_left = generator.held[grant.attempt]
        generator.held[grant.attempt] = grant, num_left - 1
        if num_left == 1:
            del generator.held[grant.attempt]

    def _heartbeats(self) -> None:
        for generator in self._generators:
            for attempt in list(generator.held):
                self.scheduler.renew(attempt, 0, self.now)
        self.scheduler.expire(self.now)
        self._after(self.settings.lease_ttl_s / 3, self._heartbeats)

    def _crash_a_generator(self) -> None:
        self._crash(self.random.choice(self._generators))

    def _crash(self, generator: SimulatedGenerator) -> None:
        """Half of the deaths are seen at once, the others when leases expire; another generator takes its place."""
        if generator.alive:
            generator.alive = False
            self._generators.remove(generator)
            if self.random.random() < 0.5:
                self.scheduler.holder_lost(generator.session, crashed=True)
            self._start_generator(generator.slowness)

    # --- Time ---------------------------------------------------------------------------------------------------------

    def _after(self, delay_s: float, event: Callable[..., None], *arguments: object) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (self.now + delay_s, self._num_events, lambda: event(*arguments)))

    def _now_and_then(self, mean_s: float, event: Callable[[], None]) -> None:
        if mean_s:
            self._after(self.random.expovariate(1 / mean_s), self._repeat, mean_s, event)

    def _repeat(self, mean_s: float, event: Callable[[], None]) -> None:
        if self.now < self.load.faults_end_s:
            event()
            self._now_and_then(mean_s, event)
