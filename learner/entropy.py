"""Which tokens have the highest entropy of a batch: one threshold for all its micro-batches and ranks. Pure numpy.

Runs in every learner rank, on the entropies of the proximal pass. Ranks add up their histograms (`entropy_histogram`);
from the same sums each computes the same threshold (`entropy_threshold`). Only counts are added, so the order of
adding does not matter. A token below the threshold gets correction 0: it keeps its place in the denominator and in KL
and entropy bonus, and has no policy loss (Wang et al. 2025, "Beyond the 80/20 Rule", and TRL's top_entropy_quantile).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 4096
MANTISSA_BITS = 7  # of a bin's lower edge: a bin is 1/128 to 1/256 of its entropy wide
FIRST_EXPONENT = -28  # the bins end at 2^(-28 + 4096 / 128) = 16 nats; a vocabulary of 8 million has no more

_DROPPED_BITS = 23 - MANTISSA_BITS
_FIRST_BIN = (127 + FIRST_EXPONENT) << MANTISSA_BITS


def entropy_histogram(entropies: NDArray[np.float32]) -> NDArray[np.float64]:
    """Counts [4096] of one rank's entropies, in nats, in bins of equal relative width.

    Floats above 0 are ordered as their bit patterns are, so a bin is the upper bits of the number: no logarithm is
    rounded, and small entropies, which most tokens have, are told apart as well as large ones. Bin 0 also has all below
    2^-28, and what rounding made negative, the last one all from 16 on.
    """
    patterns = entropies.astype(np.float32).view(np.int32)
    bins = np.clip((patterns >> _DROPPED_BITS) - _FIRST_BIN, 0, NUM_BINS - 1)
    return np.bincount(bins, minlength=NUM_BINS).astype(np.float64)


def entropy_threshold(histogram: NDArray[np.float64], fraction: float) -> float:
    """The highest bin's edge at or above which at least `fraction` of the tokens have their entropy.

    More than `fraction` of them do only by tokens of that one bin, whose entropies are within 1/128 of each other.
    -inf where every token is to be kept, and for a batch without tokens.
    """
    at_or_above = np.cumsum(histogram[::-1])[::-1]
    highest = int(np.flatnonzero(at_or_above >= fraction * histogram.sum())[-1])
    if highest == 0 or not histogram.any():
        return -np.inf
    return float(np.array([(highest + _FIRST_BIN) << _DROPPED_BITS], dtype=np.int32).view(np.float32)[0])
