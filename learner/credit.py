"""Which token of a batch gets how much of the rewards: advantages of rows, and returns for a critic.

Runs in every learner rank; collective. The estimators are pure and stand in `advantages.py` and `returns.py`; here they
get what they need of the whole batch: its reward table, which every rank has, and sums over the tokens of all ranks.

Legend: P groups of the batch, G completions of one group, L tokens of one completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learner.advantages import PER_COMPLETION, WHITENED, RewardTable, sequence_advantages
from learner.batches import Column, Row
from learner.kl import reward_kl
from learner.ranks import Ranks
from learner.returns import gae, returns_to_go, token_rewards
from learner.whitening import whiten, whiten_groups, whitening_pivot, whitening_sums
from protocol.config import Config
from protocol.rewards import weighted_functions
from protocol.types import Share

Exact = NDArray[np.float64]


class Credit:
    """`algorithm.advantage` for the rows of one rank."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks

    def assign(self, rows: Sequence[Row], share: Share, kl_coef: float) -> list[Row]:
        """The rows with advantages, and with returns where there is a critic.

        `kl_coef`: what a token's reward loses per KL to the reference; 0 where the KL is no part of the reward.
        """
        if self._config.algorithm.advantage in PER_COMPLETION:
            table = self._sequence_advantages(rows, share)
            columns = [np.full(len(row.completion_tokens), table.flat[row.place], np.float32) for row in rows]
            return with_column(rows, "advantages", columns)
        rewards = [self._token_rewards(row, float(share.rewards.flat[row.place]), kl_coef) for row in rows]
        if self._config.algorithm.advantage == "gae":
            return self._generalised(rows, rewards)
        gamma = self._config.algorithm.gamma
        sums_of = [returns_to_go(reward, row.kept_mask, gamma) for row, reward in zip(rows, rewards, strict=True)]
        return with_column(rows, "advantages", self._whitened(rows, sums_of))

    def _token_rewards(self, row: Row, reward: float, kl_coef: float) -> Exact:
        penalties = kl_coef * token_kl(row) if kl_coef else np.zeros(len(row.completion_tokens))
        return token_rewards(reward, penalties, row.kept_mask)

    def _sequence_advantages(self, rows: Sequence[Row], share: Share) -> NDArray[np.float32]:
        """Advantages [P, G]; where they are whitened over tokens, only those of this rank's completions are right."""
        table = sequence_advantages(self._config.algorithm, reward_table(share, self._config))
        if self._config.algorithm.advantage not in WHITENED:
            return table
        num_tokens = np.zeros(table.shape)
        for row in rows:
            num_tokens.flat[row.place] = len(row.kept)
        return whiten_groups(table, num_tokens, *self._whitening(table, num_tokens))

    def _generalised(self, rows: Sequence[Row], rewards: Sequence[Exact]) -> list[Row]:
        advantages, returns = [], []
        for row, reward in zip(rows, rewards, strict=True):
            assert row.values is not None, "gae needs the critic's values"
            settings = self._config.algorithm
            raw, target = gae(reward, row.values, row.kept_mask, settings.gamma, settings.lam)
            advantages.append(raw)
            returns.append(target.astype(np.float32))
        return with_column(with_column(rows, "returns", returns), "advantages", self._whitened(rows, advantages))

    def _whitened(self, rows: Sequence[Row], columns: Sequence[Exact]) -> list[Column]:
        values = np.concatenate([*columns, np.zeros(0)])
        weights = np.concatenate([*(row.kept_mask for row in rows), np.zeros(0, np.bool_)])
        whitened = whiten(values, weights, *self._whitening(values, weights))
        return np.split(whitened, np.cumsum([len(column) for column in columns]))[: len(columns)]

    def _whitening(self, values: NDArray[Any], weights: NDArray[Any]) -> tuple[dict[str, float], float]:
        """Sums over all ranks, and their pivot."""
        pivot = self._ranks.max_across({"pivot": whitening_pivot(values, weights)})["pivot"]
        return self._ranks.sum_across(whitening_sums(values, weights, pivot)), pivot


def with_column(rows: Sequence[Row], name: str, columns: Sequence[Column]) -> list[Row]:
    """The rows with a further column [L] each."""
    changes: list[dict[str, Any]] = [{name: column} for column in columns]
    return [replace(row, **change) for row, change in zip(rows, changes, strict=True)]


def token_kl(row: Row) -> Exact:
    """KL [L] of the policy before the batch to the reference; 0 outside the loss."""
    assert row.proximal_logprobs is not None
    assert row.reference_logprobs is not None
    return reward_kl(row.proximal_logprobs, row.reference_logprobs, row.kept_mask)


def reward_table(share: Share, config: Config) -> RewardTable:
    """The rewards of the whole batch as `advantages.py` wants them; what the settings do not need is empty or NaN."""
    groups, size = share.rewards.shape
    if config.algorithm.advantage == "gdpo":
        functions, weights = share.function_rewards, [weight for _, weight in weighted_functions(config)]
    else:
        functions, weights = np.zeros((0, groups, size), np.float32), []
    greedy = share.greedy_rewards if config.algorithm.advantage == "remax" else np.full(groups, np.nan)
    return RewardTable(share.rewards, share.baseline_rewards, functions, np.array(weights), greedy)
