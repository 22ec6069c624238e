"""The learning rate as a pure function of the step. Runs in the learner; nothing to save, nothing to restore.

That the first step already moves the weights rests on `learning_rate`: warm-up counts from 1, not from 0.
"""

from __future__ import annotations

import math
from typing import Literal

from protocol.config import Config


def learning_rate(
    step: int,
    total_steps: int,
    peak: float,
    kind: Literal["constant", "linear", "cosine"] = "constant",
    warmup_steps: int = 0,
    minimum: float = 0.0,
) -> float:
    """Learning rate of 0-based `step`: up to `peak` at step `warmup_steps` - 1, then to `minimum` at `total_steps`.

    Step `total_steps` itself is never trained, so no step runs at a minimum of 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    match kind:
        case "constant":
            return peak
        case "linear":
            return peak + (minimum - peak) * progress
        case "cosine":
            return minimum + (peak - minimum) * (1 + math.cos(math.pi * progress)) / 2


def learning_rates(config: Config, step: int, total_steps: int) -> tuple[float, float]:
    """Of policy and critic at 0-based `step`: one shape for both, at two peaks.

    In the critic's first `critic.warmup_steps` the policy's is 0; its schedule begins after them, so that a warm-up of
    its own is not over before its first update.
    """
    learner = config.learner

    def rate(step: int, total_steps: int) -> float:
        peak, lowest = learner.learning_rate, learner.min_learning_rate
        return learning_rate(step, total_steps, peak, learner.schedule, learner.warmup_steps, lowest)

    alone = critic_warmup_steps(config)
    of_policy = rate(step - alone, total_steps - alone) if step >= alone else 0.0
    return of_policy, rate(step, total_steps) * config.critic.learning_rate / learner.learning_rate


def critic_warmup_steps(config: Config) -> int:
    """First steps in which only the critic learns; 0 where there is none."""
    return config.critic.warmup_steps if config.algorithm.advantage == "gae" else 0
