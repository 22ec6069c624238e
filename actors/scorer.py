"""From a completion's tokens to its reward: decode, call the functions in the pool, add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from actors.rewards.pool import RewardFailed, RewardPool
from protocol.sections import RewardsConfig
from protocol.types import Completion, Prompt


@dataclass(frozen=True, slots=True)
class Score:
    """What the functions said of one completion, or why they did not."""

    reward: float = 0.0
    rewards: Mapping[str, float | None] = field(default_factory=dict)  # by function, before its weight
    error: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)  # what they returned beside, as FUNCTION/KEY
    answers: Mapping[str, str] = field(default_factory=dict)  # in an evaluation: the final answer that each has found


class Scorer:
    """Scores for one generator. Only the first `num_trained` functions score what is trained; None: all of them."""

    def __init__(self, settings: RewardsConfig, model: Path, max_tokens: int, num_trained: int | None = None) -> None:
        self._pool = RewardPool(settings, max_tokens, num_trained)
        self._weights = [function.weight for function in settings.functions[:num_trained]]
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    async def start(self) -> None:
        await self._pool.start()

    async def score(self, prompt: Prompt, completion: Completion, *, evaluating: bool = False) -> Score:
        """The weighted sum over the functions that have an opinion; an error when one fails, or none has an opinion.

        `evaluating`: the functions of evaluations are called too; they are no part of the sum.
        """
        tokens = completion.tokens.tolist()
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        try:
            scored = await self._pool.score([text], [tokens], prompt.columns, evaluating=evaluating)
        except RewardFailed as error:
            return Score(error=str(error))
        values = [row[0] for row in scored.values]
        if all(value is None for value in values):
            return Score(error="no reward function has an opinion")
        trained = zip(self._weights, values[: len(self._weights)], strict=True)
        total = sum(weight * value for weight, value in trained if value is not None)
        by_name = dict(zip(self._pool.names[: len(values)], values, strict=True))
        return Score(total, by_name, metrics=scored.metrics[0], answers=scored.answers[0])

    async def close(self) -> None:
        await self._pool.close()
