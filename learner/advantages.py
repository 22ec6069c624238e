"""Rewards -> advantages. Pure numpy; every learner rank computes the whole batch's, so no rank has to be told.

Legend: P groups (prompts) of one batch, G completions of one group.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-6


def group_advantages(
    rewards: NDArray[np.float32],
    baseline_rewards: NDArray[np.float32],
    scale: Literal["group", "none"],
) -> NDArray[np.float32]:
    """Advantages [P, G] relative to the group: (r - mean) / (std + 1e-6), or r - mean for `scale` "none".

    Group-relative advantage of GRPO (Shao et al. 2024, "DeepSeekMath", eq. 1 of section 4.1.2); without the division it
    is that of Dr. GRPO (Liu et al. 2025, "Understanding R1-Zero-Like Training"). `rewards` [P, G] has NaN where a
    sample is missing; mean and unbiased std come from the numbers in `baseline_rewards` [P, G], which for the parts of
    a split group are the rewards of a larger set. A missing sample, and a group with fewer than two baseline rewards,
    has advantage 0.

    We deviate in one thing: against a baseline whose rewards are all exactly equal, every advantage is exactly 0. That
    is decided by comparing them: divided by a std of nearly 0, the rest that rounding leaves would be a gradient.
    """
    table = baseline_rewards.astype(np.float64)
    valid = ~np.isnan(table)
    count = valid.sum(axis=1, keepdims=True)
    mean = np.where(valid, table, 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centered = rewards.astype(np.float64) - mean
    if scale == "group":
        variance = np.where(valid, (table - mean) ** 2, 0.0).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1)
        centered /= np.sqrt(variance) + EPSILON
    highest = np.where(valid, table, -np.inf).max(axis=1, keepdims=True)
    lowest = np.where(valid, table, np.inf).min(axis=1, keepdims=True)
    without_signal = (count < 2) | (highest == lowest)
    return np.where(without_signal | np.isnan(centered), 0.0, centered).astype(np.float32)
