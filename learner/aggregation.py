"""How the losses of tokens become the loss of a batch: a weight for each token. Pure tensors in, tensors out.

Runs in every learner rank. A loss is the sum of weight * per-token loss over the tokens of all micro-batches on all
ranks. The denominators in the weights are those of the whole mini-batch on all ranks (`Totals`), so neither packing nor
micro-batches nor the number of ranks change loss or gradient. That promise rests on `token_weights`.

Legend: K tokens inside the loss of one micro-batch, N tokens and S sequences inside the loss of the whole mini-batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from protocol.algorithm import AlgorithmConfig


class Totals(NamedTuple):
    """What the whole mini-batch has, on all ranks."""

    tokens: float  # N, inside the loss
    sequences: float  # S, with a token inside the loss


def token_weights(
    sequence_lengths: Tensor, aggregation: str, totals: Totals, norm_tokens: float | None = None
) -> Tensor:
    """Weight [K] of each token in the loss; `sequence_lengths` [K] is n, the tokens in the loss of its own sequence.

    ============================  ============  =========================================================
    token_mean                    1 / N         DAPO (Yu et al. 2025, eq. 8); TRL's bnpo; weights add up to 1
    token_sum                     1
    sequence_mean_token_mean      1 / (n S)     GRPO (Shao et al. 2024, eq. 3), GSPO; weights add up to 1
    sequence_mean_token_sum       1 / S
    sequence_mean_token_sum_norm  1 / (L S)     Dr. GRPO (Liu et al. 2025): L = `norm_tokens`, the same for all
    ============================  ============  =========================================================

    N and S are at least 1, so that a mini-batch without a token has a loss of 0. A sequence without a token in the loss
    is not in S, as in verl; TRL counts it.
    """
    num_tokens, num_sequences = max(totals.tokens, 1.0), max(totals.sequences, 1.0)
    match aggregation:
        case "token_mean":
            return torch.full_like(sequence_lengths, 1.0 / num_tokens)
        case "token_sum":
            return torch.ones_like(sequence_lengths)
        case "sequence_mean_token_mean":
            return 1.0 / (sequence_lengths * num_sequences)
        case "sequence_mean_token_sum":
            return torch.full_like(sequence_lengths, 1.0 / num_sequences)
        case "sequence_mean_token_sum_norm":
            assert norm_tokens is not None, "sequence_mean_token_sum_norm needs the length to divide by"
            return torch.full_like(sequence_lengths, 1.0 / (norm_tokens * num_sequences))
    raise AssertionError(aggregation)


class Aggregation:
    """`token_weights` with the run's settings: what policy loss, KL, entropy bonus and value loss are added up with."""

    def __init__(self, settings: AlgorithmConfig, max_tokens: int, totals: Totals) -> None:
        """`max_tokens` is `sampling.max_tokens`, the L of Dr. GRPO unless `aggregation_length` is set."""
        self._mode = settings.aggregation
        self._norm_tokens = float(settings.aggregation_length or max_tokens)
        self._totals = totals

    def weights(self, sequence_lengths: Tensor) -> Tensor:
        """Weight [K] of each token."""
        return token_weights(sequence_lengths, self._mode, self._totals, self._norm_tokens)
