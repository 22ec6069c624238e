"""Whitening over the tokens of all ranks: against a slow derivation, however the tokens are cut."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.whitening import whiten, whiten_groups, whitening_pivot, whitening_sums

EPSILON = 1e-8


def across(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[dict[str, float], float]:
    """Sums and pivot of several ranks, as their collectives make them."""
    pivot = max(whitening_pivot(values, weights) for values, weights in parts)
    sums = [whitening_sums(values, weights, pivot) for values, weights in parts]
    return {name: sum(one[name] for one in sums) for name in sums[0]}, pivot


def alone(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return whiten(values, weights, *across([(values, weights)]))


def slow(values: list[float]) -> list[float]:
    mean, variance = statistics.fmean(values), statistics.variance(values)
    return [(value - mean) / math.sqrt(variance + EPSILON) for value in values]


def close(wanted: list[float]) -> object:
    """Exact up to the rounding to float32 at the end."""
    return pytest.approx([float(np.float32(number)) for number in wanted], rel=1.2e-7, abs=1e-9)


VALUES = np.array([1.0, -2.0, 0.5, 3.25, 0.0, -0.125, 7.0, 0.5])
MASK = np.array([1, 1, 0, 1, 1, 1, 0, 1], dtype=np.bool_)


def test_tokens_in_the_loss_are_whitened_and_others_get_zero() -> None:
    got = alone(VALUES, MASK)
    assert got.dtype == np.float32
    assert got[MASK].tolist() == close(slow(VALUES[MASK].tolist()))
    assert not got[~MASK].any()


def test_small_spreads_are_damped_by_epsilon() -> None:
    values = [0.0, 1e-4, 2e-4, -1e-4]
    got = alone(np.array(values), np.ones(4, dtype=np.bool_))
    assert got.tolist() == close(slow(values))
    assert np.abs(got).max() < 1.0, "without epsilon it would be 1.16"


@pytest.mark.parametrize("cuts", [[8], [3, 8], [0, 5, 5, 8], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_the_cut_over_ranks_does_not_matter(cuts: list[int]) -> None:
    starts = [0, *cuts[:-1]]
    parts = [(VALUES[a:b], MASK[a:b]) for a, b in zip(starts, cuts, strict=True)]
    sums, pivot = across(parts)
    got = np.concatenate([whiten(values, mask, sums, pivot) for values, mask in parts])
    assert got.tolist() == pytest.approx(alone(VALUES, MASK).tolist(), rel=2e-7)


def test_what_stands_outside_the_loss_does_not_matter() -> None:
    np.testing.assert_array_equal(alone(np.where(MASK, VALUES, np.nan), MASK), alone(VALUES, MASK))


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6, 1e8])
def test_a_large_mean_takes_no_digits_from_a_small_spread(offset: float) -> None:
    values = offset + np.arange(1000) % 7 * 2.0**-10  # exact in float64
    got = alone(values, np.ones(1000, dtype=np.bool_))
    assert got.tolist() == close(slow((values - offset).tolist()))


@pytest.mark.parametrize("value", [0.1, -0.7, 1 / 3, 1e6])
@pytest.mark.parametrize("number", [1, 2, 3, 7, 8, 1000])
def test_equal_values_become_exactly_zero(value: float, number: int) -> None:
    assert not alone(np.full(number, value), np.ones(number, dtype=np.bool_)).any()


def test_a_batch_without_a_token_in_the_loss_has_nothing_to_whiten() -> None:
    assert not alone(VALUES, np.zeros(8, dtype=np.bool_)).any()
    sums, pivot = across([(VALUES[:0], MASK[:0]), (VALUES, MASK)])
    assert whiten(VALUES[:0], MASK[:0], sums, pivot).shape == (0,)
    np.testing.assert_array_equal(whiten(VALUES, MASK, sums, pivot), alone(VALUES, MASK))


def test_a_table_with_token_counts_is_whitened_as_its_tokens_are() -> None:
    advantages = np.array([[0.5, -0.25, -0.25], [1.0, 0.0, -1.0]], dtype=np.float32)
    tokens = np.array([[3, 1, 4], [0, 5, 2]])
    got = whiten_groups(advantages, tokens, *across([(advantages, tokens)]))
    wanted = slow(np.repeat(advantages, tokens.reshape(-1)).tolist())
    assert np.repeat(got, tokens.reshape(-1)).tolist() == close(wanted)
    assert got[1, 0] == 0.0, "it has no token in the loss"
    assert got[1, 1] != 0.0, "at the mean of its group, not of the batch"


def test_ranks_with_other_completions_whiten_a_table_alike() -> None:
    advantages = np.array([[0.5, -0.25, -0.25], [1.0, 0.0, -1.0]], dtype=np.float32)
    first, second = np.array([[3, 0, 4], [0, 0, 2]]), np.array([[0, 1, 0], [0, 5, 0]])
    sums, pivot = across([(advantages, first), (advantages, second)])
    together = sum(whiten_groups(advantages, mine, sums, pivot) for mine in (first, second))
    whole = first + second
    assert together.ravel().tolist() == close(
        whiten_groups(advantages, whole, *across([(advantages, whole)])).ravel().tolist()
    )


def test_a_group_without_signal_counts_but_stays_exactly_zero() -> None:
    advantages = np.array([[0.0, 0.0], [0.75, -0.25]], dtype=np.float32)
    tokens = np.array([[2, 3], [4, 1]])
    got = whiten_groups(advantages, tokens, *across([(advantages, tokens)]))
    assert not got[0].any()
    wanted = slow([0.0] * 5 + [0.75] * 4 + [-0.25])
    assert got[1].tolist() == close([wanted[5], wanted[9]])


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=30))
def test_whitened_tokens_have_mean_zero_and_variance_one_at_most(values: list[float]) -> None:
    got = alone(np.array(values), np.ones(len(values), dtype=np.bool_)).astype(np.float64)
    assert abs(got.mean()) < 1e-6
    assert got.var(ddof=1) < 1.0 + 1e-5
    if np.var(values) > 1e-2:
        assert got.var(ddof=1) > 1.0 - 1e-5
