"""Rewards -> advantages that are one number per completion. Pure numpy.

Runs in every learner rank on the whole batch's rewards, so no rank has to be told another's numbers. Per-token
estimators are in `returns.py`; `whitening.py` brings what `WHITENED` names to mean 0 and variance 1. Each
`algorithm.advantage` that is one number per completion has one function here:

    grpo                           group_relative     (R - mean) / std, or R - mean (Dr. GRPO)
    rloo                           leave_one_out      R - mean of the others
    reinforce_plus_plus_baseline   group_relative     R - mean, whitened
    gdpo                           decoupled          the weighted sum of group_relative of each function, whitened
    remax                          over_greedy        R - reward of the greedy completion

Two promises. A group whose rewards are all exactly equal has advantage exactly 0 where rewards are compared within the
group; that is decided by comparing them, because rounding leaves a rest that a std of nearly 0 would blow up (0.1 eight
times: 7e-3). That rests on `has_signal`. A missing sample has advantage 0 and is in no mean, spread or count. A group
of one has nothing to be compared with, so its advantage is 0 (verl gives it R itself for grpo and, in one of its two
forms, for rloo); with remax, whose baseline is another sample, it is like any other.

Legend: P groups (prompts) of one batch, G completions of one group, F reward functions. R is a completion's reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.algorithm import AlgorithmConfig

EPSILON = 1e-6

PER_COMPLETION = frozenset({"grpo", "rloo", "reinforce_plus_plus_baseline", "gdpo", "remax"})
"""Values of `algorithm.advantage` that `sequence_advantages` computes; the others are per token."""

WHITENED = frozenset({"reinforce_plus_plus", "reinforce_plus_plus_baseline", "gdpo", "gae"})
"""Values of `algorithm.advantage` that are whitened over the batch's tokens afterwards."""

Scale = Literal["group", "batch", "none"]
Table = NDArray[np.floating[Any]]
Advantages = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RewardTable:
    """What a whole batch was rewarded with: the same on every rank."""

    rewards: Table  # [P, G]; NaN: the sample is missing
    baseline_rewards: Table  # [P, G], NaN-padded: what statistics are taken from; differs for parts of split groups
    function_rewards: Table  # [F, P, G], before weighting; NaN: no opinion
    function_weights: Table  # [F]
    greedy_rewards: Table  # [P], of one greedy completion per prompt; NaN: there is none

    def __post_init__(self) -> None:
        groups, size = self.rewards.shape
        assert self.baseline_rewards.shape == (groups, size), self.baseline_rewards.shape
        assert self.function_rewards.shape == (len(self.function_weights), groups, size), self.function_rewards.shape
        assert self.greedy_rewards.shape == (groups,), self.greedy_rewards.shape


class Statistics(NamedTuple):
    """Of the numbers in each row of a table, NaN left out; all [P, 1]."""

    size: NDArray[np.int64]  # how many numbers
    mean: Advantages
    std: Advantages  # unbiased; 0 of fewer than two numbers
    has_signal: NDArray[np.bool_]  # not all of them are the same; False of fewer than two


def sequence_advantages(settings: AlgorithmConfig, table: RewardTable) -> NDArray[np.float32]:
    """Advantages [P, G], one number per completion, for the methods in `PER_COMPLETION`; not whitened yet."""
    rewards, baseline = table.rewards, table.baseline_rewards
    match settings.advantage:
        case "grpo":
            advantages = group_relative(rewards, baseline, settings.scale)
        case "rloo":
            advantages = leave_one_out(rewards, baseline)
        case "reinforce_plus_plus_baseline":
            advantages = group_relative(rewards, baseline, "none")
        case "gdpo":
            advantages = decoupled(rewards, table.function_rewards, table.function_weights, settings.scale)
        case "remax":
            advantages = over_greedy(rewards, table.greedy_rewards)
        case _:
            raise AssertionError(f"{settings.advantage} is estimated per token, see returns.py")
    return advantages.astype(np.float32)


def group_relative(rewards: Table, baseline_rewards: Table, scale: Scale) -> Advantages:
    """(R - mean) / (std + 1e-6) [P, G], with the mean of the group.

    `scale` says whose std. "group": GRPO (Shao et al. 2024, "DeepSeekMath", section 4.1.2). "batch": that of all the
    batch's rewards before any mean is taken off, as TRL defines it, so a group of wider spread weighs more. "none": no
    division, Dr. GRPO (Liu et al. 2025, "Understanding R1-Zero-Like Training"); whitened, this is REINFORCE++ with
    baseline (Hu et al. 2025). Each std is unbiased and taken from `baseline_rewards`, also that of the batch, so it is
    not 0 where one of the batch's groups has a signal.
    """
    group = statistics(baseline_rewards)
    advantages = rewards - group.mean
    if scale == "group":
        advantages /= group.std + EPSILON
    elif scale == "batch":
        advantages /= statistics(baseline_rewards.reshape(1, -1)).std + EPSILON
    return np.where(group.has_signal & ~np.isnan(rewards), advantages, 0.0)


def leave_one_out(rewards: Table, baseline_rewards: Table) -> Advantages:
    """R - mean of the group's other rewards [P, G], which is (R - mean) n / (n - 1) for a group of n.

    RLOO (Kool et al. 2019; Ahmadian et al. 2024, "Back to Basics"). The completion itself is among its baseline's
    rewards, also in a part of a split group.
    """
    group = statistics(baseline_rewards)
    advantages = (rewards - group.mean) * group.size / np.maximum(group.size - 1, 1)
    return np.where(group.has_signal & ~np.isnan(rewards), advantages, 0.0)


def decoupled(rewards: Table, function_rewards: Table, function_weights: Table, scale: Scale) -> Advantages:
    """Sum over the reward functions of weight * `group_relative` of that function alone [P, G].

    GDPO (Liu et al. 2026, "GDPO: Group reward-Decoupled Normalization Policy Optimization"), so that combinations of
    rewards with the same sum stay apart; whitened afterwards, over tokens as in verl (over completions in TRL). A
    function without an opinion on a sample adds nothing to it. A part of a split group is compared with itself only:
    what the functions said about the rest of the group is not in the batch.
    """
    assert len(function_rewards), "gdpo needs the rewards of each function"
    known = np.where(np.isnan(rewards), np.nan, function_rewards)
    advantages = np.zeros(rewards.shape)
    for weight, of_one in zip(function_weights, known, strict=True):
        advantages += weight * group_relative(of_one, of_one, scale)
    return advantages


def over_greedy(rewards: Table, greedy_rewards: Table) -> Advantages:
    """R - reward of the prompt's greedy completion [P, G]; 0 where either is missing.

    ReMax (Li et al. 2023, algorithm 1). A group of equal rewards has a signal here unless they equal the greedy one.
    """
    advantages = rewards.astype(np.float64) - greedy_rewards[:, None]
    return np.where(np.isnan(advantages), 0.0, advantages)


def statistics(table: Table) -> Statistics:
    """Of each row of a table [P, N]."""
    valid = ~np.isnan(table)
    size = valid.sum(axis=1, keepdims=True)
    mean = np.where(valid, table, 0.0).sum(axis=1, keepdims=True, dtype=np.float64) / np.maximum(size, 1)
    squares = np.where(valid, (table - mean) ** 2, 0.0).sum(axis=1, keepdims=True)
    highest = np.where(valid, table, -np.inf).max(axis=1, keepdims=True)
    lowest = np.where(valid, table, np.inf).min(axis=1, keepdims=True)
    return Statistics(size, mean, np.sqrt(squares / np.maximum(size - 1, 1)), highest > lowest)
