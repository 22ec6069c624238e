"""The critic's loss, its gradient and its curves against scalar derivations, on both sides of clip and Huber's bend."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import pvariance

import pytest
import torch

from learner.aggregation import Aggregation, Totals
from learner.batches import MicroBatch, counts, empty_micro_batch, pack
from learner.value_loss import ValueLoss, value_curves, value_loss
from protocol.algorithm import AlgorithmConfig, CriticConfig
from tests.rows import random_rows

CLIP = 0.5
OLD = 1.0
VALUES = [-30.0, 0.2, 0.49, 0.51, 1.0, 1.49, 1.51, 2.5, 30.0]
RETURNS = [-9.0, 0.3, 1.2, 1.8, 12.0]


def slow_distance(value: float, target: float, kind: str) -> tuple[float, float]:
    """(distance, its derivative by the value)."""
    error = value - target
    if kind == "huber" and abs(error) > 10.0:
        return 10.0 * (abs(error) - 5.0), math.copysign(10.0, error)
    return 0.5 * error**2, error


def slow_value_loss(value: float, old: float, target: float, clip: float, kind: str) -> tuple[float, float, bool]:
    """(loss, gradient, clipped): the larger of two distances, of which the clipped one stands still outside."""
    loss, slope = slow_distance(value, target, kind)
    if not clip or old - clip <= value <= old + clip:
        return loss, slope, False
    clipped, _ = slow_distance(old + math.copysign(clip, value - old), target, kind)
    return (clipped, 0.0, True) if clipped > loss else (loss, slope, False)


@pytest.mark.parametrize("kind", ["squared", "huber"])
@pytest.mark.parametrize("clip", [0.0, CLIP])
@pytest.mark.parametrize("target", RETURNS)
@pytest.mark.parametrize("value", VALUES)
def test_loss_and_gradient_equal_a_scalar_derivation(value: float, target: float, clip: float, kind: str) -> None:
    now = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    old, returns = torch.tensor([OLD], dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
    loss, clipped = value_loss(now, old, returns, clip, kind)
    loss.sum().backward()
    wanted = slow_value_loss(value, OLD, target, clip, kind)
    assert now.grad is not None
    assert (loss.item(), now.grad.item()) == pytest.approx(wanted[:2], rel=1e-9, abs=1e-12)
    assert bool(clipped) == wanted[2]


def test_the_cases_have_both_sides_of_the_clip_and_of_the_bend() -> None:
    cases = [(value, target) for value in VALUES for target in RETURNS]
    assert {slow_value_loss(*case[:1], OLD, case[1], CLIP, "squared")[2] for case in cases} == {True, False}
    assert {abs(value - target) > 10.0 for value, target in cases} == {True, False}


def test_what_rounding_leaves_inside_the_clip_is_not_clipped() -> None:
    """In float32, old + (value - old) is not always the value."""
    generator = torch.Generator().manual_seed(0)
    now, old, target = (torch.randn(1000, generator=generator) * 0.1 for _ in range(3))
    assert (old + (now - old) != now).any()
    _, clipped = value_loss(now, old, target, 1.0, "squared")
    assert not clipped.any()


def filled(batch: MicroBatch) -> MicroBatch:
    """With values and returns that follow from the tokens, in float64."""
    tokens = batch.targets.double()
    return replace(batch, values=tokens / 50.0, returns=tokens.cos(), sequence_lengths=batch.sequence_lengths.double())


def moved(batch: MicroBatch) -> torch.Tensor:
    return (batch.values + batch.targets.double().sin()).requires_grad_()


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean_token_mean"])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_cutting_a_batch_changes_neither_loss_nor_gradient_nor_curves(mode: str, budget: int) -> None:
    rows = random_rows(5, 20)
    total = counts(rows)
    settings = AlgorithmConfig.model_validate({"aggregation": mode})
    loss = ValueLoss(CriticConfig(), Aggregation(settings, 32, Totals(total["tokens"], total["sequences"])))
    whole, sums = 0.0, dict[str, float]()
    gradients: dict[tuple[int, int], float] = {}
    for batch in map(filled, [*pack(rows, budget), empty_micro_batch()]):
        values = moved(batch)
        part, of_part = loss(values, batch)
        part.backward()
        whole += part.item()
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in of_part.items()}
        places = [(index, int(place)) for index in batch.rows for place in rows[index].kept]
        assert values.grad is not None
        gradients |= dict(zip(places, values.grad.tolist(), strict=True))

    wanted, old_values, new_values, returns, num_clipped = 0.0, [], [], [], 0
    for index, row in enumerate(rows):
        for place in row.kept:
            token = float(row.completion_tokens[place])
            old, target = token / 50.0, math.cos(token)
            now = old + math.sin(token)
            weight = 1 / total["tokens"] if mode == "token_mean" else 1 / (len(row.kept) * total["sequences"])
            value, slope, clipped = slow_value_loss(now, old, target, 0.5, "squared")
            wanted += weight * value
            assert gradients[index, int(place)] == pytest.approx(weight * slope, rel=1e-9, abs=1e-12)
            old_values.append(old)
            new_values.append(now)
            returns.append(target)
            num_clipped += clipped
    assert whole == pytest.approx(wanted, rel=1e-9)

    curves = value_curves(sums | {"loss": whole})
    errors = [target - old for target, old in zip(returns, old_values, strict=True)]
    assert 0 < num_clipped < len(returns)
    assert curves == pytest.approx(
        {
            "critic/loss": wanted,
            "critic/clip_frac": num_clipped / len(returns),
            "critic/value_mean": sum(new_values) / len(returns),
            "critic/return_mean": sum(returns) / len(returns),
            "critic/explained_variance": 1 - pvariance(errors) / pvariance(returns),
        },
        rel=1e-9,
    )


def test_what_rounding_leaves_of_equal_returns_explains_nothing() -> None:
    """Seven times 0.1: the mean square is above the squared mean, by 2e-18."""
    total, squares = sum([0.1] * 7), sum([0.1 * 0.1] * 7)
    assert squares / 7 - (total / 7) ** 2 > 0
    sums = {"tokens": 7.0, "clipped": 0.0, "value": 0.0, "return": total, "return_squared": squares}
    curves = value_curves(sums | {"error": 0.7, "error_squared": 0.1, "loss": 0.0})
    assert math.isnan(curves["critic/explained_variance"])


def test_explained_variance_is_1_for_perfect_values_and_unknown_where_all_returns_are_equal() -> None:
    batch = filled(pack(random_rows(6, 5), 1000)[0])
    loss = ValueLoss(CriticConfig(), Aggregation(AlgorithmConfig(), 32, Totals(10, 5)))
    for old, returns, wanted in (
        (batch.returns, batch.returns, 1.0),
        (batch.returns.mean().expand_as(batch.returns), batch.returns, 0.0),
        (batch.returns, torch.full_like(batch.returns, 0.1), math.nan),
    ):
        _, sums = loss(moved(batch), replace(batch, values=old, returns=returns))
        curves = value_curves({name: value.item() for name, value in sums.items()} | {"loss": 0.0})
        assert curves["critic/explained_variance"] == pytest.approx(wanted, abs=1e-12, nan_ok=True)
