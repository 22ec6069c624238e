"""What befalls the processes of a simulated cluster: deaths, silence, lagging, each at random times of its load.

Used by simulations only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulation.generator import SimulatedGenerator
from tests.simulation.learner import TRAINING, WAITING
from tests.simulation.seen import Seen

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

LONGEST_SILENCE = 2.5  # times the leases' time to live
LONGEST_LAG = 5.0  # steps


class Faults:
    """Happen until the load says that they end."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._world = cluster, cluster.world
        world, load = cluster.world, cluster.load
        world.every(load.crash_every_s, self._crash_one)
        world.every(load.host_crash_every_s, self._crash_host)
        world.every(load.leave_every_s, self._leave)
        world.every(load.silence_every_s, self._cut_off)
        world.every(load.lag_every_s, self._let_lag)
        world.every(load.broker_restart_every_s, self._crash_broker)
        world.every(load.learner_crash_every_s, self._crash_learner)

    # --- Generators

    def crash(self, generator: SimulatedGenerator) -> None:
        """Half of the deaths are seen when a successor takes the name, the others when sessions and leases expire."""
        generator.die()
        seen_at_once = self._world.chance(0.5)
        self._world.seen[Seen.CRASH_SEEN_AT_ONCE] += seen_at_once
        self._cluster.replace(generator, generator.name if seen_at_once else self._new_name())

    def _crash_one(self) -> None:
        if (generator := self._any_generator()) is not None:
            self.crash(generator)

    def _crash_host(self) -> None:
        self._world.seen[Seen.HOST_CRASH] += 1
        for generator in list(self._cluster.generators):
            self.crash(generator)

    def _leave(self) -> None:
        if (generator := self._any_generator()) is not None:
            self._world.seen[Seen.LEFT] += 1
            generator.leave()
            self._cluster.replace(generator, self._new_name())

    def _cut_off(self) -> None:
        if (generator := self._any_generator()) is not None:
            self._world.seen[Seen.SILENCE] += 1
            ttl_s = self._cluster.settings.lease_ttl_s
            for_s = self._world.up_to(LONGEST_SILENCE * ttl_s)
            generator.fall_silent(for_s)
            self._world.progressed(for_s + 2 * ttl_s)

    def _let_lag(self) -> None:
        if (generator := self._any_generator()) is not None:
            self._world.seen[Seen.LAGGED] += 1
            for_s = self._world.up_to(LONGEST_LAG * self._cluster.load.step_s)
            generator.lag(for_s)
            self._world.progressed(for_s + self._cluster.settings.lease_ttl_s)

    def _any_generator(self) -> SimulatedGenerator | None:
        return self._world.random.choice(self._cluster.generators) if self._cluster.generators else None

    def _new_name(self) -> str:
        return f"generator-{self._world.number()}"

    # --- The broker and the learner

    def broker_dies_at(self, moment: Seen) -> bool:
        """The broker may die at this moment of the learner's loop."""
        may_die = self._world.faulty and self._cluster.broker.is_up
        dies = may_die and self._world.chance(self._cluster.load.broker_dies_share)
        if dies:
            self._kill_broker(moment)
        return dies

    def _crash_broker(self) -> None:
        kinds = {WAITING: Seen.BROKER_DIED_WAITING, TRAINING: Seen.BROKER_DIED_TRAINING}
        self._kill_broker(kinds.get(self._cluster.learner.doing, Seen.BROKER_DIED_PUBLISHING))

    def _kill_broker(self, moment: Seen) -> None:
        scheduler = self._cluster.broker.scheduler
        evaluates = scheduler is not None and scheduler.evaluation is not None
        self._world.seen[moment] += 1
        self._world.seen[Seen.BROKER_DIED_EVALUATING] += evaluates
        self._cluster.replace_broker()

    def _crash_learner(self) -> None:
        learner = self._cluster.learner
        if learner.alive:
            self._world.seen[learner.doing] += 1
            learner.alive = False
            self._cluster.restart_learner()
