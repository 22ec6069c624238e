"""Policy losses per token: what holds the policy near an older one. Pure tensors in, tensors out; one function each.

Runs in every learner rank. The older policy is the proximal one, whose log-probabilities were taken before the batch's
first update; how far that one is from the policy that sampled is the business of `corrections.py`. DPPO alone is
held to the policy that sampled (`losses.PolicyLoss`). No function adds anything up: `aggregation.py` has the weights.

Legend: K tokens inside the loss of one micro-batch. lp: log-probability now, lp': of the older policy, A: advantage,
r = exp(lp - lp'), sg: without gradient. Every argument without a unit is [K].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log ratios are clamped to +-20 before exp, beyond which they have no gradient: a ratio stays below 5e8."""

MAX_SEQUENCE_LOG_RATIO = 10.0
"""The same for the log of a sequence's ratio, above only."""

MAX_DETACHED_RATIO = 20.0
"""DPPO's ratio is a factor without gradient and counts at most this much."""

MIN_COMPLEMENT = 1e-8
"""Least 1 - probability, so that the divergence of a token that became certain is finite."""


class Surrogate(NamedTuple):
    """Losses [K] of tokens, and masks [K] of those whose gradient a bound cut off or, for CISPO, changed."""

    per_token: Tensor
    low: Tensor  # by the bound below
    high: Tensor  # by the bound above
    dual: Tensor  # by the second bound above, of negative advantages


def token_log_ratio(logprobs: Tensor, older_logprobs: Tensor) -> Tensor:
    """lp - lp' [K], clamped to +-20."""
    return (logprobs - older_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ppo(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> Surrogate:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and for A < 0 at most -A dual_clip.

    Clipped surrogate (Schulman et al. 2017, eq. 7) with the two bounds of DAPO (Yu et al. 2025, eq. 10) and the dual
    clip (Ye et al. 2020, "Mastering Complex Control in MOBA Games", eq. 3); `dual_clip` 0: none. Where dual_clip is at
    least 1 + clip_high this is the two-sided clip, min(r, delta) before everything, that TRL calls delta.
    """
    ratio = token_log_ratio(logprobs, proximal_logprobs).exp()
    return _clipped(ratio, advantages, clip_low, clip_high, dual_clip)


def sequence_means(values: Tensor, sequence_ids: Tensor, sequence_lengths: Tensor, num_sequences: int) -> Tensor:
    """Mean [K] of `values` over the token's own sequence; `sequence_ids` int64 are 0 to `num_sequences` - 1."""
    sums = values.new_zeros(num_sequences).index_add(0, sequence_ids, values)
    return sums[sequence_ids] / sequence_lengths


def gspo(
    logprobs: Tensor,
    mean_log_ratios: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> Surrogate:
    """PPO's clip on s = exp(m + lp - sg(lp)), m = `mean_log_ratios`: of lp - lp' over the token's sequence, detached.

    The ratio of a sequence is the geometric mean of its tokens' ratios, not their product (Zheng et al. 2025, "Group
    Sequence Policy Optimization", eq. 7); s is their token form (eq. 13): the value of the sequence's ratio with the
    gradient of one token. With one advantage per sequence and the aggregation sequence_mean_token_mean, which is the
    paper's, the gradient is exactly that of the sequence's ratio. The mean is over the tokens in the loss, whatever
    their correction. log s is clamped to at most 10.
    """
    log_ratio = (mean_log_ratios + (logprobs - logprobs.detach())).clamp(max=MAX_SEQUENCE_LOG_RATIO)
    return _clipped(log_ratio.exp(), advantages, clip_low, clip_high, dual_clip)


def cispo(
    logprobs: Tensor, proximal_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Surrogate:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A lp: the ratio is a bounded weight, and no token loses its gradient.

    MiniMax 2025, "MiniMax-M1", eq. 4 and 5. The bounds are distances from 1, as in the paper; TRL's and ms-swift's
    epsilon_high is the largest ratio itself (clip_high = epsilon_high - 1), and they have no lower bound (clip_low 1).
    """
    ratio = token_log_ratio(logprobs, proximal_logprobs).exp().detach()
    per_token = -ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages * logprobs
    return Surrogate(per_token, ratio < 1.0 - clip_low, ratio > 1.0 + clip_high, _none(ratio))


def sapo(
    logprobs: Tensor, proximal_logprobs: Tensor, advantages: Tensor, tau_positive: float, tau_negative: float
) -> Surrogate:
    """-A 4/tau sigmoid(tau (r - 1)): the gradient fades with the distance of r from 1 instead of ending at a bound.

    Gao et al. 2025, "Soft Adaptive Policy Optimization" (arXiv 2511.20347); tau is `tau_positive` for A > 0, else
    `tau_negative`. At r = 1 the gradient is that of PPO; the value is not, by a constant.
    """
    ratio = token_log_ratio(logprobs, proximal_logprobs).exp()
    positive = -advantages * torch.sigmoid(tau_positive * (ratio - 1.0)) * (4.0 / tau_positive)
    negative = -advantages * torch.sigmoid(tau_negative * (ratio - 1.0)) * (4.0 / tau_negative)
    return _unbounded(torch.where(advantages > 0, positive, negative))


def dppo_tv(logprobs: Tensor, behavior_logprobs: Tensor, advantages: Tensor, bound: float) -> Surrogate:
    """-A sg(min(r, 20)) lp, without tokens whose probability moved by more than `bound` the way A pushes it.

    Qi et al. 2026, "Rethinking the Trust Region in LLM Reinforcement Learning" (arXiv 2602.04879), binary total
    variation: |p - p'|, against the policy that sampled.
    """
    with torch.no_grad():
        beyond = (logprobs.exp() - behavior_logprobs.exp()).abs() > bound
    return _within_divergence(logprobs, behavior_logprobs, advantages, beyond)


def dppo_kl(logprobs: Tensor, behavior_logprobs: Tensor, advantages: Tensor, bound: float) -> Surrogate:
    """`dppo_tv` with the KL divergence of "this token or any other": p' log(p'/p) + (1 - p') log((1 - p')/(1 - p)).

    Same paper, binary KL. 1 - p is taken as at least 1e-8.
    """
    with torch.no_grad():
        others_now = (-torch.expm1(logprobs)).clamp(min=MIN_COMPLEMENT)
        others_then = (-torch.expm1(behavior_logprobs)).clamp(min=MIN_COMPLEMENT)
        divergence = behavior_logprobs.exp() * (behavior_logprobs - logprobs)
        divergence = divergence + others_then * (others_then.log() - others_now.log())
    return _within_divergence(logprobs, behavior_logprobs, advantages, divergence > bound)


def reinforce(logprobs: Tensor, advantages: Tensor) -> Surrogate:
    """-A lp (Williams 1992): nothing holds the policy but the correction of the token and the learning rate."""
    return _unbounded(-advantages * logprobs)


def _clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float) -> Surrogate:
    negative = advantages < 0
    per_token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high))
    low, high, dual = negative & (ratio < 1.0 - clip_low), (advantages > 0) & (ratio > 1.0 + clip_high), _none(ratio)
    if dual_clip > 0:
        per_token = torch.where(negative, torch.minimum(per_token, -advantages * dual_clip), per_token)
        dual = negative & (ratio > dual_clip)
    return Surrogate(per_token, low, high, dual)


def _within_divergence(logprobs: Tensor, older_logprobs: Tensor, advantages: Tensor, beyond: Tensor) -> Surrogate:
    ratio = token_log_ratio(logprobs, older_logprobs).exp().clamp(max=MAX_DETACHED_RATIO).detach()
    low = beyond & (advantages < 0) & (logprobs < older_logprobs)
    high = beyond & (advantages > 0) & (logprobs > older_logprobs)
    per_token = torch.where(low | high, 0.0, -advantages * ratio * logprobs)
    return Surrogate(per_token, low, high, _none(ratio))


def _unbounded(per_token: Tensor) -> Surrogate:
    none = _none(per_token)
    return Surrogate(per_token, none, none, none)


def _none(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool)
