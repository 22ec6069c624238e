"""KL between the policy and the reference model: estimates per token, and the coefficient they are weighed with.

Runs in every learner rank. Pure, but for `AdaptiveKl`, whose value is the one thing here that outlives a step: every
rank gives it the same numbers, and it goes into the checkpoint.

Legend: K tokens inside the loss of one micro-batch, L tokens of one completion, d = logprob - reference logprob.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocol.types import Logprobs

KlForm = Literal["k1", "k2", "k3", "abs"]

MAX_LOG_RATIO = 20.0  # reference over policy, of k3, before exp
MAX_K3 = 10.0  # of k3 itself
MAX_KL_ERROR = 0.2  # relative distance to the target that one update of the coefficient sees


def kl_penalty(
    form: KlForm,
    straight_through: bool,
    logprobs: Tensor,
    reference_logprobs: Tensor,
    ratio: Tensor | None,
) -> Tensor:
    """Estimate [K] of KL(policy || reference) from each token, with its gradient, for the loss.

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1 (Schulman 2020, "Approximating KL divergence"), abs = |d|. We deviate as
    verl does: -d is at most 20 in k3, and k3 at most 10, which is d < -2.6 or d > 11; there it has no gradient.
    The others are not clamped.

    Where the policy itself sampled, the means of k1 and k3 are the KL, but the means of their gradients are not its
    gradient: that of k1 is 0 and that of k3 belongs to KL(reference || policy). The gradient of k2 is the KL's. Hence
    `straight_through`: the value of `form` with the gradient of k2, d (also where k3 is clamped).

    `ratio` [K], current policy over the one that sampled, makes the mean one over the current policy's tokens
    (DeepSeek-V3.2, "Unbiased KL estimate"). It keeps its gradient: the product rule then gives the gradient of the
    form's mean under the current policy, for k1 and k3 that of the KL. With `straight_through` the form brings the KL's
    gradient already, and the ratio is a plain weight: it is detached. TRL's use_bias_correction_kl has no such case.
    """
    estimate = _estimate(form, logprobs, reference_logprobs)
    if straight_through:
        gradient_of = _estimate("k2", logprobs, reference_logprobs)
        estimate = estimate.detach() + gradient_of - gradient_of.detach()
    if ratio is None:
        return estimate
    return estimate * (ratio.detach() if straight_through else ratio)


def _estimate(form: KlForm, logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    difference = logprobs - reference_logprobs
    if form == "k1":
        return difference
    if form == "k2":
        return 0.5 * difference.square()
    if form == "abs":
        return difference.abs()
    clamped = difference.clamp(min=-MAX_LOG_RATIO)  # exp would overflow, and 0 times its slope be NaN
    return (torch.expm1(-clamped) + clamped).clamp(max=MAX_K3)  # expm1: near 0, float32 has no digits left of exp - 1


def reward_kl(
    proximal_logprobs: Logprobs, reference_logprobs: Logprobs, in_loss: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """k1 [L] of each token, for the reward: proximal - reference log-probability, and 0 outside the loss.

    All arguments are [L]; what stands at places outside the loss does not matter. To be taken off the token's reward,
    times the coefficient (Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", eq. 2, per token).
    """
    difference = proximal_logprobs.astype(np.float64) - reference_logprobs
    return np.where(in_loss, difference, 0.0)


class AdaptiveKl:
    """The coefficient of the KL: fixed where `target` is 0, else led so that the KL per token comes to `target`."""

    def __init__(self, value: float, target: float, horizon: int) -> None:
        self.value = value
        self._target = target
        self._horizon = horizon

    def update(self, kl: float, num_sequences: int) -> None:
        """value *= 1 + clip(kl / target - 1, -0.2, 0.2) * num_sequences / horizon.

        The proportional controller of Ziegler et al. 2019 (section 2.2). `kl` is the mean over the tokens of a batch of
        `num_sequences` completions. We deviate twice: num_sequences / horizon counts at most 1, because a large batch
        would else turn the sign of the coefficient, and a KL that is not finite (of a skipped step) changes nothing.
        """
        if self._target == 0 or not math.isfinite(kl):
            return
        error = min(max(kl / self._target - 1.0, -MAX_KL_ERROR), MAX_KL_ERROR)
        self.value *= 1.0 + error * min(num_sequences / self._horizon, 1.0)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from `state`; a fixed coefficient stays as the settings have it."""
        if self._target:
            self.value = state["value"]
