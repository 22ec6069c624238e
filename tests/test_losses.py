"""The clipped-ratio loss, its gradient and its sums against scalar derivations, on both sides of each clip."""

from __future__ import annotations

import math

import pytest
import torch

from learner.batches import counts, empty_micro_batch, pack
from learner.losses import GrpoLoss, SupervisedLoss, Totals, averages, clipped_ratio_loss, token_weights
from protocol.config import AlgorithmConfig
from tests.rows import random_rows

LOW, HIGH = 0.2, 0.3
# log ratios: below, inside and above the clip, on policy, and beyond the clamp on both sides
LOG_RATIOS = [-25.0, -1.0, math.log(0.79), math.log(0.81), 0.0, math.log(1.29), math.log(1.31), 1.0, 25.0]


def slow_loss(log_ratio: float, advantage: float) -> float:
    ratio = math.exp(max(-20.0, min(20.0, log_ratio)))
    clipped = max(1.0 - LOW, min(1.0 + HIGH, ratio))
    return max(-advantage * ratio, -advantage * clipped)


def slow_gradient(log_ratio: float, advantage: float) -> float:
    """d loss / d logprob, from the cases: no gradient where the clipped term is the larger one, or the clamp holds."""
    ratio = math.exp(log_ratio)
    gone = (advantage > 0 and ratio > 1.0 + HIGH) or (advantage < 0 and ratio < 1.0 - LOW) or abs(log_ratio) > 20.0
    return 0.0 if gone else -advantage * ratio


@pytest.mark.parametrize("advantage", [1.5, -0.7, 0.0])
@pytest.mark.parametrize("log_ratio", LOG_RATIOS)
def test_loss_and_gradient_equal_a_scalar_derivation(log_ratio: float, advantage: float) -> None:
    logprob = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    behavior = torch.tensor([-3.0 - log_ratio], dtype=torch.float64)
    weight = torch.tensor([0.25], dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    loss, _ = clipped_ratio_loss(logprob, torch.zeros(1), behavior, advantages, weight, LOW, HIGH)
    loss.backward()
    assert loss.item() == pytest.approx(0.25 * slow_loss(log_ratio, advantage), rel=1e-12)
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(0.25 * slow_gradient(log_ratio, advantage), rel=1e-12)


def test_the_sums_count_what_the_curves_say() -> None:
    log_ratios = torch.tensor([0.0, 1.0, 1.0, -1.0, -1.0, 0.1], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    entropies = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    loss, sums = clipped_ratio_loss(
        log_ratios - 3.0,
        entropies,
        torch.full((6,), -3.0, dtype=torch.float64),
        advantages,
        torch.full((6,), 1 / 6),
        LOW,
        HIGH,
    )
    curves = averages({name: value.item() for name, value in sums.items()} | {"loss": loss.item()})
    ratios = [math.exp(x) for x in log_ratios.tolist()]
    assert curves["policy/clip_frac_high"] == pytest.approx(1 / 6)  # the second: ratio above, advantage above zero
    assert curves["policy/clip_frac_low"] == pytest.approx(1 / 6)  # the fifth: ratio below, advantage below zero
    assert curves["policy/kl"] == pytest.approx(-0.1 / 6)
    assert curves["policy/entropy"] == pytest.approx(10.5 / 6)
    assert curves["mismatch/kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 6)
    assert curves["mismatch/ratio_mean"] == pytest.approx(sum(ratios) / 6)
    assert curves["mismatch/ess"] == pytest.approx(sum(ratios) ** 2 / (6 * sum(r * r for r in ratios)))
    assert curves["policy/loss"] == loss.item()


def test_equal_policies_have_no_mismatch() -> None:
    logprobs = torch.tensor([-1.0, -2.0])
    _, sums = clipped_ratio_loss(logprobs, torch.zeros(2), logprobs, torch.ones(2), torch.ones(2), LOW, HIGH)
    curves = averages({name: value.item() for name, value in sums.items()} | {"loss": 0.0})
    assert (curves["mismatch/kl"], curves["policy/kl"]) == (0.0, 0.0)
    assert (curves["mismatch/ratio_mean"], curves["mismatch/ess"]) == (1.0, 1.0)


def test_weights_mean_over_tokens_or_first_within_each_sequence() -> None:
    lengths = torch.tensor([1.0, 3.0, 3.0, 3.0])
    assert token_weights(lengths, "token_mean", Totals(4, 2)).tolist() == [0.25] * 4
    torch.testing.assert_close(
        token_weights(lengths, "sequence_mean", Totals(4, 2)), torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    )


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_cutting_a_batch_into_micro_batches_changes_neither_loss_nor_gradient(aggregation: str, budget: int) -> None:
    rows = random_rows(3, 20)
    total = counts(rows)
    settings = AlgorithmConfig.model_validate({"aggregation": aggregation})
    loss = GrpoLoss(settings, Totals(total["tokens"], total["sequences"]))
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    parts = [
        loss(-5.0 + shift + batch.targets / 100.0, torch.zeros(len(batch.targets)), batch)[0]
        for batch in [*pack(rows, budget), empty_micro_batch()]
    ]
    whole = torch.stack(parts).sum()
    whole.backward()

    wanted = gradient = 0.0
    for row in rows:
        for place in row.kept:
            weight = 1 / total["tokens"] if aggregation == "token_mean" else 1 / (len(row.kept) * total["sequences"])
            ratio = math.exp(-5.0 + row.completion_tokens[place] / 100.0 - row.behavior_logprobs[place])
            clipped = max(0.8, min(1.2, ratio))
            terms = (-row.advantage * ratio, -row.advantage * clipped)
            wanted += weight * max(terms)
            gradient += weight * terms[0] if terms[0] > terms[1] or clipped == ratio else 0.0
    assert whole.item() == pytest.approx(wanted, rel=1e-5)
    assert shift.grad is not None
    assert shift.grad.item() == pytest.approx(gradient, rel=1e-5)


def test_a_rank_without_a_token_adds_nothing_and_no_nan() -> None:
    logprobs = torch.zeros(0, requires_grad=True)
    for loss in (GrpoLoss(AlgorithmConfig(), Totals(0, 0)), SupervisedLoss(Totals(0, 0))):
        value, sums = loss(logprobs, torch.zeros(0), empty_micro_batch())
        assert value.item() == 0.0
        assert value.requires_grad
        assert all(total.item() == 0 for total in sums.values())


def test_the_supervised_loss_is_the_mean_over_answer_tokens() -> None:
    rows = random_rows(1, 4)
    total = counts(rows)
    loss = SupervisedLoss(Totals(total["tokens"], total["sequences"]))
    values = [loss(-batch.targets / 10.0, torch.zeros(len(batch.targets)), batch)[0].item() for batch in pack(rows, 30)]
    tokens = [int(token) for row in rows for token in row.completion_tokens[row.kept]]
    assert sum(values) == pytest.approx(sum(tokens) / len(tokens) / 10.0, rel=1e-5)
