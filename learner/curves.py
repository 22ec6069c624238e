"""What one batch says about itself: rewards, lengths, staleness. Pure; every rank could compute the reward part, rank
0 does.

The token statistics are of this rank's completions: `batch_sums` are added up over the ranks, `token_curves` makes
curves of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from learner.batches import token_versions
from learner.losses import policy_curves
from learner.value_loss import value_curves
from protocol.types import FinishReason, Share

if TYPE_CHECKING:
    from learner.trained_model import OptimizerStep


def batch_sums(share: Share, bound: int) -> dict[str, float]:
    """Additive statistics of one rank's completions.

    `bound` is S; tokens beyond it belong to remainders and are left out.
    """
    sums = {"completions": 0.0, "tokens": 0.0, "truncated": 0.0, "staleness": 0.0, "left_out": 0.0}
    for item in share.items:
        completion = item.completion
        staleness = share.step - token_versions(completion)
        sums["completions"] += 1
        sums["tokens"] += len(completion.tokens)
        sums["truncated"] += completion.finish_reason is FinishReason.LENGTH
        sums["staleness"] += float(staleness.sum())
        sums["left_out"] += float((staleness > bound).sum())
    return sums


def batch_maxima(share: Share) -> dict[str, float]:
    """Largest values over one rank's completions."""
    lengths = [len(item.completion.tokens) for item in share.items]
    oldest = [share.step - item.completion.oldest_version for item in share.items]
    return {"completion/length_max": float(max(lengths, default=0)), "staleness/max": float(max(oldest, default=0))}


def token_curves(sums: dict[str, float]) -> dict[str, float]:
    """Curves from `batch_sums` added up over the ranks."""
    completions, tokens = max(sums["completions"], 1.0), max(sums["tokens"], 1.0)
    return {
        "completion/count": sums["completions"],
        "completion/length_mean": sums["tokens"] / completions,
        "completion/truncated_frac": sums["truncated"] / completions,
        "staleness/mean": sums["staleness"] / tokens,
        "staleness/left_out_frac": sums["left_out"] / tokens,
    }


def prompt_numbers(share: Share) -> dict[str, float]:
    """Prompt.number of each group of the batch, by its row; -1 for those of which this rank has no completion."""
    numbers = dict.fromkeys(map(str, range(len(share.rewards))), -1.0)
    return numbers | {str(item.group): float(item.prompt) for item in share.items}


def update_curves(updates: Sequence[OptimizerStep]) -> dict[str, float]:
    """Of the policy's optimizer steps of one batch; there are none while the critic learns alone."""
    if not updates:
        return {"policy/updates": 0.0}
    sums, grad_norm = _together(updates)
    return {
        **policy_curves(sums),
        "policy/grad_norm": grad_norm,
        "policy/micro_batches": float(sum(update.num_micro_batches for update in updates)),
        "policy/updates": float(sum(update.applied for update in updates)),
    }


def critic_curves(updates: Sequence[OptimizerStep]) -> dict[str, float]:
    """Of the critic's optimizer steps of one batch."""
    sums, grad_norm = _together(updates)
    return {**value_curves(sums), "critic/grad_norm": grad_norm}


def _together(updates: Sequence[OptimizerStep]) -> tuple[dict[str, float], float]:
    """Sums, with the mean loss, and the mean norm; steps that were skipped count only where none was applied."""
    counted = [update for update in updates if update.applied] or updates
    sums = {name: sum(update.sums[name] for update in counted) for name in counted[0].sums}
    sums["loss"] /= len(counted)
    return sums, float(np.mean([update.grad_norm for update in counted]))


def reward_curves(share: Share) -> dict[str, float]:
    """Of the whole batch: its reward table is in every share. A missing sample is NaN there and counts nowhere.

    The part of a split group is compared with what its advantages are.
    """
    if np.isnan(share.rewards).all():
        return {"reward/mean": 0.0, "reward/std": 0.0, "reward/equal_group_frac": 1.0}
    groups = [row[~np.isnan(row)] for row in share.baseline_rewards if not np.isnan(row).all()]
    return {
        "reward/mean": float(np.nanmean(share.rewards)),
        "reward/std": float(np.mean([group.std(ddof=1) if len(group) > 1 else 0.0 for group in groups])),
        "reward/equal_group_frac": float(np.mean([bool((group == group[0]).all()) for group in groups])),
    }
