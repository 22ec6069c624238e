"""KL estimates, their gradients and the coefficient against scalar derivations, on both sides of each clamp."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from learner.kl import AdaptiveKl, KlForm, kl_penalty, reward_kl

FORMS: tuple[KlForm, ...] = ("k1", "k2", "k3", "abs")
# log-probability minus reference: beyond both clamps of the log ratio, around both places where k3 is 10, and between
DIFFERENCES = [-800.0, -25.0, -20.1, -19.9, -2.7, -2.5, -0.3, 0.0, 0.4, 10.9, 11.1, 19.9, 20.1, 25.0]


def slow_value(form: KlForm, d: float) -> float:
    if form == "k1":
        return d
    if form == "k2":
        return d * d / 2.0
    if form == "abs":
        return d if d > 0 else -d
    d = max(-20.0, min(20.0, d))
    return min(math.exp(-d) - 1.0 + d, 10.0)


def slow_slope(form: KlForm, d: float) -> float:
    """d value / d logprob."""
    if form == "k1":
        return 1.0
    if form == "k2":
        return d
    if form == "abs":
        return math.copysign(1.0, d) if d else 0.0
    clamped = abs(d) > 20.0 or math.exp(-d) - 1.0 + d > 10.0
    return 0.0 if clamped else 1.0 - math.exp(-d)


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("with_ratio", [False, True])
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_estimate_and_gradient_equal_a_scalar_derivation(
    form: KlForm, straight_through: bool, with_ratio: bool, difference: float
) -> None:
    logprob, sampled_with = -2.0, -2.4
    logprobs = torch.tensor([logprob], dtype=torch.float64, requires_grad=True)
    references = torch.tensor([logprob - difference], dtype=torch.float64)
    ratio = (logprobs - sampled_with).exp() if with_ratio else None
    estimate = kl_penalty(form, straight_through, logprobs, references, ratio)
    estimate.sum().backward()

    weight = math.exp(logprob - sampled_with) if with_ratio else 1.0
    value = slow_value(form, difference)
    slope = difference if straight_through else slow_slope(form, difference)
    if with_ratio and not straight_through:
        slope += value  # of the ratio: its slope is itself
    assert estimate.item() == pytest.approx(weight * value, rel=1e-9, abs=1e-9)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(weight * slope, rel=1e-9, abs=1e-9)


class Vocabulary:
    """Three distributions over five tokens, so that means are sums and nothing has to be sampled."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        logits, sampling, reference = torch.randn(3, 5, generator=generator, dtype=torch.float64)
        self.logits = logits.requires_grad_()
        self.logprobs = self.logits.log_softmax(-1)
        self.sampling_logprobs = sampling.log_softmax(-1)
        self.reference_logprobs = reference.log_softmax(-1)

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, self.logits, retain_graph=True)[0]

    def mean(self, form: KlForm, straight_through: bool, off_policy: bool) -> torch.Tensor:
        """Mean of the estimate over the tokens that the policy itself samples, or another policy with the ratio."""
        sampler = (self.sampling_logprobs if off_policy else self.logprobs).detach().exp()
        ratio = (self.logprobs - self.sampling_logprobs).exp() if off_policy else None
        estimate = kl_penalty(form, straight_through, self.logprobs, self.reference_logprobs, ratio)
        return (sampler * estimate).sum()

    def kl(self) -> torch.Tensor:
        return (self.logprobs.exp() * (self.logprobs - self.reference_logprobs)).sum()

    def reverse_kl(self) -> torch.Tensor:
        return (self.reference_logprobs.exp() * (self.reference_logprobs - self.logprobs)).sum()


def test_the_gradients_on_policy_are_the_ones_the_docstring_names() -> None:
    v = Vocabulary()
    torch.testing.assert_close(v.gradient(v.mean("k1", False, False)), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(v.gradient(v.mean("k2", False, False)), v.gradient(v.kl()))
    torch.testing.assert_close(v.gradient(v.mean("k3", False, False)), v.gradient(v.reverse_kl()))


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_straight_through_has_the_gradient_of_the_kl_with_and_without_the_ratio(form: KlForm, off_policy: bool) -> None:
    v = Vocabulary()
    torch.testing.assert_close(v.gradient(v.mean(form, True, off_policy)), v.gradient(v.kl()))


@pytest.mark.parametrize("form", ["k1", "k3"])
def test_with_the_ratio_other_policies_tokens_give_value_and_gradient_of_the_kl(form: KlForm) -> None:
    v = Vocabulary()
    mean = v.mean(form, False, True)
    torch.testing.assert_close(mean, v.kl())
    torch.testing.assert_close(v.gradient(mean), v.gradient(v.kl()))


def test_k3_keeps_its_digits_in_float32_where_the_policies_almost_agree() -> None:
    difference = 2.0**-13  # exact in float32
    logprobs = torch.tensor([-1.0])
    (estimate,) = kl_penalty("k3", False, logprobs, logprobs - difference, None).tolist()
    assert estimate == pytest.approx(slow_value("k3", difference), rel=1e-3)


def test_kl_of_no_token_is_no_token() -> None:
    logprobs = torch.zeros(0, requires_grad=True)
    assert kl_penalty("k3", True, logprobs, torch.zeros(0), logprobs.exp()).shape == (0,)


def test_the_kl_for_the_reward_is_k1_inside_the_loss_and_zero_outside() -> None:
    proximal = np.array([-1.0, -2.0, -3.0, np.nan], dtype=np.float32)
    reference = np.array([-1.5, -1.25, np.nan, -1.0], dtype=np.float32)
    wanted = [0.5, -0.75, 0.0, 0.0]
    assert reward_kl(proximal, reference, np.array([True, True, False, False])).tolist() == wanted


def slow_coefficients(value: float, target: float, horizon: int, kls: list[float], number: int) -> Iterator[float]:
    for kl in kls:
        error = kl / target - 1.0
        error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
        value = value * (1.0 + error * number / horizon)
        yield value


def test_the_coefficient_follows_the_controllers_formula_on_both_sides_of_its_clip() -> None:
    kls = [0.05, 0.5, 0.1, 0.11, 0.09, 0.119, 0.121, 0.079, 0.081, -0.3]
    controller = AdaptiveKl(0.02, 0.1, 1000)
    for kl, wanted in zip(kls, slow_coefficients(0.02, 0.1, 1000, kls, 64), strict=True):
        controller.update(kl, 64)
        assert controller.value == pytest.approx(wanted, rel=1e-12)


def test_without_a_target_the_coefficient_is_fixed_also_when_restored() -> None:
    controller = AdaptiveKl(0.02, 0.0, 10)
    controller.update(5.0, 64)
    controller.restore({"value": 0.5})
    assert controller.value == 0.02


def test_a_batch_larger_than_the_horizon_does_not_turn_the_coefficients_sign() -> None:
    controller = AdaptiveKl(0.02, 0.1, 10)
    controller.update(0.0, 1000)
    assert controller.value == pytest.approx(0.02 * 0.8, rel=1e-12)


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_not_finite_leaves_the_coefficient(kl: float) -> None:
    controller = AdaptiveKl(0.02, 0.1, 100)
    controller.update(kl, 64)
    assert controller.value == 0.02


def test_a_restored_controller_goes_on_where_the_other_stood() -> None:
    one, other = AdaptiveKl(0.02, 0.1, 100), AdaptiveKl(0.9, 0.1, 100)
    one.update(0.3, 17)
    other.restore(one.state())
    for controller in (one, other):
        controller.update(0.07, 17)
    assert one.value == other.value != 0.02
