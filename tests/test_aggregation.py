"""The five ways to add up the losses of tokens, against loops over padded sequences and the field's own formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learner.aggregation import Aggregation, Totals, token_weights
from protocol.algorithm import AlgorithmConfig

LENGTHS = [4, 1, 0, 7, 2]  # of each sequence, in tokens inside the loss
MAX_TOKENS = 9
MODES = (
    "token_mean",
    "token_sum",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_mean_token_sum_norm",
)


def values(sequence: int, token: int) -> float:
    return (sequence + 1) * 0.37 - token * 0.11


def slow(mode: str) -> tuple[float, list[float]]:
    """Loss, and its derivative by each token's loss, from the definition of the mode."""
    with_tokens = [length for length in LENGTHS if length]
    loss, gradient = 0.0, []
    for sequence, length in enumerate(LENGTHS):
        for token in range(length):
            weight = {
                "token_mean": 1 / sum(LENGTHS),
                "token_sum": 1.0,
                "sequence_mean_token_mean": 1 / length / len(with_tokens),
                "sequence_mean_token_sum": 1 / len(with_tokens),
                "sequence_mean_token_sum_norm": 1 / MAX_TOKENS / len(with_tokens),
            }[mode]
            loss += weight * values(sequence, token)
            gradient.append(weight)
    return loss, gradient


def packed() -> tuple[Tensor, Tensor]:
    """Losses [K] and sequence lengths [K] of all tokens inside the loss."""
    losses = [values(sequence, token) for sequence, length in enumerate(LENGTHS) for token in range(length)]
    lengths = [float(length) for length in LENGTHS for _ in range(length)]
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(lengths, dtype=torch.float64)


def aggregation(mode: str, length: int = 0) -> Aggregation:
    settings = AlgorithmConfig.model_validate({"aggregation": mode, "aggregation_length": length})
    return Aggregation(settings, MAX_TOKENS, Totals(sum(LENGTHS), sum(length > 0 for length in LENGTHS)))


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_its_definition(mode: str) -> None:
    losses, lengths = packed()
    weights = aggregation(mode).weights(lengths)
    loss, gradient = slow(mode)
    assert (losses * weights).sum().item() == pytest.approx(loss, rel=1e-12)
    assert weights.tolist() == pytest.approx(gradient, rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_weights_do_not_depend_on_what_else_is_in_the_micro_batch(mode: str) -> None:
    _, lengths = packed()
    whole = aggregation(mode).weights(lengths)
    parts = [aggregation(mode).weights(part) for part in (lengths[:4], lengths[4:5], lengths[5:])]
    assert torch.equal(torch.cat(parts), whole)


def test_a_set_length_takes_the_place_of_the_longest_completion() -> None:
    _, lengths = packed()
    mode = "sequence_mean_token_sum_norm"
    assert aggregation(mode, 18).weights(lengths)[0].item() == pytest.approx(1 / 18 / 4)
    assert aggregation(mode).weights(lengths)[0].item() == pytest.approx(1 / 9 / 4)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_a_token_has_no_weights_and_no_error(mode: str) -> None:
    assert token_weights(torch.zeros(0), mode, Totals(0, 0), 9.0).tolist() == []


def padded() -> tuple[Tensor, Tensor]:
    """Losses and mask [B, T] of the sequences that have a token, as libraries with padding hold them."""
    lengths = [length for length in LENGTHS if length]
    rows = [sequence for sequence, length in enumerate(LENGTHS) if length]
    losses = torch.tensor([[values(row, token) for token in range(MAX_TOKENS)] for row in rows], dtype=torch.float64)
    mask = torch.tensor([[float(token < length) for token in range(MAX_TOKENS)] for length in lengths])
    return losses, mask.double()


def test_token_mean_is_dapo_and_trls_bnpo_on_one_rank() -> None:
    losses, mask = padded()
    assert slow("token_mean")[0] == pytest.approx(((losses * mask).sum() / mask.sum()).item(), rel=1e-12)


def test_sequence_mean_token_mean_is_grpo() -> None:
    losses, mask = padded()
    theirs = ((losses * mask).sum(-1) / mask.sum(-1)).mean()
    assert slow("sequence_mean_token_mean")[0] == pytest.approx(theirs.item(), rel=1e-12)


def test_sequence_mean_token_sum_norm_is_dr_grpo() -> None:
    losses, mask = padded()
    theirs = (losses * mask).sum() / (losses.shape[0] * MAX_TOKENS)
    assert slow("sequence_mean_token_sum_norm")[0] == pytest.approx(theirs.item(), rel=1e-12)


def test_modes_agree_where_all_sequences_are_equally_long() -> None:
    lengths = torch.full((6,), 3.0, dtype=torch.float64)
    totals = Totals(6, 2)
    by_token = token_weights(lengths, "token_mean", totals)
    torch.testing.assert_close(token_weights(lengths, "sequence_mean_token_mean", totals), by_token)
    torch.testing.assert_close(token_weights(lengths, "sequence_mean_token_sum_norm", totals, 3.0), by_token)
    torch.testing.assert_close(token_weights(lengths, "sequence_mean_token_sum", totals) / 3, by_token)
    torch.testing.assert_close(token_weights(lengths, "token_sum", totals) / 6, by_token)
