"""From a completion's tokens to its reward: decode, call the functions in the pool, add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from actors.rewards.pool import RewardFailed, RewardPool, Scored
from actors.rollout import Episode
from protocol.fields import MAX_METRICS
from protocol.rollouts import ENVIRONMENT
from protocol.sections import RewardsConfig
from protocol.types import Completion, Prompt


@dataclass(frozen=True, slots=True)
class Score:
    """What the functions said of one completion, or why they did not."""

    reward: float = 0.0
    rewards: Mapping[str, float | None] = field(default_factory=dict)  # by function, before its weight
    error: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)  # what they returned beside, as FUNCTION/KEY


class Scorer:
    """Scores for one generator."""

    def __init__(
        self, settings: RewardsConfig, model: Path, max_tokens: int, environment_weight: float | None = None
    ) -> None:
        self._pool = RewardPool(settings, max_tokens)
        self._weights = [function.weight for function in settings.functions]
        self._environment_weight = environment_weight  # of a rollout's own reward; None: it gives none
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    async def start(self) -> None:
        if self._weights:
            await self._pool.start()

    async def score(self, prompt: Prompt, episode: Episode) -> Score:
        """The weighted sum over the functions that have an opinion; an error when one fails, or none has an opinion.

        Where the rollout has a weight, its environment is one of them.
        """
        scored = await self._functions_on(prompt, episode.completion)
        if isinstance(scored, Score):
            return scored
        values, weights = [row[0] for row in scored.values], self._weights
        names = self._pool.names
        if self._environment_weight is not None:
            values, weights = [*values, episode.reward], [*weights, self._environment_weight]
            names = [*names, ENVIRONMENT]
        if all(value is None for value in values):
            return Score(error="no reward function has an opinion")
        total = sum(weight * value for weight, value in zip(weights, values, strict=True) if value is not None)
        metrics = {**episode.metrics, **scored.metrics[0]}
        return Score(total, dict(zip(names, values, strict=True)), metrics=dict(islice(metrics.items(), MAX_METRICS)))

    async def _functions_on(self, prompt: Prompt, completion: Completion) -> Scored | Score:
        """What the pool said of it, or the error that it is."""
        if not self._weights:
            return Scored([], [{}])
        tokens = completion.tokens.tolist()
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        try:
            return await self._pool.score([text], [tokens], prompt.columns)
        except RewardFailed as error:
            return Score(error=str(error))

    async def close(self) -> None:
        await self._pool.close()
