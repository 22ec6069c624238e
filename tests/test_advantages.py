"""Advantages that are one number per completion, against slow derivations, and where they must be exactly zero."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import (
    PER_COMPLETION,
    WHITENED,
    RewardTable,
    decoupled,
    group_relative,
    leave_one_out,
    over_greedy,
    sequence_advantages,
)
from protocol.algorithm import AlgorithmConfig

NAN = math.nan
EPSILON = 1e-6
SCALES = ("group", "batch", "none")
WITHIN_THE_GROUP = [
    ("grpo", "group"),
    ("grpo", "batch"),
    ("grpo", "none"),
    ("rloo", "group"),
    ("reinforce_plus_plus_baseline", "group"),
    ("gdpo", "group"),
    ("gdpo", "batch"),
    ("gdpo", "none"),
]

WHOLE = [[1.0, 0.0, 0.5, 0.25], [3.0, NAN, -1.0, 0.0], [0.1, 0.1, 0.1, 0.1], [NAN, 2.0, NAN, NAN], [NAN] * 4]
REMAINDER = [*WHOLE, [1.0, NAN, NAN, NAN]]
REMAINDER_BASELINE = [*WHOLE, [0.0, 0.25, 1.0, NAN]]  # in no particular column
TABLES = [(WHOLE, WHOLE), (REMAINDER, REMAINDER_BASELINE)]


def array(rows: Any) -> np.ndarray:
    """In float32, as they come over the wire, unless it is an array already."""
    return rows if isinstance(rows, np.ndarray) else np.array(rows, dtype=np.float32)


def reward_table(
    rewards: Any, baseline: Any = None, functions: Any = None, weights: Any = (), greedy: Any = None
) -> RewardTable:
    table = array(rewards)
    return RewardTable(
        rewards=table,
        baseline_rewards=table if baseline is None else array(baseline),
        function_rewards=array(functions if functions is not None else np.zeros((0, *table.shape))),
        function_weights=np.array(weights, dtype=np.float64),
        greedy_rewards=array([NAN] * len(table) if greedy is None else greedy),
    )


def advantages(method: str, table: RewardTable, scale: str = "group") -> np.ndarray:
    return sequence_advantages(AlgorithmConfig(advantage=method, scale=scale), table)  # type: ignore[arg-type]


def known(numbers: list[float]) -> list[float]:
    """Those that are there, as the wire's float32 has them."""
    return [float(np.float32(number)) for number in numbers if not math.isnan(number)]


def slow_group_relative(reward: float, baseline: list[float], batch: list[list[float]], scale: str) -> float:
    group = known(baseline)
    if math.isnan(reward) or len(group) < 2 or len(set(group)) == 1:
        return 0.0
    centered = known([reward])[0] - statistics.fmean(group)
    if scale == "none":
        return centered
    spread = group if scale == "group" else [number for row in batch for number in known(row)]
    return centered / (statistics.stdev(spread) + EPSILON)


def slow_leave_one_out(reward: float, baseline: list[float]) -> float:
    others = known(baseline)
    if math.isnan(reward) or len(others) < 2:
        return 0.0
    others.remove(known([reward])[0])
    return known([reward])[0] - statistics.fmean(others)


def assert_equal_to(slow: Any, got: np.ndarray, rewards: list[list[float]]) -> None:
    assert got.shape == (len(rewards), len(rewards[0]))
    for row, values in enumerate(rewards):
        for column in range(len(values)):
            assert got[row, column] == pytest.approx(slow(row, column), rel=1e-9, abs=1e-9), (row, column)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("rewards", "baseline"), TABLES)
def test_group_relative_advantages_equal_a_slow_derivation(rewards: Any, baseline: Any, scale: Any) -> None:
    got = group_relative(array(rewards), array(baseline), scale)
    assert_equal_to(lambda p, g: slow_group_relative(rewards[p][g], baseline[p], baseline, scale), got, rewards)


@pytest.mark.parametrize(("rewards", "baseline"), TABLES)
def test_leave_one_out_advantages_equal_a_slow_derivation(rewards: Any, baseline: Any) -> None:
    got = leave_one_out(array(rewards), array(baseline))
    assert_equal_to(lambda p, g: slow_leave_one_out(rewards[p][g], baseline[p]), got, rewards)


@pytest.mark.parametrize("scale", SCALES)
def test_decoupled_advantages_equal_a_slow_derivation(scale: Any) -> None:
    rewards = [[1.0, 2.0, NAN, 0.5], [0.0, 0.0, 1.0, 1.0]]
    functions = [
        [[1.0, 0.0, 0.0, 0.25], [0.5, 0.5, 0.5, 0.5]],
        [[0.0, NAN, 9.0, 0.5], [3.0, NAN, NAN, NAN]],
        [[0.1, 0.7, 0.3, NAN], [0.0, 1.0, NAN, 0.5]],
    ]
    weights = [1.0, -0.5, 2.0]

    def slow(p: int, g: int) -> float:
        total = 0.0
        for weight, table in zip(weights, functions, strict=True):
            there = [
                [opinion if not math.isnan(reward) else NAN for opinion, reward in zip(*rows, strict=True)]
                for rows in zip(table, rewards, strict=True)
            ]
            total += weight * slow_group_relative(there[p][g], there[p], there, scale)
        return total

    got = decoupled(array(rewards), array(functions), np.array(weights), scale)
    assert_equal_to(slow, got, rewards)
    assert not got[0, 2], "the sample is missing, whatever the functions said"


def test_greedy_baselines_are_taken_off_and_a_missing_one_leaves_nothing() -> None:
    rewards = [[1.0, 0.0, NAN], [0.1, 0.7, 0.1], [1.0, 2.0, 3.0]]
    got = over_greedy(array(rewards), array([0.25, 0.1, NAN]))
    tenth, seven_tenths = known([0.1, 0.7])
    np.testing.assert_array_equal(got, [[0.75, -0.25, 0.0], [0.0, seven_tenths - tenth, 0.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize("scale", SCALES)
def test_each_method_is_its_formula_rounded_once(scale: Any) -> None:
    rewards, baseline = array(REMAINDER), array(REMAINDER_BASELINE)
    functions, weights, greedy = np.stack([rewards, -2 * baseline]), np.array([0.5, 1.5]), array([0.5] * len(rewards))
    table = RewardTable(rewards, baseline, functions, weights, greedy)
    wanted = {
        "grpo": group_relative(rewards, baseline, scale),
        "rloo": leave_one_out(rewards, baseline),
        "reinforce_plus_plus_baseline": group_relative(rewards, baseline, "none"),
        "gdpo": decoupled(rewards, functions, weights, scale),
        "remax": over_greedy(rewards, greedy),
    }
    assert wanted.keys() == PER_COMPLETION
    for method, numbers in wanted.items():
        got = advantages(method, table, scale)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, numbers.astype(np.float32))


def test_every_method_of_the_settings_is_either_per_completion_or_per_token() -> None:
    table = reward_table([[1.0, 0.0]], functions=[[[1.0, 0.0]]], weights=[1.0])
    for method in AlgorithmConfig.model_fields["advantage"].annotation.__args__:  # type: ignore[union-attr]
        if method in PER_COMPLETION:
            advantages(method, table)
        else:
            assert method in WHITENED
            with pytest.raises(AssertionError, match=f"{method} is estimated per token"):
                advantages(method, table)


@pytest.mark.parametrize(("method", "scale"), WITHIN_THE_GROUP)
@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, 1e6, -0.2])
@pytest.mark.parametrize("size", [2, 3, 6, 7, 8, 10, 12])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])  # only in float64 does the sum of a group round
def test_equal_rewards_give_exactly_zero(method: str, scale: str, reward: float, size: int, dtype: Any) -> None:
    rewards = np.array([[reward] * size + [NAN], [1.0] + [0.0] * size], dtype=dtype)
    got = advantages(method, reward_table(rewards, functions=np.stack([rewards, rewards]), weights=[0.3, 0.7]), scale)
    assert not got[0].any()
    assert got[1].any(), "the other group has a signal"


@pytest.mark.parametrize(("method", "scale"), WITHIN_THE_GROUP)
@pytest.mark.parametrize("rewards", [[5.0, NAN, NAN], [NAN, NAN, NAN]])
def test_a_group_with_fewer_than_two_rewards_has_no_signal(method: str, scale: str, rewards: list[float]) -> None:
    table = reward_table([rewards], functions=[[rewards], [rewards]], weights=[1.0, 1.0])
    assert not advantages(method, table, scale).any()


def test_a_group_of_one_learns_from_a_greedy_completion() -> None:
    assert advantages("remax", reward_table([[5.0, NAN]], greedy=[3.0])).tolist() == [[2.0, 0.0]]


def test_a_baseline_without_spread_gives_nothing_to_any_reward() -> None:
    assert not advantages("grpo", reward_table([[1.0, NAN, NAN]], [[0.1, 0.1, 0.1]])).any()


def test_nearly_equal_rewards_do_not_count_as_equal() -> None:
    assert advantages("grpo", reward_table([[0.5, 0.5, 0.5000001, 0.5]])).all()


@pytest.mark.parametrize(("method", "scale"), WITHIN_THE_GROUP)
def test_a_missing_sample_moves_neither_mean_nor_spread(method: str, scale: str) -> None:
    with_gap, without = [[1.0, NAN, 0.0, 0.0], [0.0, NAN, 0.0, 2.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]]
    heard = [[1.0, 7.0, 0.0, 0.0], [0.0, 7.0, 0.0, 2.0]]  # functions may have spoken of a sample that failed later
    got = advantages(method, reward_table(with_gap, functions=[heard], weights=[1.0]), scale)
    assert not got[:, 1].any()
    wanted = advantages(method, reward_table(without, functions=[without], weights=[1.0]), scale)
    np.testing.assert_allclose(got[:, [0, 2, 3]], wanted, rtol=1e-6)


@pytest.mark.parametrize("method", ["grpo", "rloo", "reinforce_plus_plus_baseline"])
def test_a_part_of_a_group_is_compared_with_the_rewards_it_is_given(method: str) -> None:
    whole = [[1.0, 0.0, 0.0, 1.0]]
    part = advantages(method, reward_table([[1.0, 0.0, NAN, NAN]], whole))
    np.testing.assert_array_equal(part[0, :2], advantages(method, reward_table(whole))[0, :2])
    assert not part[0, 2:].any()


def test_a_batch_of_one_late_completion_is_scaled_by_the_rewards_of_its_group() -> None:
    got = advantages("grpo", reward_table([[1.0, NAN, NAN]], [[0.0, 0.0, 1.0]]), "batch")
    assert got[0, 0] == pytest.approx((2 / 3) / (math.sqrt(1 / 3) + EPSILON))


def test_the_spread_of_the_batch_is_that_of_rewards_and_not_of_their_distances_from_the_mean() -> None:
    got = advantages("grpo", reward_table([[0.0, 1.0], [10.0, 11.0]]), "batch")
    assert got[0, 1] == pytest.approx(0.5 / (statistics.stdev([0.0, 1.0, 10.0, 11.0]) + EPSILON))


def test_leaving_one_out_is_the_centered_reward_times_n_over_n_minus_one() -> None:
    rewards = array([[1.0, 0.25, 0.0, 4.0, -1.0]])
    np.testing.assert_allclose(
        leave_one_out(rewards, rewards), group_relative(rewards, rewards, "none") * 5 / 4, rtol=1e-12
    )


@pytest.mark.parametrize("scale", SCALES)
def test_one_reward_function_alone_makes_gdpo_grpo(scale: str) -> None:
    table = reward_table(WHOLE, functions=[WHOLE], weights=[1.0])
    np.testing.assert_array_equal(advantages("gdpo", table, scale), advantages("grpo", table, scale))


def test_gdpo_tells_apart_what_has_the_same_sum() -> None:
    functions = [[[1.0, 0.0, 0.0, 0.0]], [[0.0, 1.0, 1.0, 1.0]]]
    table = reward_table(np.sum(functions, axis=0), functions=functions, weights=[2.0, 1.0])
    assert not advantages("grpo", table).any()
    assert len(set(advantages("gdpo", table)[0].tolist())) == 2


def test_a_table_whose_parts_do_not_fit_is_refused() -> None:
    with pytest.raises(AssertionError):
        reward_table([[1.0, 0.0]], [[1.0, 0.0, 0.0]])
    with pytest.raises(AssertionError):
        reward_table([[1.0, 0.0]], functions=[[[1.0, 0.0]]], weights=[1.0, 2.0])
    with pytest.raises(AssertionError):
        reward_table([[1.0, 0.0]], greedy=[0.0, 0.0])
    with pytest.raises(AssertionError, match="rewards of each function"):
        advantages("gdpo", reward_table([[1.0, 0.0]]))


@pytest.mark.parametrize("method", ["grpo", "rloo"])
@given(rewards=st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=8))
def test_advantages_of_a_group_add_up_to_zero_and_keep_the_order(method: str, rewards: list[float]) -> None:
    got = advantages(method, reward_table([rewards]))[0]
    assert abs(got.sum()) < 1e-5
    for i, left in enumerate(rewards):
        for j, right in enumerate(rewards):
            if left < right:
                assert got[i] < got[j]
