"""Batches for policy losses, and what a loss gives for them: by token, in float64, however a batch is cut.

The current policy is not a model: its log-probabilities and entropies stand in columns of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from learner.aggregation import Totals
from learner.batches import MicroBatch, Row, counts, empty_micro_batch, pack
from learner.losses import PolicyLoss
from protocol.algorithm import AlgorithmConfig
from tests.rows import random_rows
from tests.slow_losses import BOUND, DUAL, HIGH, LOW, TAU_NEGATIVE, TAU_POSITIVE

MAX_TOKENS = 32


def algorithm(**settings: Any) -> AlgorithmConfig:
    bounds = {
        "clip_low": LOW,
        "clip_high": HIGH,
        "dual_clip": DUAL,
        "dppo_bound": BOUND,
        "sapo_tau_positive": TAU_POSITIVE,
        "sapo_tau_negative": TAU_NEGATIVE,
    }
    return AlgorithmConfig.model_validate(bounds | settings)


def rows_of_a_batch(seed: int, number: int) -> list[Row]:
    """Rows with all that a policy loss reads. The current log-probabilities and the entropies stand in the columns that
    only a critic has: `values` and `returns`.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for row in random_rows(seed, number):
        size = len(row.completion_tokens)
        probability = rng.uniform(0.05, 0.95, size)
        drift = rng.choice([0.6, 1.0, 1.6])  # of the whole sequence
        current = np.clip(drift * probability + rng.normal(0.0, 0.15, size), 0.01, 0.99)
        columns = {
            "behavior_logprobs": np.log(np.clip(probability + rng.normal(0.0, 0.2, size), 0.01, 0.99)),
            "proximal_logprobs": np.log(probability),
            "values": np.log(current),
            "reference_logprobs": np.log(current) + rng.normal(0.0, 0.3, size),
            "returns": rng.uniform(0.0, 3.0, size),
            "corrections": rng.choice([0.0, 0.5, 1.0, 2.0], size),
        }
        columns["behavior_logprobs"] = np.where(np.isnan(row.behavior_logprobs), np.nan, columns["behavior_logprobs"])
        rows.append(replace(row, **{name: column.astype(np.float32) for name, column in columns.items()}))
    return rows


def in_double(batch: MicroBatch) -> MicroBatch:
    floats = {
        name: value.double() for name, value in vars(batch).items() if getattr(value, "is_floating_point", bool)()
    }
    return replace(batch, **floats)


def totals(rows: Sequence[Row]) -> Totals:
    total = counts(rows)
    return Totals(total["tokens"], total["sequences"])


Place = tuple[int, int]  # row, token of its completion


class Outcome:
    """What a loss gave for a batch, cut under a token budget: loss, sums, and gradients by place."""

    def __init__(self, loss: PolicyLoss, rows: Sequence[Row], budget: int) -> None:
        self.loss = 0.0
        self.sums: dict[str, float] = {}
        self.gradients: dict[Place, float] = {}
        self.entropy_gradients: dict[Place, float] = {}
        for batch in map(in_double, [*pack(rows, budget), empty_micro_batch()]):
            self._add(loss, rows, batch)

    def _add(self, loss: PolicyLoss, rows: Sequence[Row], batch: MicroBatch) -> None:
        logprobs, entropies = batch.values.clone().requires_grad_(), batch.returns.clone().requires_grad_()
        part, sums = loss(logprobs, entropies, batch)
        (part + 0.0 * entropies.sum()).backward()
        self.loss += part.item()
        self.sums = {name: self.sums.get(name, 0.0) + value.item() for name, value in sums.items()}
        places = [(index, int(place)) for index in batch.rows for place in rows[index].kept]
        assert logprobs.grad is not None
        assert entropies.grad is not None
        self.gradients |= dict(zip(places, logprobs.grad.tolist(), strict=True))
        self.entropy_gradients |= dict(zip(places, entropies.grad.tolist(), strict=True))
