"""From a completion's tokens to its reward: decode, call the functions in the pool, add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from actors.rewards.model import RewardModel
from actors.rewards.pool import RewardPool, Scored
from actors.rewards.process import RewardFailed
from actors.rollout import Episode
from protocol.fields import MAX_METRICS
from protocol.rewards import scored_by
from protocol.rollouts import ENVIRONMENT
from protocol.sections import RewardsConfig
from protocol.types import Prompt


@dataclass(frozen=True, slots=True)
class Score:
    """What the functions said of one completion, or why they did not."""

    reward: float = 0.0
    rewards: Mapping[str, float | None] = field(default_factory=dict)  # by function, before its weight
    error: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)  # what they returned beside, as FUNCTION/KEY


class Scorer:
    """Scores for one generator. `device`: where that computes."""

    def __init__(
        self,
        settings: RewardsConfig,
        model: Path,
        max_tokens: int,
        device: str = "cpu",
        trust_remote_code: bool = False,
        environment_weight: float | None = None,
    ) -> None:
        self._pool = RewardPool(settings, max_tokens) if settings.functions else None
        self._model = RewardModel(settings.model, device, trust_remote_code) if settings.model.path else None
        self._scored_by = scored_by(settings)
        self._has_environment = environment_weight is not None  # whose reward the rollout gives
        if environment_weight is not None:
            self._scored_by.append((ENVIRONMENT, environment_weight))
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    async def start(self) -> None:
        """Raises ConfigError if reward code or reward model cannot be loaded."""
        if self._pool is not None:
            await self._pool.start()
        if self._model is not None:
            await self._model.start()

    async def score(self, prompt: Prompt, episode: Episode) -> Score:
        """The weighted sum over those that have an opinion; an error when one fails, or none has an opinion.

        The model comes last: a completion that is an error by then costs it nothing.
        """
        completion = episode.completion
        tokens = completion.tokens.tolist()
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        scored = Scored([], [{}])
        try:
            if self._pool is not None:
                scored = await self._pool.score([text], [tokens], prompt.columns, completion.spans[-1].version)
            values = [row[0] for row in scored.values]
            if self._model is not None:
                values.append(await self._model.score(prompt.conversation, text))
        except RewardFailed as error:
            return Score(error=str(error))
        if self._has_environment:
            values.append(episode.reward)
        if all(value is None for value in values):
            return Score(error="no reward function has an opinion")
        pairs = list(zip(self._scored_by, values, strict=True))
        metrics = {**episode.metrics, **scored.metrics[0]}
        total = sum(weight * value for (_, weight), value in pairs if value is not None)
        return Score(
            total, {name: value for (name, _), value in pairs}, metrics=dict(islice(metrics.items(), MAX_METRICS))
        )

    async def close(self) -> None:
        if self._model is not None:
            await self._model.close()
        if self._pool is not None:
            await self._pool.close()
