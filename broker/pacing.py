"""How many groups are worth having open, and which generators are too slow to help.

Owned by the scheduler, in the broker process; pure. Admission bounds staleness; these measurements keep the usual
staleness below the bound where little is lost by it. Neither can stop a run: `limit` never asks for less than a
batch, and `is_slow` never speaks against the fastest generator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from broker.leases import Generator

SMOOTHING = 0.05  # weight of the newest group or step in a running mean


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
    """Measured latency, step time and filtered share of one cluster."""

    def __init__(self, prompts_per_step: int, group_size: int, margin: float | None) -> None:
        self._prompts_per_step = prompts_per_step
        self._group_size = group_size
        self._margin = margin
        self.latency_s = RunningMean()  # of a group, from its grant to its last sample
        self.step_s = RunningMean()  # from cut to advance: without waiting for trajectories
        self.filtered_share = RunningMean()

    def group_ended(self, latency_s: float, is_filtered: bool) -> None:
        self.latency_s.add(latency_s)
        self.filtered_share.add(float(is_filtered))

    @property
    def limit(self) -> float:
        """Open groups beyond which one more would only be staler: a batch, and what a learner that never waits uses up
        while one group is generated. No limit until both times are measured."""
        if self._margin is None or not self.latency_s.value or not self.step_s.value:
            return math.inf
        generated_per_kept = 1 / max(1 - (self.filtered_share.value or 0.0), 1e-3)
        batches = (1 + self._margin * self.latency_s.value / self.step_s.value) * generated_per_kept
        return self._prompts_per_step * max(1.0, batches)

    def is_slow(self, generator: Generator, others: Iterable[Generator], num_steps: int) -> bool:
        """True if groups of this generator, to be trained within `num_steps` steps, would hold the cluster up.

        The cycle that counts is the one the cluster would have without it: the learner's step, or the time in which the
        others make a batch. As measured it would not do: a slow generator stretches it until it looks fast enough.
        """
        measured = [(other.latency_s, other.capacity) for other in others if other.latency_s and other.capacity]
        if not generator.latency_s or not measured:
            return False
        completions_per_s = sum(capacity / latency_s for latency_s, capacity in measured)
        cycle_s = max(self.step_s.value or 0.0, self._prompts_per_step * self._group_size / completions_per_s)
        fastest_s = min(latency_s for latency_s, _ in measured)
        return generator.latency_s > 2 * max(num_steps * cycle_s, fastest_s)
