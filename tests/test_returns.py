"""Returns and generalised advantages of tokens, against slow derivations, with and without holes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from learner.returns import gae, returns_to_go, token_rewards

DISCOUNTS = [(1.0, 1.0), (0.97, 0.9), (1.0, 0.95), (0.9, 0.0), (0.0, 0.5)]
MASKS = {
    "whole": [1, 1, 1, 1, 1, 1, 1],
    "a hole": [1, 1, 0, 0, 1, 1, 1],
    "holes at both ends": [0, 1, 0, 1, 1, 0, 0],
    "one token": [0, 0, 0, 1, 0, 0, 0],
    "nothing": [0, 0, 0, 0, 0, 0, 0],
}
REWARDS = np.array([0.5, -0.25, 0.125, 3.0, 0.0, -1.0, 2.0], dtype=np.float32)
VALUES = np.array([0.3, 1.2, -5.0, 0.7, -0.4, 0.9, 0.1], dtype=np.float32)

masks = pytest.mark.parametrize("mask", [np.array(m, dtype=np.bool_) for m in MASKS.values()], ids=list(MASKS))
discounts = pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)


def slow_return(place: int, mask: np.ndarray, gamma: float) -> float:
    """Sum over later tokens in the loss, each discounted once for every such token before it."""
    total, factor = 0.0, 1.0
    for later in range(place, len(mask)):
        if mask[later]:
            total += factor * float(REWARDS[later])
            factor *= gamma
    return total


def slow_gae(place: int, mask: np.ndarray, gamma: float, lam: float) -> float:
    """Equation 16: sum over l of (gamma lam)^l delta_{t + l}, over the tokens in the loss."""
    kept = [at for at in range(place, len(mask)) if mask[at]]
    total = 0.0
    for step, at in enumerate(kept):
        value_after = float(VALUES[kept[step + 1]]) if step + 1 < len(kept) else 0.0
        delta = float(REWARDS[at]) + gamma * value_after - float(VALUES[at])
        total += (gamma * lam) ** step * delta
    return total


def carried_gae(mask: np.ndarray, gamma: float, lam: float) -> list[float]:
    """The recursion that hands V' and A'' through holes, token by token from the end."""
    after, advantage, found = 0.0, 0.0, [0.0] * len(mask)
    for place in reversed(range(len(mask))):
        kept = float(mask[place])
        delta = float(REWARDS[place]) + gamma * after - float(VALUES[place])
        advantage = kept * (delta + gamma * lam * advantage) + (1 - kept) * advantage
        after = kept * float(VALUES[place]) + (1 - kept) * after
        found[place] = advantage
    return found


def assert_where(mask: np.ndarray, got: np.ndarray, wanted: Callable[[int], float]) -> None:
    assert got.shape == mask.shape
    for place, kept in enumerate(mask):
        assert got[place] == (pytest.approx(wanted(place), rel=1e-9, abs=1e-9) if kept else 0.0), place


@masks
@discounts
def test_returns_equal_a_slow_derivation(mask: np.ndarray, gamma: float, lam: float) -> None:
    assert_where(mask, returns_to_go(REWARDS, mask, gamma), lambda place: slow_return(place, mask, gamma))


@masks
@discounts
def test_generalised_advantages_equal_two_slow_derivations(mask: np.ndarray, gamma: float, lam: float) -> None:
    advantages, returns = gae(REWARDS, VALUES, mask, gamma, lam)
    assert_where(mask, advantages, lambda place: slow_gae(place, mask, gamma, lam))
    assert_where(mask, advantages, lambda place: carried_gae(mask, gamma, lam)[place])
    assert_where(mask, returns, lambda place: slow_gae(place, mask, gamma, lam) + float(VALUES[place]))


@masks
def test_what_stands_in_holes_does_not_matter(mask: np.ndarray) -> None:
    rewards, values = np.where(mask, REWARDS, np.nan), np.where(mask, VALUES, np.nan)
    for got, wanted in zip(gae(rewards, values, mask, 0.9, 0.8), gae(REWARDS, VALUES, mask, 0.9, 0.8), strict=True):
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(returns_to_go(rewards, mask, 0.9), returns_to_go(REWARDS, mask, 0.9))


def test_a_hole_costs_no_discount_and_cuts_nothing_off() -> None:
    rewards = np.array([0.0, 0.0, 0.0, 1.0])
    mask = np.array([True, False, False, True])
    np.testing.assert_array_equal(returns_to_go(rewards, mask, 0.5), [0.5, 0.0, 0.0, 1.0])


@masks
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_with_lambda_one_the_critics_returns_are_the_returns_to_go(mask: np.ndarray, gamma: float) -> None:
    advantages, returns = gae(REWARDS, VALUES, mask, gamma, 1.0)
    wanted = returns_to_go(REWARDS, mask, gamma)
    np.testing.assert_allclose(returns, wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(advantages, np.where(mask, wanted - VALUES, 0.0), rtol=1e-12, atol=1e-12)


def test_with_lambda_zero_each_token_is_judged_by_the_next_value_alone() -> None:
    mask = np.ones(len(VALUES), dtype=np.bool_)
    advantages, _ = gae(REWARDS, VALUES, mask, 0.9, 0.0)
    wanted = [float(r) + 0.9 * float(b) - float(a) for r, (a, b) in zip(REWARDS, pairwise([*VALUES, 0.0]), strict=True)]
    np.testing.assert_allclose(advantages, wanted, rtol=1e-12)


def test_the_reward_stands_on_the_last_token_in_the_loss_and_penalties_on_every_token() -> None:
    penalties = np.array([0.5, math.nan, 0.25, 0.125, 9.0], dtype=np.float32)
    mask = np.array([True, False, True, True, False])
    assert token_rewards(2.0, penalties, mask).tolist() == [-0.5, 0.0, -0.25, 1.875, 0.0]


def test_a_completion_outside_the_loss_is_not_rewarded() -> None:
    nothing = np.zeros(3, dtype=np.bool_)
    assert not token_rewards(2.0, np.ones(3), nothing).any()
    assert not token_rewards(2.0, np.ones(0), nothing[:0]).size
