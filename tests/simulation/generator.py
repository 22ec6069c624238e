"""A generator of a simulated cluster: leases in, results out, weights swapped; honest, slow, cut off, or dead.

Used by simulations only. A token is the number of the weights that sampled it, so that a learner can tell whether
they were its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from broker.leases import Grant
from protocol.messages import Role, Status
from protocol.types import Completion, FinishReason, LeaseKind, Trajectory, VersionSpan
from tests.simulation.broker import Refused, SimulatedBroker
from tests.simulation.seen import Seen
from tests.simulation.world import TAIL_LIMIT

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

LOGPROBS = np.full(2, -1.0, np.float32)
TAIL = 10.0  # a completion that takes so many times its usual time is counted
RETRY_S = 0.5


def answer(
    grant: Grant,
    sample: int,
    reward: float,
    newest_version: int | None = None,
    error: str = "",
    weights: tuple[int, int] = (0, 0),
) -> Trajectory:
    """A result of two tokens: the first of the lease's version, the second of `newest_version`."""
    if error:
        return Trajectory(grant.prompt, grant.attempt, sample, None, error=error)
    newest = grant.version if newest_version is None else newest_version
    mixed = (VersionSpan(grant.version, 0, 1), VersionSpan(newest, 1, 2))
    spans = mixed if newest != grant.version else (VersionSpan(newest, 0, 2),)
    completion = Completion(np.array(weights, np.int32), LOGPROBS, spans, FinishReason.STOP)
    return Trajectory(grant.prompt, grant.attempt, sample, completion, reward)


@dataclass(eq=False, slots=True)
class Running:
    """A lease that a generator works on."""

    grant: Grant
    epoch: int
    weights: int  # that sample its first tokens
    num_left: int  # samples without a verdict


class SimulatedGenerator:
    """One process. `play` is its chance to do what it waits for."""

    def __init__(self, cluster: Cluster, name: str, slowness: float) -> None:
        self.name, self.slowness = name, slowness
        self.alive = True
        self.held = (-1, 0)  # (version, weights)
        self.running: dict[int, Running] = {}  # by attempt
        self.fetching = False
        self._cluster, self._world = cluster, cluster.world
        self._incarnation = self._world.number()
        self._session, self._epoch = 0, 0
        self._newest = self.held
        self._silent_until = self._lags_until = 0.0
        self._given_up = False  # while it was silent

    @property
    def evaluates(self) -> bool:
        return any(one.grant.kind is LeaseKind.EVALUATE for one in self.running.values())

    @property
    def is_silent(self) -> bool:
        return self._world.now < self._silent_until

    @property
    def _broker(self) -> SimulatedBroker:
        return self._cluster.broker

    @property
    def _reaches_broker(self) -> bool:
        return self.alive and self._broker.is_up and not self.is_silent

    # --- Leases

    def play(self) -> None:
        """Asks for leases if it has weights and room."""
        world, broker = self._world, self._broker
        if not self._reaches_broker:
            return
        if self.held[0] < 0 and not broker.knows(self._session, self._epoch):
            self._greet()
        self.learn(self._newest)
        busy = sum(one.num_left for one in self.running.values())
        room = world.load.groups_at_a_time * world.settings.group_size - busy
        if self.held[0] < 0 or (self.running and room < world.settings.group_size):
            return
        try:
            given = broker.pull(self._session, self._epoch, self.held, room)
        except Refused:
            self._greet()
            given = broker.pull(self._session, self._epoch, self.held, room)
        if given is not None:
            self._start(given)
        elif broker.announced is not None:
            self.learn(broker.announced)

    def _start(self, grants: list[Grant]) -> None:
        world = self._world
        if world.chance(world.load.lost_grant_share):
            lost_for_good = world.chance(0.5)
            world.seen[Seen.GRANTS_LOST if lost_for_good else Seen.GRANTS_UNDELIVERED] += 1
            world.progressed(2 * world.settings.lease_ttl_s)
            if not lost_for_good:
                self._broker.undelivered(grants)
            self._cluster.lost_attempts.update((self._epoch, grant.attempt) for grant in grants)
            return
        for grant in grants:
            running = Running(grant, self._epoch, self.held[1], grant.samples)
            self.running[grant.attempt] = running
            if grant.kind is LeaseKind.TRAIN and grant.prompt in world.load.poison:
                world.after(0.1, self._die_of, running)
            for share, give_up in ((world.load.failed_lease_share, True), (world.load.released_lease_share, False)):
                if world.chance(share):
                    world.after(world.up_to(world.load.latency_s[1]), self._give_up, running, give_up)
            self._generate(running)

    def _generate(self, running: Running) -> None:
        world, load = self._world, self._world.load
        has_equal_rewards = world.chance(load.equal_share)
        for sample in range(running.grant.samples):
            factor = self.slowness
            if world.chance(load.straggler_share):
                factor *= load.straggler_factor
            if load.tail_shape:
                tail = min(TAIL_LIMIT, world.random.paretovariate(load.tail_shape))
                world.seen[Seen.HEAVY_TAIL] += tail >= TAIL
                factor *= tail
            latency_s = world.random.uniform(*load.latency_s) * factor
            world.after(latency_s, self._finish, running, sample, 1.0 if has_equal_rewards else float(sample))

    def _finish(self, running: Running, sample: int, reward: float) -> None:
        world, grant = self._world, running.grant
        is_zombie = not self.alive and world.chance(world.load.zombie_share)
        if not is_zombie and self.running.get(grant.attempt) is not running:
            return  # it died, or the lease was revoked or is void: its tasks are cancelled
        error = "no answer" if world.chance(world.load.error_share) else ""
        version, weights = (grant.version, running.weights) if grant.kind is LeaseKind.EVALUATE else self.held
        world.seen[Seen.SAMPLE_FAILED] += bool(error)
        result = answer(grant, sample, reward, version, error, (running.weights, weights))
        delay_s = 0.0
        if world.chance(world.load.delayed_share):
            delay_s = world.up_to(world.settings.lease_ttl_s)
            world.seen[Seen.RESULT_DELAYED] += 1
        if delay_s:
            world.after(delay_s, self._deliver, running, result, False)
        else:
            self._deliver(running, result, again=False)

    def _deliver(self, running: Running, result: Trajectory, again: bool) -> None:
        """Sends a result, until it has a verdict. `again`: it had one, which was lost."""
        world, broker = self._world, self._broker
        if not self.alive:
            self._deliver_from_the_dead(running, result)
            return
        if not self._reaches_broker:
            world.after(max(RETRY_S, self._silent_until - world.now), self._deliver, running, result, again)
            return
        try:
            status = broker.result(self._session, self._epoch, running.epoch, result)
        except Refused:
            self._greet()
            status = broker.result(self._session, self._epoch, running.epoch, result)
        self._cluster.judge(self, running, result, status, again)
        if world.chance(world.load.repeated_share):
            world.seen[Seen.RESULT_REPEATED] += 1
            world.after(world.up_to(RETRY_S), self._deliver, running, result, True)
        elif self.running.get(running.grant.attempt) is running:
            running.num_left -= 1
            if not running.num_left:
                del self.running[running.grant.attempt]
            self.play()

    def _deliver_from_the_dead(self, running: Running, result: Trajectory) -> None:
        """What a dead process had sent already: it cannot say hello again."""
        if self._broker.is_up:
            try:
                status = self._broker.result(self._session, running.epoch, running.epoch, result)
            except Refused:
                status = Status.LATE
            self._world.seen[Seen.ZOMBIE_ACCEPTED if status is Status.ACCEPTED else Seen.ZOMBIE_REFUSED] += 1
            assert status in (Status.ACCEPTED, Status.DUPLICATE, Status.LATE), f"{status} for a dead generator"

    def _give_up(self, running: Running, failed: bool) -> None:
        if self.alive and self.running.get(running.grant.attempt) is running and self._reaches_broker:
            self._world.seen[Seen.LEASE_FAILED if failed else Seen.LEASE_RELEASED] += 1
            del self.running[running.grant.attempt]
            try:
                self._broker.release(self._session, self._epoch, running.grant, failed)
            except Refused:
                self._greet()

    # --- Weights

    def learn(self, newest: tuple[int, int]) -> None:
        """Hears of the newest version and fetches it, unless leases need the one that is held."""
        self._newest, broker = newest, self._broker
        lags = self._world.now < self._lags_until and self.held[0] >= 0
        if newest == self.held or self.fetching or lags or not self._reaches_broker:
            return
        weights = broker.weights_of(newest[0]) if self._epoch == broker.epoch else None
        if weights is not None and self._may_apply(newest[0], self._epoch):
            self.fetching = True
            self._world.after(self._world.load.apply_s, self._apply, (newest[0], weights), self._epoch)

    def _apply(self, fetched: tuple[int, int], epoch: int) -> None:
        self.fetching = False
        if self.alive and self._may_apply(fetched[0], epoch):
            self.held = fetched
            self._broker.changed = True
            self.learn(self._newest)

    def _may_apply(self, version: int, epoch: int) -> bool:
        """Not weights of another history: its numbers may be ours some day. And no token is older than its lease."""
        fits = all(one.grant.version <= version for one in self.running.values())
        return epoch == self._epoch and fits and not self.evaluates

    def lag(self, for_s: float) -> None:
        self._lags_until = self._world.now + for_s

    # --- The broker

    def beat(self) -> None:
        broker = self._broker
        if not self._reaches_broker:
            return
        grants = [one.grant for one in self.running.values()]
        try:
            revoked = broker.beat(self._session, self._epoch, grants)
        except Refused:
            self._greet()
            revoked = broker.beat(self._session, self._epoch, [one.grant for one in self.running.values()])
        for grant in revoked:
            self._world.seen[Seen.LEASE_REVOKED] += 1
            self._cluster.expect_revoked(grant)
            del self.running[grant.attempt]
        if broker.announced is not None:
            self.learn(broker.announced)

    def _greet(self) -> None:
        """Introduces itself; everything that an earlier epoch gave is void."""
        session, epoch = self._broker.hello(Role.GENERATOR, self.name, self._incarnation)
        if self._given_up and epoch == self._epoch:
            self._world.seen[Seen.SILENCE_OUTLIVED] += 1
        self._given_up = False
        if epoch != self._epoch:
            self.running.clear()
            self._newest = self.held
        self._cluster.sessions[session] = self
        self._session, self._epoch = session, epoch
        if self._broker.announced is not None:
            self.learn(self._broker.announced)

    def fall_silent(self, for_s: float) -> None:
        self._silent_until = self._world.now + for_s
        self._given_up = for_s > self._world.settings.lease_ttl_s
        self._world.after(for_s, self.beat)

    # --- Its end

    def _die_of(self, running: Running) -> None:
        if self.alive and self.running.get(running.grant.attempt) is running:
            self._world.seen[Seen.CRASH_OF_POISON] += 1
            self._cluster.faults.crash(self)

    def leave(self) -> None:
        """In order: what it runs is handed back."""
        self.alive = False
        self.running.clear()
        if self._broker.is_up and not self.is_silent:
            try:
                self._broker.bye(self._session, self._epoch)
            except Refused:
                return

    def die(self) -> None:
        self.alive = False
        self.running.clear()
