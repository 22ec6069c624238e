"""The policy's loss over whole batches against loops over tokens: what is multiplied, added up and counted, and how."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import pstdev
from typing import get_args

import pytest
import torch

from learner.aggregation import Aggregation, Totals
from learner.batches import Row, empty_micro_batch, pack
from learner.kl import AdaptiveKl
from learner.losses import PolicyLoss, SupervisedLoss, policy_curves
from protocol.algorithm import AlgorithmConfig, KlConfig
from tests.loss_outcomes import MAX_TOKENS, Outcome, Place, algorithm, rows_of_a_batch, totals
from tests.rows import random_rows
from tests.slow_losses import (
    DUAL,
    Slow,
    slow_binary_kl,
    slow_cispo,
    slow_clip,
    slow_dppo,
    slow_reinforce,
    slow_sapo,
)

FAMILIES = get_args(AlgorithmConfig.model_fields["loss"].annotation)
MODES = get_args(AlgorithmConfig.model_fields["aggregation"].annotation)
OFF = KlConfig()


def slow_token(family: str, ratio: str, row: Row, place: int) -> tuple[Slow, float]:
    """(loss of one token before its correction, the factor its correction is)."""
    assert row.values is not None
    older = row.behavior_logprobs if ratio == "behavior" else row.proximal_logprobs
    assert older is not None
    assert row.advantages is not None
    assert row.corrections is not None
    now, advantage, factor = float(row.values[place]), float(row.advantages[place]), float(row.corrections[place])
    log_ratio = now - float(older[place])
    if family in ("dppo_tv", "dppo_kl"):
        before, after = math.exp(float(row.behavior_logprobs[place])), math.exp(now)
        divergence = abs(after - before) if family == "dppo_tv" else slow_binary_kl(before, after)
        return slow_dppo(before, after, advantage, divergence), float(factor != 0)
    if family == "gspo":
        log_ratio = sum(float(row.values[i]) - float(older[i]) for i in row.kept) / len(row.kept)
        return slow_clip(log_ratio, advantage, DUAL, 10.0), factor
    if family == "ppo":
        return slow_clip(log_ratio, advantage, DUAL, 20.0, -20.0), factor
    if family == "cispo":
        return slow_cispo(now, log_ratio, advantage), factor
    if family == "sapo":
        return slow_sapo(log_ratio, advantage), factor
    return slow_reinforce(now, advantage), factor


def slow_weight(mode: str, row: Row, total: Totals) -> float:
    return {
        "token_mean": 1 / total.tokens,
        "token_sum": 1.0,
        "sequence_mean_token_mean": 1 / len(row.kept) / total.sequences,
        "sequence_mean_token_sum": 1 / total.sequences,
        "sequence_mean_token_sum_norm": 1 / MAX_TOKENS / total.sequences,
    }[mode]


@pytest.mark.parametrize("ratio", ["proximal", "behavior"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradient_and_clip_counts_equal_loops_over_tokens_however_the_batch_is_cut(
    family: str, mode: str, ratio: str
) -> None:
    rows = rows_of_a_batch(8, 16)
    total = totals(rows)
    settings = algorithm(loss=family, aggregation=mode, ratio=ratio)
    loss = PolicyLoss(settings, OFF, 0.0, Aggregation(settings, MAX_TOKENS, total))
    wanted, gradients, low, high, dual = 0.0, dict[Place, float](), 0, 0, 0
    for index, row in enumerate(rows):
        for place in row.kept:
            token, factor = slow_token(family, ratio, row, place)
            weight = factor * slow_weight(mode, row, total)
            wanted += weight * token.loss
            gradients[index, int(place)] = weight * token.gradient
            low, high, dual = low + token.low, high + token.high, dual + token.dual
    for budget in (1, 40, 10_000):
        got = Outcome(loss, rows, budget)
        assert got.loss == pytest.approx(wanted, rel=1e-9)
        assert got.gradients == pytest.approx(gradients, rel=1e-9, abs=1e-15)
        assert (got.sums["clipped_low"], got.sums["clipped_high"], got.sums["clipped_dual"]) == (low, high, dual)
        assert got.sums["tokens"] == total.tokens
    assert (low > 0 and high > 0) or family in ("sapo", "reinforce")
    assert dual > 0 or family != "ppo"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_with_unlike_shares_add_up_to_the_loss_of_one(family: str, mode: str) -> None:
    rows = rows_of_a_batch(4, 15)
    settings = algorithm(loss=family, aggregation=mode)
    loss = PolicyLoss(settings, OFF, 0.0, Aggregation(settings, MAX_TOKENS, totals(rows)))
    one = Outcome(loss, rows, 100)
    ranks = [Outcome(loss, part, 60) for part in (rows[:3], rows[3:14], rows[14:], [])]
    assert sum(rank.loss for rank in ranks) == pytest.approx(one.loss, rel=1e-9)
    assert sum(rank.sums["clipped_low"] for rank in ranks) == one.sums["clipped_low"]
    joined = {(first + row, place): g for first, rank in zip((0, 3, 14), ranks, strict=False)
              for (row, place), g in rank.gradients.items()}  # fmt: skip
    assert joined == pytest.approx(one.gradients, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("with_ratio", [False, True])
def test_the_kl_to_the_reference_is_added_whatever_the_corrections_leave_out(with_ratio: bool) -> None:
    """k3 = exp(-d) + d - 1, times the ratio to the policy that sampled; the coefficient is that of now."""
    rows = rows_of_a_batch(5, 8)
    total = totals(rows)
    settings = algorithm(aggregation="sequence_mean_token_sum")
    aggregation = Aggregation(settings, MAX_TOKENS, total)
    kl = KlConfig(coef=0.1, form="k3", with_ratio=with_ratio)
    without = Outcome(PolicyLoss(settings, OFF, 0.0, aggregation), rows, 60)
    got = Outcome(PolicyLoss(settings, kl, 0.03, aggregation), rows, 60)
    penalty_sum, left_out = 0.0, 0
    for index, row in enumerate(rows):
        assert row.values is not None
        assert row.reference_logprobs is not None
        assert row.corrections is not None
        for place in row.kept:
            now = float(row.values[place])
            d = now - float(row.reference_logprobs[place])
            k3, slope = math.exp(-d) + d - 1, 1 - math.exp(-d)
            ratio = math.exp(now - float(row.behavior_logprobs[place])) if with_ratio else 1.0
            gradient = ratio * slope + (ratio * k3 if with_ratio else 0.0)
            difference = got.gradients[index, int(place)] - without.gradients[index, int(place)]
            assert difference == pytest.approx(0.03 / total.sequences * gradient, rel=1e-9, abs=1e-12)
            penalty_sum += ratio * k3
            left_out += row.corrections[place] == 0
    assert left_out
    assert got.loss - without.loss == pytest.approx(0.03 / total.sequences * penalty_sum, rel=1e-9)
    assert policy_curves(got.sums | {"loss": 0.0})["policy/kl_reference"] == pytest.approx(penalty_sum / total.tokens)


def test_a_batch_without_a_token_in_the_loss_says_nothing_of_the_kl() -> None:
    """A 0 would lower an adaptive coefficient."""
    settings, kl = algorithm(), KlConfig(coef=0.1, target=0.1)
    loss = PolicyLoss(settings, kl, 0.1, Aggregation(settings, MAX_TOKENS, Totals(0.0, 0.0)))
    found = Outcome(loss, [], 60)
    curves = policy_curves(found.sums | {"loss": found.loss})
    assert [name for name, value in curves.items() if not math.isfinite(value)] == ["policy/kl_reference"]
    coefficient = AdaptiveKl(kl.coef, kl.target, kl.horizon)
    coefficient.update(curves["policy/kl_reference"], 8)
    assert coefficient.value == 0.1


def test_a_kl_in_the_reward_and_a_coefficient_of_0_leave_the_loss_alone() -> None:
    """And read no reference log-probability: without a reference model there is none."""
    rows = [replace(row, reference_logprobs=None) for row in rows_of_a_batch(5, 8)]
    settings = algorithm()
    aggregation = Aggregation(settings, MAX_TOKENS, totals(rows))
    wanted = Outcome(PolicyLoss(settings, OFF, 0.0, aggregation), rows, 60)
    in_reward = Outcome(PolicyLoss(settings, KlConfig(coef=0.1, place="reward"), 0.1, aggregation), rows, 60)
    assert math.isfinite(wanted.loss)
    assert (in_reward.loss, in_reward.gradients, in_reward.sums) == (wanted.loss, wanted.gradients, wanted.sums)
    assert "policy/kl_reference" not in policy_curves(wanted.sums | {"loss": 0.0})


def test_the_entropy_bonus_is_taken_off_with_a_gradient_and_with_the_weights_of_the_loss() -> None:
    rows = rows_of_a_batch(6, 8)
    total = totals(rows)
    off = algorithm(aggregation="sequence_mean_token_mean")
    on = off.model_copy(update={"entropy_coef": 0.01})
    aggregation = Aggregation(off, MAX_TOKENS, total)
    without = Outcome(PolicyLoss(off, OFF, 0.0, aggregation), rows, 60)
    got = Outcome(PolicyLoss(on, OFF, 0.0, aggregation), rows, 60)
    bonus = 0.0
    for index, row in enumerate(rows):
        assert row.returns is not None
        for place in row.kept:
            weight = 0.01 / len(row.kept) / total.sequences
            bonus += weight * float(row.returns[place])
            assert got.entropy_gradients[index, int(place)] == pytest.approx(-weight, rel=1e-9)
    assert got.loss - without.loss == pytest.approx(-bonus, rel=1e-9)
    assert got.gradients == without.gradients
    assert set(without.entropy_gradients.values()) == {0.0}


def test_the_curves_say_how_far_the_current_policy_is_from_the_proximal_one() -> None:
    rows = rows_of_a_batch(7, 10)
    settings = algorithm()
    got = Outcome(PolicyLoss(settings, OFF, 0.0, Aggregation(settings, MAX_TOKENS, totals(rows))), rows, 60)
    curves = policy_curves(got.sums | {"loss": got.loss})
    differences, entropies, clipped = [], [], []
    for row in rows:
        assert row.values is not None
        assert row.proximal_logprobs is not None
        assert row.returns is not None
        for place in row.kept:
            differences.append(float(row.values[place]) - float(row.proximal_logprobs[place]))
            entropies.append(float(row.returns[place]))
            clipped.append(slow_token("ppo", "proximal", row, place)[0])
    number = len(differences)
    ratios = [math.exp(difference) for difference in differences]
    assert curves == pytest.approx(
        {
            "policy/loss": got.loss,
            "policy/kl": -sum(differences) / number,
            "policy/entropy": sum(entropies) / number,
            "policy/clip_frac_low": sum(token.low for token in clipped) / number,
            "policy/clip_frac_high": sum(token.high for token in clipped) / number,
            "policy/clip_frac_dual": sum(token.dual for token in clipped) / number,
            "policy/ratio_mean": sum(ratios) / number,
            "policy/ratio_std": pstdev(ratios),
        },
        rel=1e-9,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_without_a_token_adds_nothing_and_no_nan(family: str) -> None:
    settings = algorithm(loss=family, entropy_coef=0.1)
    aggregation = Aggregation(settings, MAX_TOKENS, Totals(0, 0))
    logprobs = torch.zeros(0, requires_grad=True)
    for loss in (PolicyLoss(settings, KlConfig(coef=0.1), 0.1, aggregation), SupervisedLoss(Totals(0, 0))):
        value, sums = loss(logprobs, torch.zeros(0), empty_micro_batch())
        assert value.item() == 0.0
        assert value.requires_grad
        assert all(total.item() == 0 for total in sums.values())


def test_the_supervised_loss_is_the_mean_over_answer_tokens() -> None:
    rows = random_rows(1, 4)
    loss = SupervisedLoss(totals(rows))
    values = [loss(-batch.targets / 10.0, torch.zeros(len(batch.targets)), batch)[0].item() for batch in pack(rows, 30)]
    tokens = [int(token) for row in rows for token in row.completion_tokens[row.kept]]
    assert sum(values) == pytest.approx(sum(tokens) / len(tokens) / 10.0, rel=1e-5)
