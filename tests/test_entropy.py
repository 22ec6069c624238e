"""The threshold of the highest entropies: one for all ranks, exact to a bin, against sorting."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from learner.entropy import NUM_BINS, entropy_histogram, entropy_threshold

RELATIVE_WIDTH = 1 / 128


def entropies_of_a_batch(seed: int, number: int = 2000) -> NDArray[np.float32]:
    """As of a language model: most tokens are nearly certain, a few are open."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(-3.0, 3.0, number)).clip(0, 11.9).astype(np.float32)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_threshold_is_the_quantile_to_within_a_bin(seed: int, fraction: float) -> None:
    entropies = entropies_of_a_batch(seed)
    threshold = entropy_threshold(entropy_histogram(entropies), fraction)
    wanted = sorted(entropies.tolist(), reverse=True)[int(np.ceil(fraction * len(entropies))) - 1]
    assert threshold <= wanted < threshold * (1 + RELATIVE_WIDTH)
    kept = int((entropies >= threshold).sum())
    assert kept >= fraction * len(entropies)
    in_the_bin = (entropies >= threshold) & (entropies < threshold * (1 + RELATIVE_WIDTH))
    assert kept - in_the_bin.sum() < fraction * len(entropies)


def test_ranks_that_add_up_their_histograms_have_the_threshold_of_the_whole_batch() -> None:
    entropies = entropies_of_a_batch(2)
    whole = entropy_threshold(entropy_histogram(entropies), 0.2)
    parts = [entropies[:0], entropies[:7], entropies[7:1500], entropies[1500:]]
    histograms = [entropy_histogram(part) for part in parts]
    assert entropy_threshold(sum(histograms[1:], histograms[0]), 0.2) == whole
    assert entropy_threshold(sum(histograms[:3], histograms[3]), 0.2) == whole
    assert entropy_threshold(histograms[1], 0.2) != whole  # a rank alone would choose otherwise


@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_every_token_is_counted_and_nothing_is_out_of_range(fraction: float) -> None:
    odd = np.array([-1e-6, 0.0, 1e-30, 2.0**-28, 15.99, 16.0, 400.0], dtype=np.float32)
    histogram = entropy_histogram(odd)
    assert histogram.shape == (NUM_BINS,)
    assert histogram.sum() == len(odd)
    assert (histogram[0], histogram[-1]) == (4.0, 3.0)
    kept = (odd >= entropy_threshold(histogram, fraction)).sum()
    assert kept == (3 if fraction == 0.2 else len(odd))


def test_a_bins_edge_belongs_to_it_and_the_number_below_does_not() -> None:
    edge = np.float32(0.5)
    below = np.nextafter(edge, np.float32(0.0))
    assert entropy_threshold(entropy_histogram(np.array([edge, below])), 0.5) == 0.5
    assert entropy_threshold(entropy_histogram(np.array([edge, below])), 0.51) < below


def test_equal_entropies_are_all_kept() -> None:
    entropies = np.full(10, 0.3, dtype=np.float32)
    assert (entropies >= entropy_threshold(entropy_histogram(entropies), 0.2)).all()


def test_a_batch_without_tokens_has_a_threshold_below_everything() -> None:
    assert entropy_threshold(entropy_histogram(np.zeros(0, dtype=np.float32)), 0.2) == -np.inf
