"""The critic's loss: how far values are from returns, clipped around the values before the batch. Pure tensors.

Runs in every learner rank. Tokens are weighted as in the policy's loss (`aggregation.py`), so the loss does not depend
on micro-batches, packing or ranks.

Legend: K tokens inside the loss of one micro-batch. Values and returns have the unit of the rewards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from learner.aggregation import Aggregation
from learner.batches import MicroBatch
from protocol.algorithm import CriticConfig

HUBER_DELTA = 10.0
"""Distance from the return beyond which the Huber loss is linear."""

ROUNDING = 1e-12
"""What rounding leaves of the variance of equal returns, of their mean square."""


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float, kind: str) -> tuple[Tensor, Tensor]:
    """max(d(v, R), d(clip(v, v_old - clip, v_old + clip), R)) [K], and the mask [K] of where the second is the larger.

    d is half the squared distance, or the Huber loss of delta 10, which is the same up to a distance of 10. The clip is
    that of PPO's reference implementation; its paper (Schulman et al. 2017) has none. `clip` 0: no clipping.
    """
    unclipped = _distance(values, returns, kind)
    if clip == 0:
        return unclipped, torch.zeros_like(values, dtype=torch.bool)
    bounded = values.clamp(old_values - clip, old_values + clip)  # to the bit `values` inside, or rounding would count
    clipped = _distance(bounded, returns, kind)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def _distance(values: Tensor, returns: Tensor, kind: str) -> Tensor:
    if kind == "huber":
        return huber_loss(values, returns, reduction="none", delta=HUBER_DELTA)
    assert kind == "squared", kind
    return 0.5 * (values - returns).square()


class ValueLoss:
    """The value loss of one mini-batch: (values [K], micro-batch) -> its part of the loss, and sums to add up."""

    def __init__(self, settings: CriticConfig, aggregation: Aggregation) -> None:
        self._settings = settings
        self._aggregation = aggregation

    def __call__(self, values: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """`values` are the critic's now; `batch` has those before the batch, and the returns."""
        per_token, clipped = value_loss(values, batch.values, batch.returns, self._settings.clip, self._settings.loss)
        errors, returns = (batch.returns - batch.values).double(), batch.returns.double()
        sums = {
            "tokens": torch.ones_like(returns).sum(),
            "clipped": clipped.sum(),
            "value": values.detach().sum(),
            "return": returns.sum(),
            "return_squared": returns.square().sum(),
            "error": errors.sum(),
            "error_squared": errors.square().sum(),
        }
        return (per_token * self._aggregation.weights(batch.sequence_lengths)).sum(), sums


def value_curves(sums: Mapping[str, float]) -> dict[str, float]:
    """Curves of one critic update from the sums of `ValueLoss` over all ranks.

    The explained variance 1 - Var(R - V) / Var(R) is that of the values before the batch, which made the advantages:
    later ones have seen the returns. It is NaN where all returns are equal.
    """
    tokens = max(sums["tokens"], 1.0)
    mean_square = sums["return_squared"] / tokens
    variance = mean_square - (sums["return"] / tokens) ** 2
    unexplained = sums["error_squared"] / tokens - (sums["error"] / tokens) ** 2
    return {
        "critic/loss": sums["loss"],
        "critic/clip_frac": sums["clipped"] / tokens,
        "critic/value_mean": sums["value"] / tokens,
        "critic/return_mean": sums["return"] / tokens,
        "critic/explained_variance": 1.0 - unexplained / variance if variance > ROUNDING * mean_square else math.nan,
    }
