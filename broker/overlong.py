"""Soft punishment of completions that come near max_tokens.

Runs in the broker process, when a result arrives; pure. So the reward table, the baselines of split groups, the filter
of groups without signal and all learner ranks see the same reward.
"""

from __future__ import annotations

from dataclasses import replace

from protocol.rewards import OVERLONG
from protocol.types import Trajectory


def punished(trajectory: Trajectory, max_tokens: int, buffer_tokens: int) -> Trajectory:
    """The trajectory with `punishment` in its reward, and by itself among its rewards; a failed one as it is."""
    if trajectory.completion is None:
        return trajectory
    taken_off = punishment(len(trajectory.completion.tokens), max_tokens, buffer_tokens)
    return replace(
        trajectory, reward=trajectory.reward + taken_off, rewards={**trajectory.rewards, OVERLONG: taken_off}
    )


def punishment(num_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """What is added to the reward: 0 up to max_tokens - buffer_tokens, from there falling to -1 at max_tokens.

    Soft overlong punishment (Yu et al. 2025, "DAPO", eq. 13), held at -1 beyond max_tokens as in the paper and in TRL;
    verl lets it fall on.
    """
    return min(0.0, max(-1.0, (max_tokens - buffer_tokens - num_tokens) / buffer_tokens))
