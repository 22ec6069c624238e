"""Rewards of tokens -> advantages and returns of tokens. Pure numpy, one completion at a time.

Runs in every learner rank on its own completions. Tokens outside the loss (what a tool said, or what is left out) are
holes: estimation passes over them as if the tokens before and after were neighbours, and they get 0. Results are
float64, because most of them are whitened next; they are rounded once, when rows are packed.

A group has no meaning here: equal rewards are no reason for an advantage of 0, and a group of one is like any other.

Legend: L tokens of one completion, `mask` [L] True where a token is in the loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]
Exact = NDArray[np.float64]


def token_rewards(reward: float, penalties: Floats, mask: Mask) -> Exact:
    """Reward [L] of each token: minus its penalty, plus the completion's reward on the last token in the loss.

    `penalties` [L]: coefficient times KL where the KL is in the reward (Ouyang et al. 2022, eq. 2), else 0. A
    completion without a token in the loss gets nothing.
    """
    rewards = np.where(mask, -penalties.astype(np.float64), 0.0)
    places = np.flatnonzero(mask)
    rewards[places[-1:]] += reward
    return rewards


def returns_to_go(rewards: Floats, mask: Mask, gamma: float) -> Exact:
    """Discounted sum [L] of the token's reward and all later ones: G_t = r_t + gamma G_{t+1}.

    REINFORCE++ (Hu et al. 2025) whitens them into advantages. We deviate from verl, which starts anew at each hole:
    what a model wrote before it called a tool would then have no part in the reward.
    """
    returns = np.zeros(len(mask))
    returns[mask] = _discounted_sums(rewards[mask].astype(np.float64), gamma)
    return returns


def gae(rewards: Floats, values: Floats, mask: Mask, gamma: float, lam: float) -> tuple[Exact, Exact]:
    """Generalised advantages [L] and the returns [L] that a critic learns.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t, with V = A = 0 after
    the last token (Schulman et al. 2016, eq. 16). V_t is the value before token t is written. t + 1 is the next token
    in the loss: a hole hands on V and A unchanged, and costs no discount. Both are raw: the advantages are whitened
    afterwards, the returns never.
    """
    before = values[mask].astype(np.float64)
    after = np.append(before, 0.0)[1:]
    advantages, returns = np.zeros(len(mask)), np.zeros(len(mask))
    advantages[mask] = _discounted_sums(rewards[mask] + gamma * after - before, gamma * lam)
    returns[mask] = advantages[mask] + before
    return advantages, returns


def _discounted_sums(numbers: Exact, discount: float) -> Exact:
    """S_t = x_t + discount * S_{t+1}, from the end."""
    sums: list[float] = []
    running = 0.0
    for number in reversed(numbers.tolist()):
        running = number + discount * running
        sums.append(running)
    return np.array(sums[::-1], dtype=np.float64)
