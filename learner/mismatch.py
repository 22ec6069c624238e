"""How far the policy that trains is from those that sampled: the `mismatch/*` curves. Pure.

Runs in every learner rank. `mismatch_sums` is additive over micro-batches and ranks, `mismatch_curves` makes curves of
the total. Quantiles come from a histogram of log ratios whose bins are the same everywhere, so they are those of the
whole batch, to the width of a bin: 0.0008 around 0, from there on 15% of the log ratio.

Legend: K tokens inside the loss, of n whole sequences with at least one each; ratio = exp(proximal - behavior
log-probability), before any bound; age = version in training - version of the token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.corrections import MAX_LOG_RATIO, Corrections, sequence_log_ratios
from protocol.algorithm import CorrectionsConfig

NUM_BINS = 121  # odd: an unmoved policy is in the middle of one
BIN_SCALE = 0.005  # log ratios below it are binned evenly, those above by their logarithm
BIN_LIMIT = math.asinh(MAX_LOG_RATIO / BIN_SCALE)
BIN_WIDTH = 2.0 * BIN_LIMIT / NUM_BINS
OLDEST_AGE = 8  # tokens that are older are counted with it
QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}

TOTALS = ("tokens", "k1", "k3", "ratio", "ratio_squared", "outside", "negative_masked", "rejected")
SEQUENCE_TOTALS = ("sequences", "sequence_ratio", "sequence_ratio_squared")
BINS = tuple(f"log_ratio_bin_{number}" for number in range(NUM_BINS))
AGE_TOTALS = tuple(f"age_{age}_{what}" for what in ("tokens", "ratio", "k3") for age in range(OLDEST_AGE + 1))
SUM_NAMES = tuple(f"mismatch_{name}" for name in (*TOTALS, *SEQUENCE_TOTALS, *BINS, *AGE_TOTALS))
"""What the places of `mismatch_sums` hold."""


@torch.no_grad()
def mismatch_sums(
    settings: CorrectionsConfig,
    corrected: Corrections,
    behavior_logprobs: Tensor,
    proximal_logprobs: Tensor,
    ages: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
) -> Tensor:
    """Additive statistics [len(SUM_NAMES)] float64 of tokens and their `corrected` weights; `ages` [K] are integers.

    Without a wait for the device. A log-probability of NaN makes the means NaN, and is in some bin.
    """
    log_ratios = (proximal_logprobs - behavior_logprobs).double()
    clamped = log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratios = clamped.exp()
    k3 = ratios - 1.0 - clamped
    totals = [
        torch.ones_like(ratios),
        -clamped,
        k3,
        ratios,
        ratios.square(),
        corrected.outside.double(),
        corrected.negative_masked.double(),
        (corrected.weights == 0).double(),
    ]
    of_sequences = sequence_log_ratios(settings, log_ratios, sequence_ids, num_sequences)
    sequence_ratios = of_sequences.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    sequence_totals = [torch.ones_like(sequence_ratios), sequence_ratios, sequence_ratios.square()]
    places = (torch.asinh(clamped / BIN_SCALE) + BIN_LIMIT) / BIN_WIDTH
    bins = places.long().clamp(0, NUM_BINS - 1)  # in this order: NaN becomes any integer
    ages = ages.clamp(0, OLDEST_AGE)
    return torch.cat(
        [
            torch.stack([values.sum() for values in (*totals, *sequence_totals)]),
            _counted(torch.ones_like(ratios), bins, NUM_BINS),
            *(_counted(values, ages, OLDEST_AGE + 1) for values in (torch.ones_like(ratios), ratios, k3)),
        ]
    )


def mismatch_curves(sums: Mapping[str, float]) -> dict[str, float]:
    """Curves from `mismatch_sums` by `SUM_NAMES`, added up over micro-batches and ranks.

    kl_k1 and kl (k3) estimate KL(behavior || proximal) per token (Schulman 2020); chi2 is E[ratio^2] - 1, the
    chi-square divergence; ess is (sum r)^2 / (n sum r^2), 1 when every ratio is the same (Kong 1992), of tokens and of
    whole sequences. An age that no token has gives no curve.
    """
    of = {name.removeprefix("mismatch_"): value for name, value in sums.items()}
    tokens = max(of["tokens"], 1.0)
    histogram = np.array([of[name] for name in BINS])
    curves = {
        "kl": of["k3"] / tokens,
        "kl_k1": of["k1"] / tokens,
        "ratio_mean": of["ratio"] / tokens,
        "chi2": of["ratio_squared"] / tokens - 1.0,
        "ess": _effective_share(of["tokens"], of["ratio"], of["ratio_squared"]),
        "sequence_ess": _effective_share(of["sequences"], of["sequence_ratio"], of["sequence_ratio_squared"]),
        "outside_frac": of["outside"] / tokens,
        "negative_masked_frac": of["negative_masked"] / tokens,
        "rejected_frac": of["rejected"] / tokens,
    }
    for name, share in QUANTILES.items():
        curves[f"ratio_{name}"] = _ratio_quantile(histogram, share)
    for age in range(OLDEST_AGE + 1):
        if of[f"age_{age}_tokens"]:
            curves[f"age_{age}_ratio_mean"] = of[f"age_{age}_ratio"] / of[f"age_{age}_tokens"]
            curves[f"age_{age}_kl"] = of[f"age_{age}_k3"] / of[f"age_{age}_tokens"]
    return {f"mismatch/{name}": value for name, value in curves.items()}


def _counted(values: Tensor, places: Tensor, number: int) -> Tensor:
    return values.new_zeros(number).index_add(0, places, values)


def _effective_share(number: float, total: float, total_of_squares: float) -> float:
    return total**2 / (number * total_of_squares) if number else 1.0


def _ratio_quantile(histogram: NDArray[np.float64], share: float) -> float:
    """The ratio below which `share` of the tokens are, as if those of one bin were spread over it; 1 without tokens."""
    filled = np.cumsum(histogram)
    if not filled[-1]:
        return 1.0
    wanted = share * filled[-1]
    place = int(np.searchsorted(filled, wanted))
    inside = (wanted - filled[place] + histogram[place]) / histogram[place]
    return math.exp(BIN_SCALE * math.sinh((place + inside) * BIN_WIDTH - BIN_LIMIT))
