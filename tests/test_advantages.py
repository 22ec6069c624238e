"""Group-relative advantages against a slow derivation, and where they must be exactly zero."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import EPSILON, group_advantages

NAN = math.nan


def table(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def slow(reward: float, baseline: list[float], scale: str) -> float:
    known = [float(np.float32(r)) for r in baseline if not math.isnan(r)]
    centered = float(np.float32(reward)) - statistics.fmean(known)
    return centered / (statistics.stdev(known) + EPSILON) if scale == "group" else centered


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_equal_a_slow_derivation(scale: str) -> None:
    rewards = [[1.0, 0.0, 0.5, 0.25], [3.0, NAN, -1.0, 0.0]]
    got = group_advantages(table(*rewards), table(*rewards), scale)  # type: ignore[arg-type]
    for row, values in enumerate(rewards):
        for column, reward in enumerate(values):
            wanted = 0.0 if math.isnan(reward) else slow(reward, values, scale)
            assert got[row, column] == pytest.approx(wanted, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, 1e6, -0.2])
@pytest.mark.parametrize("size", [2, 3, 6, 7, 8, 10, 12])
def test_equal_rewards_give_exactly_zero(scale: str, reward: float, size: int) -> None:
    rewards = table([reward] * size)
    assert not group_advantages(rewards, rewards, scale).any()  # type: ignore[arg-type]


def test_a_baseline_without_spread_gives_nothing_to_any_reward() -> None:
    assert not group_advantages(table([1.0, NAN, NAN]), table([0.1, 0.1, 0.1]), "group").any()


def test_nearly_equal_rewards_do_not_count_as_equal() -> None:
    rewards = table([0.5, 0.5, 0.5000001, 0.5])
    assert group_advantages(rewards, rewards, "group").all()


def test_a_missing_sample_moves_neither_mean_nor_spread() -> None:
    with_gap, without = table([1.0, NAN, 0.0, 0.0]), table([1.0, 0.0, 0.0])
    np.testing.assert_array_equal(
        group_advantages(with_gap, with_gap, "group")[:, [0, 2, 3]], group_advantages(without, without, "group")
    )


@pytest.mark.parametrize("rewards", [[5.0, NAN, NAN], [NAN, NAN, NAN]])
def test_a_group_with_fewer_than_two_rewards_has_no_signal(rewards: list[float]) -> None:
    assert not group_advantages(table(rewards), table(rewards), "group").any()


def test_a_part_of_a_group_is_compared_with_the_rewards_it_is_given() -> None:
    baseline = [1.0, 0.0, 0.0, 1.0]
    part = group_advantages(table([1.0, 0.0, NAN, NAN]), table(baseline), "group")
    np.testing.assert_array_equal(part[0, :2], group_advantages(table(baseline), table(baseline), "group")[0, :2])
    assert not part[0, 2:].any()


@given(st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=8))
def test_advantages_of_a_group_add_up_to_zero_and_keep_the_order(rewards: list[float]) -> None:
    got = group_advantages(table(rewards), table(rewards), "group")[0]
    assert abs(got.sum()) < 1e-5
    for i, left in enumerate(rewards):
        for j, right in enumerate(rewards):
            if left < right:
                assert got[i] < got[j]
