"""Off-policy corrections: what a token's policy loss counts, given who sampled it.

Runs in every learner rank, once per batch: the weights are constants of all its mini-batches and epochs. Three
policies are told apart (decoupled PPO; Hilton et al. 2022, "Batch size-invariance for policy optimization"; Fu et al.
2025, "AReaL"): *behavior* sampled the token, with the weights of its time and an engine that rounds differently,
*proximal* is the policy before the batch's first update, *current* the one that is being trained. The clip of
`losses.py` holds current near proximal; the weights here stand for proximal against behavior.

A weight of 0 leaves the token's policy loss out, but the loss is still divided by the original number of tokens: a
batch that is mostly left out makes a small step, not a noisy one. Every token has its own behavior log-probability, so
a completion that several policy versions wrote needs no case of its own.

Legend: K tokens inside the loss, of n whole sequences with at least one of them each, as packed in a micro-batch.
ratio = exp(proximal - behavior log-probability).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from protocol.algorithm import CorrectionsConfig

MAX_LOG_RATIO = 20.0  # before exp, of a token or of a sequence


class Corrections(NamedTuple):
    """What the tokens of some sequences count, and why; without gradient."""

    weights: Tensor  # [K] factor of the policy loss
    outside: Tensor  # [K] bool: the ratio that decides, of the token or its sequence, is outside [low, high]
    negative_masked: Tensor  # [K] bool: left out by negative_kl_mask


@torch.no_grad()
def corrections(
    settings: CorrectionsConfig,
    behavior_logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
) -> Corrections:
    """Weights of tokens by importance ratio, bounded, and 0 where `negative_kl_mask` leaves a token out.

    Tensors are [K]; `sequence_ids` 0 .. num_sequences - 1. No log-probability is NaN: tokens without one are not among
    the K (`Row.kept`), and the broker refuses a completion that lacks more than 1% of them (`broker/checks.py`).

    weight "token": the token's own ratio; "sequence": that of its sequence, the same for all its tokens; "none": 1.
    bound "truncate": clamp(ratio, low, high) (Espeholt et al. 2018, "IMPALA", section 4.1, truncates above only; today
    called TIS); "mask": the ratio inside [low, high] and 0 outside (IcePop; Ring-1T, 2025).

    negative_kl_mask: a token of negative advantage counts 0 if its sequence's mean of behavior - proximal
    log-probability exceeds it (DeepSeek-V3.2, "Off-policy sequence masking"). We deviate in taking the mean against the
    proximal policy, where theirs follows the current one from mini-batch to mini-batch.
    """
    log_ratios = (proximal_logprobs - behavior_logprobs).double()
    if settings.weight == "sequence":
        deciding = sequence_log_ratios(settings, log_ratios, sequence_ids, num_sequences)[sequence_ids]
    else:
        deciding = log_ratios
    ratios = deciding.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    outside = (ratios < settings.low) | (ratios > settings.high)
    if settings.weight == "none":
        weights = torch.ones_like(ratios)
    elif settings.bound == "truncate":
        weights = ratios.clamp(settings.low, settings.high)
    else:
        weights = ratios.masked_fill(outside, 0.0)
    negative_masked = torch.zeros_like(outside)
    if settings.negative_kl_mask:
        kl = -_sequence_means(log_ratios, sequence_ids, num_sequences)[sequence_ids]
        negative_masked = (advantages < 0) & (kl > settings.negative_kl_mask)
    weights = weights.masked_fill(negative_masked, 0.0)
    return Corrections(weights.to(proximal_logprobs.dtype), outside, negative_masked)


def sequence_log_ratios(
    settings: CorrectionsConfig, log_ratios: Tensor, sequence_ids: Tensor, num_sequences: int
) -> Tensor:
    """Log ratio [n] of each sequence, from `log_ratios` [K] of tokens.

    "product" is the ratio of the whole sequence's probabilities: their sum (verl, TRL). "geometric_mean" is its root by
    length: their mean (ms-swift, AReaL; GSPO's ratio).
    """
    if settings.sequence_ratio == "product":
        return _sequence_sums(log_ratios, sequence_ids, num_sequences)
    return _sequence_means(log_ratios, sequence_ids, num_sequences)


def _sequence_means(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    lengths = _sequence_sums(torch.ones_like(values), sequence_ids, num_sequences)
    return _sequence_sums(values, sequence_ids, num_sequences) / lengths


def _sequence_sums(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    return values.new_zeros(num_sequences).index_add(0, sequence_ids, values)
