"""Log-probabilities -> a loss and the sums its curves are made of. Pure tensors in, tensors out.

Runs in every learner rank. Every token has a weight whose denominator is that of the whole batch on all ranks, so
adding up the losses of micro-batches and ranks gives the loss of the batch, however it was cut. That promise rests on
`token_weights`.

Legend: K tokens inside the loss of one micro-batch, as packed by `batches.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from learner.batches import MicroBatch
from protocol.config import AlgorithmConfig

MAX_LOG_RATIO = 20.0

LossAndSums = tuple[Tensor, dict[str, Tensor]]


class Totals(NamedTuple):
    """What the whole batch has, on all ranks."""

    tokens: float  # inside the loss
    sequences: float  # with a token inside the loss


def token_weights(sequence_lengths: Tensor, aggregation: str, totals: Totals) -> Tensor:
    """Weight [K] of each token in the loss; over the whole batch they add up to 1.

    "token_mean": every token the same. "sequence_mean": every sequence the same, and the tokens of one the same.
    `sequence_lengths` [K]: tokens inside the loss of the token's own sequence.
    """
    if aggregation == "token_mean":
        return torch.full_like(sequence_lengths, 1.0 / max(totals.tokens, 1.0))
    assert aggregation == "sequence_mean", aggregation
    return 1.0 / (sequence_lengths * max(totals.sequences, 1.0))


def clipped_ratio_loss(
    logprobs: Tensor,
    entropies: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float,
    clip_high: float,
) -> LossAndSums:
    """Sum over tokens of weight * max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)).

    r = exp(logprob - behavior logprob). PPO's clipped surrogate (Schulman et al. 2017, eq. 7) per token, with the two
    bounds of DAPO (Yu et al. 2025, eq. 10). The denominator of r is the generator's own log-probability, so the clip
    holds the policy near the one that sampled. All arguments are [K]; the log ratio is clamped to +-20 before exp. Sums
    are over tokens, unweighted; `averages` says what becomes of them.
    """
    log_ratio = (logprobs - behavior_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    per_token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high))
    with torch.no_grad():
        sums = {
            "tokens": torch.ones_like(ratio).sum(),
            "clipped_low": ((advantages < 0) & (ratio < 1.0 - clip_low)).sum(),
            "clipped_high": ((advantages > 0) & (ratio > 1.0 + clip_high)).sum(),
            "entropy": entropies.sum(),
            "k1": -log_ratio.sum(),
            "k3": (ratio - 1.0 - log_ratio).sum(),
            "ratio": ratio.sum(),
            "ratio_squared": ratio.square().sum(),
        }
    return (per_token * weights).sum(), sums


class GrpoLoss:
    """The clipped-ratio loss of one batch as `Policy.update` wants it."""

    def __init__(self, settings: AlgorithmConfig, totals: Totals) -> None:
        self._settings = settings
        self._totals = totals

    def __call__(self, logprobs: Tensor, entropies: Tensor, batch: MicroBatch) -> LossAndSums:
        weights = token_weights(batch.sequence_lengths, self._settings.aggregation, self._totals)
        return clipped_ratio_loss(
            logprobs,
            entropies,
            batch.behavior_logprobs,
            batch.advantages,
            weights,
            self._settings.clip_low,
            self._settings.clip_high,
        )


class SupervisedLoss:
    """Mean negative log-probability over the answer tokens of one batch."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def __call__(self, logprobs: Tensor, entropies: Tensor, batch: MicroBatch) -> LossAndSums:
        loss = -(logprobs * token_weights(batch.sequence_lengths, "token_mean", self._totals)).sum()
        return loss, {"tokens": torch.ones_like(logprobs).sum(), "entropy": entropies.detach().sum()}


def averages(sums: Mapping[str, float]) -> dict[str, float]:
    """Curves of one update from the sums of `clipped_ratio_loss` over all ranks.

    KL is that of the sampling policy against the current one: k1 = -log r and k3 = r - 1 - log r (Schulman 2020,
    "Approximating KL divergence"). ess is (sum r)^2 / (n sum r^2), 1 when every ratio is the same.
    """
    tokens = max(sums["tokens"], 1.0)
    return {
        "policy/loss": sums["loss"],
        "policy/kl": sums["k1"] / tokens,
        "policy/entropy": sums["entropy"] / tokens,
        "policy/clip_frac_low": sums["clipped_low"] / tokens,
        "policy/clip_frac_high": sums["clipped_high"] / tokens,
        "mismatch/kl": sums["k3"] / tokens,
        "mismatch/ratio_mean": sums["ratio"] / tokens,
        "mismatch/ess": sums["ratio"] ** 2 / max(tokens * sums["ratio_squared"], 1e-30),
    }
