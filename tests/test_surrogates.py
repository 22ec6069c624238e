"""Each policy loss per token against a scalar derivation: value, gradient and masks, on both sides of every bound."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.surrogates import Surrogate, cispo, dppo_kl, dppo_tv, gspo, ppo, reinforce, sapo, sequence_means
from tests.slow_losses import (
    BOUND,
    DUAL,
    HIGH,
    LOW,
    TAU_NEGATIVE,
    TAU_POSITIVE,
    Slow,
    slow_binary_kl,
    slow_cispo,
    slow_clip,
    slow_dppo,
    slow_reinforce,
    slow_sapo,
)

ADVANTAGES = [1.5, -0.7, 0.0]
# log ratios: below, inside and above each bound, on policy, and beyond each clamp on both sides
RATIOS = [0.01, 0.79, 0.81, 1.0, 1.29, 1.31, 2.99, 3.01, 19.9, 20.1]
LOG_RATIOS = [-25.0, *(math.log(ratio) for ratio in RATIOS), 9.9, 10.1, 25.0]


def exactly(surrogate: Callable[[Tensor], Surrogate], logprob: float, wanted: Slow) -> None:
    """The surrogate of one token, in float64, is the wanted one."""
    current = torch.tensor([logprob], dtype=torch.float64, requires_grad=True)
    got = surrogate(current)
    got.per_token.sum().backward()
    assert current.grad is not None
    assert got.per_token.item() == pytest.approx(wanted.loss, rel=1e-9, abs=1e-12)
    assert current.grad.item() == pytest.approx(wanted.gradient, rel=1e-9, abs=1e-12)
    assert (bool(got.low), bool(got.high), bool(got.dual)) == wanted[2:]


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize("dual_clip", [0.0, DUAL])
@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("log_ratio", LOG_RATIOS)
def test_ppo_is_the_clip_by_cases(log_ratio: float, advantage: float, dual_clip: float) -> None:
    exactly(
        lambda logprobs: ppo(logprobs, one(-3.0 - log_ratio), one(advantage), LOW, HIGH, dual_clip),
        -3.0,
        slow_clip(log_ratio, advantage, dual_clip, 20.0, -20.0),
    )


@pytest.mark.parametrize("dual_clip", [0.0, DUAL])
@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("log_ratio", LOG_RATIOS)
def test_gspo_is_the_clip_of_the_sequences_ratio(log_ratio: float, advantage: float, dual_clip: float) -> None:
    exactly(
        lambda logprobs: gspo(logprobs, one(log_ratio), one(advantage), LOW, HIGH, dual_clip),
        -3.0,
        slow_clip(log_ratio, advantage, dual_clip, 10.0),
    )


@pytest.mark.parametrize("advantage", [1.5, -0.7])
def test_gspo_has_the_gradient_of_the_geometric_mean_of_a_sequence(advantage: float) -> None:
    """Mean over three sequences of -A s_i, s_i = exp(sum of log ratios / length), by finite differences."""
    ids = [0, 0, 0, 1, 2, 2]
    older = [-1.0, -2.0, -0.5, -3.0, -1.5, -0.7]
    now = [-1.1, -1.8, -0.55, -3.1, -1.4, -0.75]

    def slow(logprobs: list[float]) -> float:
        total = 0.0
        for sequence in range(3):
            places = [place for place, owner in enumerate(ids) if owner == sequence]
            ratio = math.exp(sum(logprobs[place] - older[place] for place in places) / len(places))
            total += max(-advantage * ratio, -advantage * max(1 - LOW, min(1 + HIGH, ratio))) / 3
        return total

    lengths = torch.tensor([3.0, 3.0, 3.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    current = torch.tensor(now, dtype=torch.float64, requires_grad=True)
    older_logprobs = torch.tensor(older, dtype=torch.float64)
    means = sequence_means((current - older_logprobs).detach(), torch.tensor(ids), lengths, 3)
    per_token = gspo(current, means, torch.full((6,), advantage, dtype=torch.float64), LOW, HIGH, 0.0).per_token
    loss = (per_token / (lengths * 3)).sum()  # sequence_mean_token_mean
    loss.backward()
    assert loss.item() == pytest.approx(slow(now), rel=1e-12)
    assert current.grad is not None
    for place, gradient in enumerate(current.grad.tolist()):
        up, down = now.copy(), now.copy()
        up[place] += 1e-5
        down[place] -= 1e-5
        assert gradient == pytest.approx((slow(up) - slow(down)) / 2e-5, rel=1e-8)


def test_a_sequences_ratio_is_not_that_of_the_one_packed_beside_it() -> None:
    ids, lengths = torch.tensor([0, 0, 1]), torch.tensor([2.0, 2.0, 1.0])
    assert sequence_means(torch.tensor([1.0, 2.0, 9.0]), ids, lengths, 2).tolist() == [1.5, 1.5, 9.0]
    assert sequence_means(torch.zeros(0), ids[:0], lengths[:0], 0).tolist() == []


def test_gspo_in_float32_keeps_the_digits_of_a_small_ratio_of_an_unlikely_token() -> None:
    mean = torch.tensor([1e-6])
    ratio = -gspo(torch.tensor([-30.0]), mean, torch.ones(1), LOW, HIGH, 0.0).per_token
    assert ratio.item() - 1.0 == pytest.approx(1e-6, rel=0.06)  # one unit of float32 is 1.2e-7


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("log_ratio", LOG_RATIOS)
def test_cispo_bounds_the_weight_and_cuts_no_gradient(log_ratio: float, advantage: float) -> None:
    wanted = slow_cispo(-3.0, log_ratio, advantage)
    exactly(lambda logprobs: cispo(logprobs, one(-3.0 - log_ratio), one(advantage), LOW, HIGH), -3.0, wanted)


@pytest.mark.parametrize("log_ratio", [-25.0, math.log(0.1), 0.0, math.log(4.9), math.log(5.1), 25.0])
def test_cispo_with_bounds_from_1_is_the_one_with_the_largest_ratio_itself(log_ratio: float) -> None:
    """TRL's epsilon_high 5 is clip_high 4, and its missing lower bound clip_low 1."""
    weight = min(math.exp(max(-20.0, min(20.0, log_ratio))), 5.0)
    per_token = cispo(one(-3.0), one(-3.0 - log_ratio), one(1.5), 1.0, 4.0).per_token
    assert per_token.item() == pytest.approx(weight * 1.5 * 3.0, rel=1e-12)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("log_ratio", LOG_RATIOS)
def test_sapo_is_a_sigmoid_whose_temperature_goes_by_the_sign(log_ratio: float, advantage: float) -> None:
    exactly(
        lambda logprobs: sapo(logprobs, one(-3.0 - log_ratio), one(advantage), TAU_POSITIVE, TAU_NEGATIVE),
        -3.0,
        slow_sapo(log_ratio, advantage),
    )


# probabilities then and now: the same, and a little inside and outside a distance of 0.2 and a binary KL of 0.2
MOVES = [(0.5, 0.5), (0.5, 0.69), (0.5, 0.71), (0.5, 0.31), (0.5, 0.29), (0.5, 0.785), (0.5, 0.79), (0.5, 0.215)]
MOVES += [(0.5, 0.21), (0.01, 0.19), (0.01, 0.22), (0.001, 0.0195), (0.001, 0.021), (0.9, 0.01), (0.3, 1.0), (1.0, 0.5)]


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize(("then", "now"), MOVES)
def test_dppo_tv_leaves_out_tokens_that_moved_too_far_the_way_they_are_pushed(
    then: float, now: float, advantage: float
) -> None:
    wanted = slow_dppo(then, now, advantage, abs(now - then))
    exactly(lambda logprobs: dppo_tv(logprobs, one(math.log(then)), one(advantage), BOUND), math.log(now), wanted)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize(("then", "now"), MOVES)
def test_dppo_kl_leaves_out_tokens_of_too_large_a_binary_divergence(then: float, now: float, advantage: float) -> None:
    wanted = slow_dppo(then, now, advantage, slow_binary_kl(then, now))
    exactly(lambda logprobs: dppo_kl(logprobs, one(math.log(then)), one(advantage), BOUND), math.log(now), wanted)


def test_the_moves_lie_on_both_sides_of_both_divergences() -> None:
    """Also apart: a token can be beyond one of them only."""
    sides = set()
    for then, now in MOVES:
        sides.add((now > then, abs(now - then) > BOUND, slow_binary_kl(then, now) > BOUND))
    assert {(True, False, False), (True, True, False), (True, True, True)} <= sides
    assert {(False, False, False), (False, True, False), (False, True, True)} <= sides


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_reinforce_is_the_log_probability_times_the_advantage(advantage: float) -> None:
    exactly(lambda logprobs: reinforce(logprobs, one(advantage)), -3.0, slow_reinforce(-3.0, advantage))


# Equalities between families.


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("log_ratio", LOG_RATIOS)
def test_the_dual_clip_is_the_two_sided_clip(log_ratio: float, advantage: float) -> None:
    """TRL's delta: -min(min(r, delta) A, clip(r) A), for a delta of at least 1 + clip_high."""
    current = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    ours = ppo(current, one(-3.0 - log_ratio), one(advantage), LOW, HIGH, DUAL).per_token
    ratio = (current - one(-3.0 - log_ratio)).clamp(-20.0, 20.0).exp()
    theirs = -torch.minimum(ratio.clamp(max=DUAL) * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), current, retain_graph=True)[0].item() for loss in (ours, theirs)]
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-12)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_on_policy_all_families_have_the_gradient_of_reinforce(advantage: float) -> None:
    older, a = one(-1.2), one(advantage)
    families: list[Callable[[Tensor], Surrogate]] = [
        lambda logprobs: ppo(logprobs, older, a, LOW, HIGH, DUAL),
        lambda logprobs: gspo(logprobs, one(0.0), a, LOW, HIGH, DUAL),
        lambda logprobs: cispo(logprobs, older, a, LOW, HIGH),
        lambda logprobs: sapo(logprobs, older, a, TAU_POSITIVE, TAU_NEGATIVE),
        lambda logprobs: dppo_tv(logprobs, older, a, BOUND),
        lambda logprobs: dppo_kl(logprobs, older, a, BOUND),
        lambda logprobs: reinforce(logprobs, a),
    ]
    for family in families:
        current = torch.tensor([-1.2], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(family(current).per_token.sum(), current)
        assert gradient.item() == pytest.approx(-advantage, rel=1e-12)
