"""A cluster in simulated time around the real scheduler: generators, a learner, a broker, and every kind of death.

Used by tests and benches only. The processes are in `generator.py`, `learner.py` and
`broker.py`, what befalls them in `faults.py`, and what every event is held to in `promises.py`.
Here: that an honest generator's work is never refused, that the run goes on, and how it must end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from broker.batches import ScheduleSettings
from broker.leases import Grant
from broker.outlook import describe
from broker.scheduler import Scheduler
from protocol.messages import Status
from protocol.types import Trajectory
from tests.simulation.broker import SimulatedBroker
from tests.simulation.faults import Faults
from tests.simulation.generator import Running, SimulatedGenerator
from tests.simulation.learner import WAITING, Learned, SimulatedLearner
from tests.simulation.promises import WatchedScheduler
from tests.simulation.seen import Seen
from tests.simulation.world import Load, World

KEPT_CHECKPOINTS = 2


class Cluster:
    """`run` plays until the run is done, and fails if a promise is broken or the end does not come."""

    def __init__(
        self,
        settings: ScheduleSettings,
        load: Load,
        seed: int,
        new_broker: Callable[[World], Any] = SimulatedBroker,
    ) -> None:
        self.settings, self.load = settings, load
        self.world = World(settings, load, seed)
        self._new_broker = new_broker
        self.broker: SimulatedBroker = new_broker(self.world)
        self.waited_s = 0.0  # by learners, for trajectories
        self.sessions: dict[int, SimulatedGenerator] = {}
        self.lost_attempts: set[tuple[int, int]] = set()  # (epoch, attempt) of leases that nobody got
        self._hinted: tuple[int, int] | None = None
        self._checkpoints: list[Learned] = []  # oldest first
        self.generators: list[SimulatedGenerator] = []
        self.learners: list[SimulatedLearner] = []  # the one that runs, and others that do not know it yet
        self._num_restarting = 1
        self._resume(Learned())
        for index in range(load.num_generators):
            slowness = load.slow_factors[index] if index < len(load.slow_factors) else 1.0
            self.generators.append(SimulatedGenerator(self, f"generator-{index}", slowness))
        self.faults = Faults(self)
        self._heartbeats()

    # --- What tests read

    @property
    def now(self) -> float:
        return self.world.now

    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    @property
    def learner(self) -> SimulatedLearner:
        """The one that saw the end, or the newest that lives."""
        return max(reversed(self.learners), key=lambda one: (bool(one.ended), one.alive))

    @property
    def trained(self) -> list[int]:
        """Prompts that the surviving weights have seen, without remainders."""
        return list(self.learner.learned.trained)

    @property
    def staleness(self) -> list[int]:
        """Of every token that was trained."""
        return self.world.record.staleness

    @property
    def num_left_out(self) -> int:
        """Tokens of remainders beyond the bound."""
        return self.world.record.num_left_out

    @property
    def evaluated(self) -> list[int]:
        """Versions, in the order of their results."""
        return self.world.record.evaluated

    @property
    def quarantined(self) -> frozenset[int]:
        return self._scheduler.books.quarantined

    @property
    def _scheduler(self) -> WatchedScheduler:
        assert self.broker.scheduler is not None, "no learner has said hello yet"
        return self.broker.scheduler

    # --- The run

    def run(self, limit_s: float = 10_000) -> Cluster:
        world, load = self.world, self.load
        patience_s = load.longest_s + 4 * self.settings.lease_ttl_s + load.step_s + load.publish_s + load.share_s
        self._note_the_schedule()
        self._settle()
        while not self.learner.ended:
            world.play_next()
            assert world.now < limit_s, f"not done after {limit_s} s: {self._describe()}"
            idle_s = world.now - world.progress_at
            assert idle_s < patience_s, f"no progress for {idle_s:.1f} s: {self._describe()}"
            self._settle()
        self._check_the_end()
        return self

    def _note_the_schedule(self) -> None:
        settings, load, seen = self.settings, self.load, self.world.seen
        seen[Seen.SYNCHRONOUS] += settings.max_staleness == 0
        seen[Seen.ONE_PROMPT] += settings.prompts_per_step == 1
        seen[Seen.ONE_SAMPLE] += settings.group_size == 1
        seen[Seen.ONE_STEP] += settings.steps == 1
        seen[Seen.ONE_GENERATOR] += load.num_generators == 1
        seen[Seen.SLOW_GENERATOR] += bool(load.slow_factors)
        seen[Seen.CALM] += load.calm

    def _settle(self) -> None:
        """What the server does after every event: hints go out, and who waits is answered."""
        while self.broker.changed and not self.learner.ended:
            self.broker.changed = False
            self._tick()
            if self.broker.announced != self._hinted and (newest := self.broker.announced):
                self._hinted = newest
                for generator in self.generators:
                    if not generator.is_silent:
                        generator.learn(newest)
            for generator in self.generators:
                generator.play()
            for learner in self.learners:
                learner.play()
            self._see_to_the_learners()

    def _see_to_the_learners(self) -> None:
        """A supervisor starts another when the last one was refused; and without faults nothing waits in vain."""
        if not self._num_restarting and not any(learner.alive for learner in self.learners):
            self.restart_learner()
        if self.load.calm and self.learner.doing is WAITING and not self.learner.ended:
            busy = any(generator.running or generator.fetching for generator in self.generators)
            assert busy or self.broker.changed, f"everybody waits: {self._describe()}"

    def _describe(self) -> dict[str, Any]:
        return describe(self.broker.scheduler, self.now) if self.broker.scheduler else {}

    def _check_the_end(self) -> None:
        scheduler, learned, seen = self._scheduler, self.learner.learned, self.world.seen
        books = scheduler.books
        assert sorted(learned.trained) == sorted(books.trained), f"trained: {sorted(learned.trained)}, {books}"
        assert learned.version == scheduler.version, f"version {learned.version} is {scheduler.version} to the broker"
        if scheduler.verdict:
            kinds = {"no signal": Seen.NO_SIGNAL, "no usable": Seen.NO_USABLE_PROMPT}
            seen[kinds.get(scheduler.verdict[:9], Seen.TOO_MANY_QUARANTINED)] += 1
            return
        assert scheduler.done, f"{self.learner.ended}: {self._describe()}"
        left = [*scheduler.leases.open.values(), *scheduler.leases.remainders]
        assert not left, f"groups are left: {left}"
        if self.settings.evaluate_at_end:
            assert self.evaluated[-1] == learned.version, f"evaluated: {self.evaluated}, trained: {learned.version}"
        if scheduler.num_steps_left:
            seen[Seen.END_OF_DATA] += 1
            missing = set(range(self.settings.num_prompts or 0)) ^ books.settled
            assert not missing, f"the stream ended, prompts {sorted(missing)} are not accounted for"
        else:
            seen[Seen.END_OF_STEPS] += 1
            assert learned.version == self.settings.steps

    # --- What generators are told

    def judge(
        self, generator: SimulatedGenerator, running: Running, result: Trajectory, status: Status, again: bool
    ) -> None:
        """The verdict on a living generator's result; it is refused only for a reason that we know."""
        epoch, attempt = running.epoch, running.grant.attempt
        if status is Status.ACCEPTED:
            self.world.progressed()
        elif status is Status.STALE_EPOCH:
            assert epoch != self.broker.epoch, f"{generator.name}: {result} is of this epoch"
        else:
            is_known = again or attempt in self._scheduler.taken_back
            assert is_known, f"{generator.name}: {result} is {status}"
            assert status in (Status.DUPLICATE, Status.LATE), f"{generator.name}: {result} is {status}"
        self.world.seen[Seen[status.name]] += 1

    def expect_revoked(self, grant: Grant) -> None:
        """A lease ends early only where we know why."""
        known = self._scheduler.taken_back | self._scheduler.answered
        assert grant.attempt in known, f"{grant} was revoked, and nobody took it back"

    # --- Time goes by, and who died is replaced

    def _heartbeats(self) -> None:
        for process in (*self.generators, *self.learners):
            process.beat()
        self.broker.changed = True  # who waited long is answered again
        self.world.after(self.settings.lease_ttl_s / 3, self._heartbeats)

    def _tick(self) -> None:
        """Only the leases and the sessions of those who are dead or cut off end, and leases that nobody got."""
        leases, sessions = self.broker.tick() if self.broker.is_up else ([], [])
        for lease in leases:
            holder = self.sessions[int(lease.holder, 16)]
            unknown = (self.broker.epoch, lease.grant.attempt) in self.lost_attempts
            assert unknown or holder.is_silent or not holder.alive, f"{holder.name} lost {lease.grant}"
        for session in sessions:
            holder = self.sessions[session]
            assert holder.is_silent or not holder.alive, f"{holder.name} was given up"
            self.world.seen[Seen.CRASH_EXPIRED] += not holder.alive

    def replace(self, generator: SimulatedGenerator, name: str) -> None:
        self.generators.remove(generator)
        delay_s = self.world.up_to(self.load.restart_s)
        self.world.progressed(delay_s + 2 * self.settings.lease_ttl_s)
        if delay_s:
            self.world.after(delay_s, self._join, name, generator.slowness)
        else:
            self._join(name, generator.slowness)

    def _join(self, name: str, slowness: float) -> None:
        self.world.seen[Seen.JOINED] += 1
        self.generators.append(SimulatedGenerator(self, name, slowness))
        self.broker.changed = True

    def replace_broker(self) -> None:
        """Another one takes its place, which knows nothing."""
        down_s = self.world.up_to(self.load.broker_down_s)
        self.world.progressed(down_s + self.settings.lease_ttl_s)
        self.broker = self._new_broker(self.world)
        if down_s:
            self.broker.is_up = False
            self.world.after(down_s, self._start_broker, self.broker)

    def _start_broker(self, broker: SimulatedBroker) -> None:
        broker.is_up = broker.changed = True

    def checkpoint(self, learned: Learned) -> None:
        """Later ones belong to a course that was left."""
        earlier = [one for one in self._checkpoints if one.version < learned.version]
        self._checkpoints = [*earlier, learned][-KEPT_CHECKPOINTS:]

    def restart_learner(self) -> None:
        """From the newest checkpoint that is whole, or from the beginning."""
        delay_s = self.world.up_to(self.load.restart_s)
        self.world.progressed(delay_s + self.settings.lease_ttl_s)
        if len(self._checkpoints) > 1 and self.world.chance(self.load.older_checkpoint_share):
            self._checkpoints.pop()
            self.world.seen[Seen.RESUMED_OLDER] += 1
        found = self._checkpoints[-1] if self._checkpoints else Learned()
        self.world.seen[Seen.RESUMED_NEWEST if self._checkpoints else Seen.RESUMED_FROM_START] += 1
        self._num_restarting += 1
        self.world.after(delay_s, self._resume, found)
        if self.world.chance(self.load.second_resume_share):
            self._num_restarting += 1
            self.world.seen[Seen.RESUMED_TWICE] += 1
            self.world.after(delay_s + self.world.up_to(3 * self.load.step_s), self._resume, found)

    def _resume(self, learned: Learned) -> None:
        self._num_restarting -= 1
        self.learners = [*(one for one in self.learners if one.alive), SimulatedLearner(self, learned)]
        self.broker.changed = True
