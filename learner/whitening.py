"""Advantages -> mean 0 and variance 1 over the tokens of the whole batch. Pure numpy; ranks add up three numbers.

Runs in every learner rank. All ranks whiten with the same numbers, whoever has which completion:

    pivot = ranks.max_across({"pivot": whitening_pivot(values, weights)})["pivot"]
    sums = ranks.sum_across(whitening_sums(values, weights, pivot))
    whitened = whiten(values, weights, sums, pivot)         # or whiten_groups, for a table of advantages

Sums are of distances from the pivot, the batch's largest value. It lies within the data, so a large mean cancels
nothing of a small spread, as it would in sums of plain squares; and where all values are the same, every distance is
exactly 0, and so is what they become.

Values and weights are arrays of one shape. Per token they are [N], the rank's completions one after the other, with
weight 1 where a token is in the loss. Per completion they are [P, G] (groups, completions), with the number of its
tokens in the loss as weight; 0 for the completions of other ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-8

Floats = NDArray[np.floating[Any]]
Weights = NDArray[Any]  # bool, integer or floating


def whitening_pivot(values: Floats, weights: Weights) -> float:
    """This rank's largest value with a weight; -inf if it has none."""
    return float(values[weights > 0].max(initial=-np.inf))


def whitening_sums(values: Floats, weights: Weights, pivot: float) -> dict[str, float]:
    """This rank's part of the count of tokens, and of the sum and sum of squares of their distances from the pivot."""
    counted = weights > 0
    counts = weights[counted].astype(np.float64)
    distances = values[counted].astype(np.float64) - pivot
    return {
        "count": float(counts.sum()),
        "sum": float((counts * distances).sum()),
        "sum_of_squares": float((counts * distances**2).sum()),
    }


def whiten(values: Floats, weights: Weights, sums: Mapping[str, float], pivot: float) -> NDArray[np.float32]:
    """(value - mean) / sqrt(variance + 1e-8), with the unbiased variance; 0 where the weight is 0.

    `sums` are those of all ranks. One token alone, and tokens that are all the same, become exactly 0.
    """
    count = sums["count"]
    mean = sums["sum"] / max(count, 1.0)
    variance = max(sums["sum_of_squares"] - count * mean**2, 0.0) / max(count - 1.0, 1.0)
    whitened = np.zeros(values.shape, dtype=np.float32)
    counted = weights > 0
    distances = values[counted].astype(np.float64) - pivot
    whitened[counted] = (distances - mean) / np.sqrt(variance + EPSILON)
    return whitened


def whiten_groups(advantages: Floats, tokens: Weights, sums: Mapping[str, float], pivot: float) -> NDArray[np.float32]:
    """`whiten` for advantages [P, G] relative to a group; a group without signal stays exactly 0.

    We deviate here from verl and from the papers (REINFORCE++, GDPO), where such a group gets -mean / std: its tokens
    count in mean and variance as they do there, but rewards that prefer no completion give no gradient.
    """
    has_signal = advantages.any(axis=1, keepdims=True)
    return np.where(has_signal, whiten(advantages, tokens, sums, pivot), np.float32(0.0))
