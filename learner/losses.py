"""The losses that `Policy.update` takes, and the curves made of what they count. Pure tensors in, tensors out.

Runs in every learner rank. `PolicyLoss` is the algorithm's: of each token, what `surrogates.py` makes of its ratio and
advantage, times its off-policy correction, plus the KL to the reference, minus the entropy bonus. Tokens are added up
with the weights of `aggregation.py`, so the losses of micro-batches and ranks add up to that of the mini-batch, however
it was cut. `SupervisedLoss` is that of the warm start.

Legend: K tokens inside the loss of one micro-batch, as packed by `batches.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from learner import surrogates
from learner.aggregation import Aggregation, Totals, token_weights
from learner.batches import MicroBatch
from learner.kl import kl_penalty
from learner.surrogates import Surrogate, token_log_ratio
from protocol.algorithm import AlgorithmConfig, KlConfig

LossAndSums = tuple[Tensor, dict[str, Tensor]]


class PolicyLoss:
    """The loss of one mini-batch as `Policy.update` wants it."""

    def __init__(self, settings: AlgorithmConfig, kl: KlConfig, kl_coef: float, aggregation: Aggregation) -> None:
        """`kl_coef` is the coefficient of now, which follows `kl.target` where there is one."""
        self._settings = settings
        self._kl = kl
        self._kl_coef = kl_coef
        self._aggregation = aggregation

    def __call__(self, logprobs: Tensor, entropies: Tensor, batch: MicroBatch) -> LossAndSums:
        """This micro-batch's part of the loss, and sums over its tokens, unweighted, for `policy_curves`.

        `logprobs` [K] and `entropies` [K] are the current policy's; the latter need a gradient for an entropy bonus.
        """
        surrogate, corrections = self._surrogate(logprobs, batch)
        per_token = surrogate.per_token * corrections
        sums = _policy_sums(surrogate, logprobs.detach(), entropies.detach(), batch)
        if self._kl.coef > 0 and self._kl.place == "loss":
            penalty = self._kl_penalty(logprobs, batch)
            per_token = per_token + self._kl_coef * penalty
            sums["kl_reference"] = penalty.detach().sum()
        if self._settings.entropy_coef > 0:
            per_token = per_token - self._settings.entropy_coef * entropies
        return (per_token * self._aggregation.weights(batch.sequence_lengths)).sum(), sums

    def _surrogate(self, logprobs: Tensor, batch: MicroBatch) -> tuple[Surrogate, Tensor]:
        """The policy's loss per token, and the corrections [K] it is multiplied by.

        DPPO's ratio is that of the current policy and the one that sampled, so it corrects by itself: of the
        corrections it takes only what they leave out.
        """
        settings, advantages = self._settings, batch.advantages
        clips = settings.clip_low, settings.clip_high
        older = batch.behavior_logprobs if settings.ratio == "behavior" else batch.proximal_logprobs
        corrections = batch.corrections
        match settings.loss:
            case "ppo":
                return surrogates.ppo(logprobs, older, advantages, *clips, settings.dual_clip), corrections
            case "gspo":
                means = surrogates.sequence_means(
                    (logprobs - older).detach(), batch.sequence_ids, batch.sequence_lengths, batch.num_sequences
                )
                return surrogates.gspo(logprobs, means, advantages, *clips, settings.dual_clip), corrections
            case "cispo":
                return surrogates.cispo(logprobs, older, advantages, *clips), corrections
            case "sapo":
                taus = settings.sapo_tau_positive, settings.sapo_tau_negative
                return surrogates.sapo(logprobs, older, advantages, *taus), corrections
            case "reinforce":
                return surrogates.reinforce(logprobs, advantages), corrections
        dppo = surrogates.dppo_tv if settings.loss == "dppo_tv" else surrogates.dppo_kl
        kept = (corrections != 0).to(corrections.dtype)
        return dppo(logprobs, batch.behavior_logprobs, advantages, settings.dppo_bound), kept

    def _kl_penalty(self, logprobs: Tensor, batch: MicroBatch) -> Tensor:
        """KL to the reference [K]; `with_ratio` multiplies by the ratio to the policy that sampled the token."""
        ratio = token_log_ratio(logprobs, batch.behavior_logprobs).exp() if self._kl.with_ratio else None
        return kl_penalty(self._kl.form, self._kl.straight_through, logprobs, batch.reference_logprobs, ratio)


def _policy_sums(surrogate: Surrogate, logprobs: Tensor, entropies: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
    log_ratio = token_log_ratio(logprobs, batch.proximal_logprobs)
    ratio = log_ratio.exp()
    return {
        "tokens": torch.ones_like(ratio).sum(),
        "clipped_low": surrogate.low.sum(),
        "clipped_high": surrogate.high.sum(),
        "clipped_dual": surrogate.dual.sum(),
        "entropy": entropies.sum(),
        "k1": -log_ratio.sum(),
        "ratio": ratio.sum(),
        "ratio_squared": ratio.square().sum(),
    }


def policy_curves(sums: Mapping[str, float]) -> dict[str, float]:
    """Curves of one update from the sums of `PolicyLoss` over all ranks.

    `policy/kl` (k1, Schulman 2020) and the ratio are those of the proximal policy against the current one; what lies
    between generators and proximal policy is in `mismatch.py`. `policy/kl_reference` is the penalty as the settings
    form it, before its coefficient; NaN where no token is in the loss, so that an adaptive coefficient stays.
    """
    tokens = max(sums["tokens"], 1.0)
    mean = sums["ratio"] / tokens
    curves = {
        "policy/loss": sums["loss"],
        "policy/kl": sums["k1"] / tokens,
        "policy/entropy": sums["entropy"] / tokens,
        "policy/clip_frac_low": sums["clipped_low"] / tokens,
        "policy/clip_frac_high": sums["clipped_high"] / tokens,
        "policy/clip_frac_dual": sums["clipped_dual"] / tokens,
        "policy/ratio_mean": mean,
        "policy/ratio_std": math.sqrt(max(sums["ratio_squared"] / tokens - mean**2, 0.0)),
    }
    if "kl_reference" in sums:
        curves["policy/kl_reference"] = sums["kl_reference"] / tokens if sums["tokens"] else math.nan
    return curves


class SupervisedLoss:
    """Mean negative log-probability over the answer tokens of one batch."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def __call__(self, logprobs: Tensor, entropies: Tensor, batch: MicroBatch) -> LossAndSums:
        loss = -(logprobs * token_weights(batch.sequence_lengths, "token_mean", self._totals)).sum()
        return loss, {"tokens": torch.ones_like(logprobs).sum(), "entropy": entropies.detach().sum()}
