"""How many groups are worth having open, and which generators are too slow to help.

Owned by the scheduler, in the broker process; pure. Admission bounds staleness; these measurements keep the usual
staleness below the bound where little is lost by it. Neither can stop a run: `limit` never asks for less than a
batch, and `is_slow` never speaks against the fastest generator.

When the learner comes back from a step, a batch should be finished, and no more: what is finished beyond it only grows
staler. The groups that still run at that moment are open too. So a batch and as many groups as usually still run then
are enough, whatever it is that makes them take so long: length, queues, weights to be applied, filtered groups that
are replaced.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from statistics import fmean, pstdev

from broker.leases import Generator

SMOOTHING = 0.05  # weight of the newest group or step in a running mean
REMEMBERED_STEPS = 20  # how far back the groups that still ran at the end of a step are remembered
CATCHING_UP = 2.0  # batches opened on top while the learner waits for the time of one step


class RunningMean:
    """A mean that forgets: plain over the first values, exponential after them. None before the first."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._count = 0

    def add(self, value: float) -> None:
        self._count += 1
        weight = max(SMOOTHING, 1 / self._count)
        self.value = value if self.value is None else self.value + weight * (value - self.value)


class Pace:
    """Measured times of one cluster, and how many groups still run when the learner needs the next batch."""

    def __init__(self, prompts_per_step: int, group_size: int, margin: float | None) -> None:
        self._prompts_per_step = prompts_per_step
        self._group_size = group_size
        self._margin = margin
        self._num_running: deque[int] = deque(maxlen=REMEMBERED_STEPS)
        self._limit = math.inf
        self.latency_s = RunningMean()  # of a group, from its grant to its last sample
        self.step_s = RunningMean()  # from cut to advance: without waiting for trajectories

    def step_ended(self, step_s: float, num_running: int) -> None:
        """The learner is back; `num_running`: open groups that are not finished."""
        self.step_s.add(step_s)
        self._num_running.append(num_running)
        if self._margin is not None:
            usual = fmean(self._num_running) + self._margin * pstdev(self._num_running)
            self._limit = self._prompts_per_step + usual

    def limit(self, waited_s: float) -> float:
        """Open groups beyond which one more would only be staler. No limit before the first step is measured.

        It grows while the learner waits, `waited_s` so far: a cluster that works ahead in that time catches up on it.
        """
        if not waited_s or not self.step_s.value:
            return self._limit
        return self._limit + self._prompts_per_step * CATCHING_UP * waited_s / self.step_s.value

    def is_slow(self, generator: Generator, others: Collection[Generator], num_steps: int) -> bool:
        """True if groups of this generator, to be trained within `num_steps` steps, would hold the cluster up.

        The cycle that counts is the one the cluster would have without it: the learner's step, or the time in which the
        others make a batch. As measured it would not do: a slow generator stretches it until it looks fast enough.
        Up to twice the fastest is never slow: equal generators differ so much by chance.
        """
        own_s = generator.latency_s or 0.0
        if all(own_s <= 2 * other.latency_s for other in others if other.latency_s):
            return False  # asked at every grant: nearly always this is all that has to be looked at
        measured = [(other.latency_s, other.capacity) for other in others if other.latency_s and other.capacity]
        if not measured:
            return False
        completions_per_s = sum(capacity / latency_s for latency_s, capacity in measured)
        cycle_s = max(self.step_s.value or 0.0, self._prompts_per_step * self._group_size / completions_per_s)
        fastest_s = min(latency_s for latency_s, _ in measured)
        return own_s > max(num_steps * cycle_s, 2 * fastest_s)
