"""What the families have in common: the documented equalities between algorithms, loss and gradient.

Those of one file alone stand in its own test: the on-policy gradient and the two-sided clip in `test_surrogates.py`,
aggregations as libraries write them in `test_aggregation.py`, gradients of KL estimates in `test_kl.py`, leaving one
out in `test_advantages.py`, and the only update against two passes in `test_preparation.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.advantages import RewardTable, group_relative, leave_one_out, over_greedy, sequence_advantages
from learner.aggregation import Aggregation
from learner.batches import Row
from learner.corrections import corrections
from learner.kl import kl_penalty
from learner.losses import PolicyLoss
from learner.returns import gae, returns_to_go, token_rewards
from learner.surrogates import Surrogate, cispo, dppo_kl, dppo_tv, gspo, ppo, reinforce, sapo, sequence_means
from learner.whitening import whiten, whiten_groups, whitening_pivot, whitening_sums
from protocol.algorithm import AlgorithmConfig, CorrectionsConfig, KlConfig
from tests.loss_outcomes import MAX_TOKENS, Outcome, algorithm, rows_of_a_batch, totals

NUM_TOKENS = 200
NEVER = 1e9
"""A bound that no ratio reaches."""
CLIP = 0.2


class Tokens:
    """Of one batch [K], in float64: log ratios to both older policies reach far beyond the usual bounds."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        now, drift, lag, advantages = torch.randn(4, NUM_TOKENS, generator=generator, dtype=torch.float64)
        self.now = (-1.0 - now.abs()).requires_grad_()
        self.proximal = self.now.detach() + 0.5 * drift
        self.behavior = self.proximal + 0.5 * lag
        self.advantages = advantages
        self.ratio = (self.now - self.proximal).exp().detach()
        self.inside = (self.ratio - 1.0).abs() < CLIP

    def gradient(self, losses: Tensor) -> Tensor:
        """Of each token's loss [K] by its own log-probability."""
        return torch.autograd.grad(losses.sum(), self.now, retain_graph=True)[0]


def same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


# Losses of tokens.


def test_gspo_of_sequences_of_one_token_is_ppo() -> None:
    t, each = Tokens(), torch.arange(NUM_TOKENS)
    means = sequence_means((t.now - t.proximal).detach(), each, torch.ones(NUM_TOKENS), NUM_TOKENS)
    ours = gspo(t.now, means, t.advantages, CLIP, CLIP, 1.5)
    wanted = ppo(t.now, t.proximal, t.advantages, CLIP, CLIP, 1.5)
    same(ours.per_token, wanted.per_token)
    same(t.gradient(ours.per_token), t.gradient(wanted.per_token))
    assert all(mask.any() and torch.equal(mask, other) for mask, other in zip(ours[1:], wanted[1:], strict=True))


def test_cispo_without_bounds_is_reinforce_weighted_by_the_ratio() -> None:
    t = Tokens()
    ours = cispo(t.now, t.proximal, t.advantages, 1.0, NEVER).per_token
    wanted = t.ratio * reinforce(t.now, t.advantages).per_token
    same(ours, wanted)
    same(t.gradient(ours), t.gradient(wanted))


def test_cispo_inside_its_bounds_has_the_gradient_of_ppo() -> None:
    t = Tokens()
    ours = t.gradient(cispo(t.now, t.proximal, t.advantages, CLIP, CLIP).per_token)
    wanted = t.gradient(ppo(t.now, t.proximal, t.advantages, CLIP, CLIP, 0.0).per_token)
    assert 0 < t.inside.sum() < NUM_TOKENS
    same(ours[t.inside], wanted[t.inside])
    assert not torch.allclose(ours, wanted)


@pytest.mark.parametrize("dppo", [dppo_tv, dppo_kl])
def test_dppo_without_a_bound_is_cispo_against_the_policy_that_sampled(
    dppo: Callable[[Tensor, Tensor, Tensor, float], Surrogate],
) -> None:
    """Of a ratio of at most 20, which is DPPO's own limit; and has the gradient of PPO without a clip."""
    t = Tokens()
    ours = dppo(t.now, t.behavior, t.advantages, NEVER).per_token
    wanted = cispo(t.now, t.behavior, t.advantages, 1.0, 19.0).per_token
    same(ours, wanted)
    same(t.gradient(ours), t.gradient(wanted))
    same(t.gradient(ours), t.gradient(ppo(t.now, t.behavior, t.advantages, NEVER, NEVER, 0.0).per_token))


def test_sapo_of_a_temperature_near_0_has_the_gradient_of_ppo_without_a_clip() -> None:
    t, tau = Tokens(), 1e-4
    ours = t.gradient(sapo(t.now, t.proximal, t.advantages, tau, tau).per_token)
    wanted = t.gradient(ppo(t.now, t.proximal, t.advantages, NEVER, NEVER, 0.0).per_token)
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=0.0)


def test_a_dual_clip_at_the_upper_bound_clips_both_signs_at_the_same_ratio() -> None:
    """What dual_clip 1 + clip_high comes to: above it no token has a gradient, whatever the sign of its advantage."""
    t, above = Tokens(), 1.0 + CLIP
    for advantages in (t.advantages, -t.advantages):
        gradient = t.gradient(ppo(t.now, t.proximal, advantages, CLIP, CLIP, above).per_token)
        assert not gradient[t.ratio > above].any()
        assert gradient[t.inside].all()


@pytest.mark.parametrize("form", ["k1", "k2", "k3", "abs"])
def test_straight_through_every_form_of_kl_has_the_gradient_of_k2(form: Any) -> None:
    t = Tokens()
    ours, plain = (kl_penalty(form, through, t.now, t.proximal, None) for through in (True, False))
    same(ours, plain)
    same(t.gradient(ours), t.gradient(kl_penalty("k2", False, t.now, t.proximal, None)))


# Corrections.


def weights(t: Tokens, behavior: Tensor, ids: Tensor, **settings: Any) -> Tensor:
    config = CorrectionsConfig.model_validate(settings)
    return corrections(config, behavior, t.proximal, t.advantages, ids, int(ids.max()) + 1).weights


@pytest.mark.parametrize("weight", ["none", "token", "sequence"])
@pytest.mark.parametrize("bound", ["truncate", "mask"])
def test_decoupled_ppo_is_plain_ppo_where_the_proximal_policy_sampled(weight: str, bound: str) -> None:
    t, ids = Tokens(), torch.arange(NUM_TOKENS) // 10
    ones = weights(t, t.proximal, ids, weight=weight, bound=bound, low=0.5, high=2.0, negative_kl_mask=1e-9)
    assert torch.equal(ones, torch.ones_like(ones))


def test_decoupled_ppo_inside_its_clip_is_ppo_without_a_clip_against_the_policy_that_sampled() -> None:
    """Hilton et al. 2022: the two ratios multiply to that of the current policy and the one that sampled."""
    t = Tokens()
    factor = weights(t, t.behavior, torch.arange(NUM_TOKENS), weight="token", high=NEVER)
    ours = ppo(t.now, t.proximal, t.advantages, CLIP, CLIP, 0.0).per_token * factor
    wanted = ppo(t.now, t.behavior, t.advantages, NEVER, NEVER, 0.0).per_token
    same(ours[t.inside], wanted[t.inside])
    same(t.gradient(ours)[t.inside], t.gradient(wanted)[t.inside])


@pytest.mark.parametrize("bound", ["truncate", "mask"])
@pytest.mark.parametrize("sequence_ratio", ["product", "geometric_mean"])
def test_weights_of_sequences_of_one_token_are_those_of_tokens(sequence_ratio: str, bound: str) -> None:
    t, each = Tokens(), torch.arange(NUM_TOKENS)
    bounds = {"bound": bound, "low": 0.7, "high": 1.4}
    of_sequences = weights(t, t.behavior, each, weight="sequence", sequence_ratio=sequence_ratio, **bounds)
    assert torch.equal(of_sequences, weights(t, t.behavior, each, weight="token", **bounds))
    assert len(of_sequences.unique()) > 10


@pytest.mark.parametrize("weight", ["token", "sequence"])
def test_where_no_bound_acts_weights_are_neither_truncated_nor_masked(weight: str) -> None:
    t, ids = Tokens(), torch.arange(NUM_TOKENS) // 10
    truncated, masked = (weights(t, t.behavior, ids, weight=weight, bound=b, high=NEVER) for b in ("truncate", "mask"))
    assert torch.equal(truncated, masked)


# Advantages.

REWARDS = np.array([[1.0, 0.25, 0.0, 4.0], [0.5, 0.0, 2.0, -1.0]])
NOTHING = np.zeros((0, *REWARDS.shape))


def whitened(values: Any, weights: Any) -> Any:
    pivot = whitening_pivot(values, weights)
    return whiten(values, weights, whitening_sums(values, weights, pivot), pivot)


def test_leaving_one_out_of_two_is_their_difference() -> None:
    rewards = REWARDS[:, :2]
    np.testing.assert_allclose(leave_one_out(rewards, rewards), rewards - rewards[:, ::-1], rtol=1e-12)


def test_remax_whose_greedy_reward_is_the_groups_mean_is_dr_grpo() -> None:
    got = over_greedy(REWARDS, REWARDS.mean(axis=1))
    np.testing.assert_allclose(got, group_relative(REWARDS, REWARDS, "none"), rtol=1e-12)


def test_remax_whose_greedy_reward_is_0_is_reinforce_plus_plus_before_it_is_whitened() -> None:
    mask = np.ones(5, np.bool_)
    for reward, got in zip(REWARDS.flat, over_greedy(REWARDS, np.zeros(2)).flat, strict=True):
        returns = returns_to_go(token_rewards(float(reward), np.zeros(5), mask), mask, 1.0)
        assert returns.tolist() == [got] * 5


def test_the_spread_of_a_batch_of_one_group_is_that_of_the_group() -> None:
    one = REWARDS[:1]
    np.testing.assert_array_equal(group_relative(one, one, "batch"), group_relative(one, one, "group"))


def test_over_one_group_reinforce_plus_plus_needs_no_baseline() -> None:
    """Whitening takes off the mean that the baseline takes off; every completion has as many tokens here."""
    one, num_tokens = REWARDS[:1], np.full((1, 4), 3.0)
    of_rewards = whitened(one, num_tokens)
    table = RewardTable(one, one, NOTHING[:, :1], np.zeros(0), np.full(1, np.nan))
    relative = sequence_advantages(AlgorithmConfig(advantage="reinforce_plus_plus_baseline"), table)
    pivot = whitening_pivot(relative, num_tokens)
    got = whiten_groups(relative, num_tokens, whitening_sums(relative, num_tokens, pivot), pivot)
    np.testing.assert_allclose(got, of_rewards, rtol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_of_a_critic_that_says_0_is_reinforce_plus_plus(gamma: float) -> None:
    """With lambda 1, before and after both are whitened."""
    rewards, mask = np.array([0.0, -0.1, 0.0, -0.2, 1.5]), np.array([1, 1, 0, 1, 1], np.bool_)
    advantages, returns = gae(rewards, np.zeros(5), mask, gamma, 1.0)
    wanted = returns_to_go(rewards, mask, gamma)
    np.testing.assert_array_equal(advantages, wanted)
    np.testing.assert_array_equal(returns, wanted)
    np.testing.assert_array_equal(whitened(advantages, mask), whitened(wanted, mask))


# Whole losses, as their papers write them: over padded completions [B, T].


class Padded:
    """The rows of a batch in float64, as libraries with padding hold them; `mask` [B, T] is 1 inside the loss."""

    def __init__(self, rows: list[Row]) -> None:
        rows = [row for row in rows if len(row.kept)]
        self.mask = torch.zeros(len(rows), MAX_TOKENS, dtype=torch.float64)
        columns = torch.zeros(3, len(rows), MAX_TOKENS, dtype=torch.float64)
        for place, row in enumerate(rows):
            self.mask[place, : len(row.kept)] = 1.0
            for column, values in zip(columns, (row.values, row.proximal_logprobs, row.advantages), strict=True):
                assert values is not None
                column[place, : len(row.kept)] = torch.from_numpy(values[row.kept]).double()
        self.now, self.proximal, self.advantages = columns
        self.now.requires_grad_()
        self.lengths = self.mask.sum(-1)

    def clipped(self, low: float, high: float) -> Tensor:
        ratio = (self.now - self.proximal).exp()
        clipped = torch.minimum(ratio * self.advantages, ratio.clamp(1 - low, 1 + high) * self.advantages)
        return -clipped * self.mask


PAPERS: dict[str, tuple[dict[str, Any], Callable[[Padded], Tensor]]] = {
    "GRPO, DeepSeekMath eq. 3": (
        {"clip_high": 0.2, "aggregation": "sequence_mean_token_mean"},
        lambda batch: (batch.clipped(0.2, 0.2).sum(-1) / batch.lengths).mean(),
    ),
    "DAPO, eq. 8": (
        {"clip_high": 0.28, "aggregation": "token_mean"},
        lambda batch: batch.clipped(0.2, 0.28).sum() / batch.lengths.sum(),
    ),
    "Dr. GRPO, with the length that the answers may have": (
        {"clip_high": 0.2, "aggregation": "sequence_mean_token_sum_norm"},
        lambda batch: batch.clipped(0.2, 0.2).sum(-1).mean() / MAX_TOKENS,
    ),
    "GSPO, eq. 5": (
        {"loss": "gspo", "clip_high": 0.2, "aggregation": "sequence_mean_token_mean"},
        lambda batch: _of_sequences(batch).mean(),
    ),
    "REINFORCE": (
        {"loss": "reinforce", "aggregation": "sequence_mean_token_sum"},
        lambda batch: -(batch.now * batch.advantages * batch.mask).sum(-1).mean(),
    ),
}


def _of_sequences(batch: Padded) -> Tensor:
    ratio = (((batch.now - batch.proximal) * batch.mask).sum(-1) / batch.lengths).exp()
    advantages = batch.advantages[:, 0]
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


@pytest.mark.parametrize("paper", PAPERS)
def test_settings_are_the_losses_that_their_papers_write(paper: str) -> None:
    wanted_settings, formula = PAPERS[paper]
    settings = algorithm(clip_low=0.2, dual_clip=0.0, **wanted_settings)
    rows = [replace(row, corrections=None) for row in rows_of_a_batch(2, 12)]
    got = Outcome(PolicyLoss(settings, KlConfig(), 0.0, Aggregation(settings, MAX_TOKENS, totals(rows))), rows, 60)
    batch = Padded(rows)
    loss = formula(batch)
    loss.backward()
    assert got.loss == pytest.approx(loss.item(), rel=1e-9)
    assert batch.now.grad is not None
    wanted = batch.now.grad[batch.mask > 0].tolist()
    places = [(index, int(place)) for index, row in enumerate(rows) for place in row.kept]
    assert [got.gradients[place] for place in places] == pytest.approx(wanted, rel=1e-9, abs=1e-15)
    assert any(wanted)
