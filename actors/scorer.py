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
from protocol.brought_code import shown_name
from protocol.config import Config
from protocol.fields import MAX_METRICS
from protocol.reward_model import REWARD_MODEL
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
    answers: Mapping[str, str] = field(default_factory=dict)  # in an evaluation: the final answer that each has found


class Scorer:
    """Scores for one generator."""

    def __init__(self, config: Config, rewards: RewardsConfig, model: Path, device: str = "cpu") -> None:
        """`rewards`: all of the run's, with code and model where this host has them; `device`: where that computes."""
        self._names = [shown_name(function.use) for function in config.all_rewards.functions]
        self._weights = dict(scored_by(config))
        self._pool: RewardPool | None = None
        if rewards.functions:
            num_trained, max_tokens = len(config.rewards.functions), config.sampling.max_tokens
            self._pool = RewardPool(rewards, max_tokens, names=self._names, num_trained=num_trained)
        trusted = config.model.trust_remote_code
        self._model = RewardModel(rewards.model, device, trusted) if rewards.model.path else None
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    async def start(self) -> None:
        """Raises ConfigError if reward code or reward model cannot be loaded."""
        if self._pool is not None:
            await self._pool.start()
        if self._model is not None:
            await self._model.start()

    async def score(self, prompt: Prompt, episode: Episode, *, evaluating: bool = False) -> Score:
        """The weighted sum over those that have an opinion; an error when one fails, or none has an opinion.

        `evaluating`: the functions of evaluations are called too; they are no part of the sum. The model comes last: a
        completion that is an error by then costs it nothing.
        """
        completion = episode.completion
        tokens = completion.tokens.tolist()
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        scored, values = Scored([], [{}], [{}]), dict[str, float | None]()
        try:
            if self._pool is not None:
                version = completion.spans[-1].version
                scored = await self._pool.score([text], [tokens], prompt.columns, version, evaluating=evaluating)
                values = dict(zip(self._names, (row[0] for row in scored.values), strict=False))
            if self._model is not None:
                values[REWARD_MODEL] = await self._model.score(prompt.conversation, text)
        except RewardFailed as error:
            return Score(error=str(error))
        if ENVIRONMENT in self._weights:
            values[ENVIRONMENT] = episode.reward
        opinions = [(name, value) for name, value in values.items() if value is not None]
        if not opinions:
            return Score(error="no reward function has an opinion")
        metrics = {**episode.metrics, **scored.metrics[0]}
        total = sum(self._weights.get(name, 0.0) * value for name, value in opinions)
        return Score(total, values, metrics=dict(islice(metrics.items(), MAX_METRICS)), answers=scored.answers[0])

    async def close(self) -> None:
        if self._model is not None:
            await self._model.close()
        if self._pool is not None:
            await self._pool.close()
