"""The learning rate as a pure function of the step. Runs in the learner; nothing to save, nothing to restore.

That the first step already moves the weights rests on `learning_rate`: warm-up counts from 1, not from 0.
"""

from __future__ import annotations

import math
from typing import Literal


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
