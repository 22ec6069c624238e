"""A completion in the making: the model's turns and what its environment says between them, in token ids.

Runs in the generator process, inside a rollout. That observed tokens are marked, and that spans name the version of
every token without gaps, rests on `observe` and `completion`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from actors.rollout import RolloutFailed
from actors.sample_engine import SampleEngine
from protocol.types import Completion, FinishReason, Prompt, Tokens, VersionSpan


class Conversation:
    """Turns and observations of one sample, in order. `sampling.max_tokens` bounds all of them together."""

    def __init__(self, engine: SampleEngine, prompt: Prompt) -> None:
        self._engine, self._prompt = engine, prompt
        self._parts: list[Completion] = []  # what was observed is one, too
        self._length = 0
        self._model_ended = False

    @property
    def room(self) -> int:
        """Tokens that fit yet."""
        return self._engine.max_tokens - self._length

    @property
    def ended(self) -> bool:
        """Whether the model has ended its turn itself, or there is no room left."""
        return self._model_ended or self.room == 0

    @property
    def tokens(self) -> Tokens:
        """The prompt and all that came since: what the next turn is generated behind."""
        return np.concatenate([self._prompt.tokens, *(part.tokens for part in self._parts)])

    def text(self) -> str:
        """All that came since the prompt, as the rewards will read it."""
        return self._engine.decode(self.tokens[len(self._prompt.tokens) :])

    async def generate(
        self, stop: Sequence[str] = (), stop_token_ids: Sequence[int] = (), max_tokens: int | None = None
    ) -> Completion:
        """The model's next turn, which is added. Raises as `SampleEngine.generate`, also where there is no room."""
        most = self.room if max_tokens is None else min(max_tokens, self.room)
        turn = await self._engine.generate(self.tokens, stop, stop_token_ids, most)
        self._add(turn)
        self._model_ended = turn.finish_reason is FinishReason.STOP and not self._stopped(turn, stop, stop_token_ids)
        return turn

    def observe(self, tokens: Tokens | Sequence[int]) -> None:
        """Add what the environment says, as token ids; what does not fit is cut off, and then there is no room left."""
        ids = self._engine.checked(tokens)[: self.room]
        if not len(ids):
            return
        version = self._parts[-1].spans[-1].version if self._parts else self._engine.version
        spans = (VersionSpan(version, 0, len(ids)),)
        unknown = np.full(len(ids), np.nan, np.float32)
        self._add(Completion(ids, unknown, spans, FinishReason.LENGTH, np.ones(len(ids), np.bool_)))
        self._model_ended = False

    async def reply(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Observe chat messages as the model's chat template puts them behind its turn, whether it ended that or not.

        Raises RolloutFailed if the template does not allow it.
        """
        ids = await self._engine.between_turns(messages)
        has_end = self._model_ended and ids[:1].tolist() == self.tokens[-1:].tolist()
        self.observe(ids[1:] if has_end else ids)

    def completion(self) -> Completion:
        """All of it as one. Raises RolloutFailed if the model has written nothing."""
        parts = self._parts
        if all(part.observed is not None for part in parts):
            raise RolloutFailed("the model has written nothing; call generate before completion")
        spans: list[VersionSpan] = []
        start = 0
        for part in parts:
            for span in part.spans:
                if spans and spans[-1].version == span.version:
                    spans[-1] = spans[-1]._replace(end=start + span.end)
                else:
                    spans.append(VersionSpan(span.version, start + span.start, start + span.end))
            start += len(part.tokens)
        was_cut = self.room == 0 and not self._model_ended
        turns = [part for part in parts if part.observed is None]
        marks = [np.zeros(len(part.tokens), np.bool_) if part.observed is None else part.observed for part in parts]
        return Completion(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.behavior_logprobs for part in parts]),
            tuple(spans),
            FinishReason.LENGTH if was_cut else turns[-1].finish_reason,
            np.concatenate(marks) if len(turns) < len(parts) else None,
        )

    def _add(self, part: Completion) -> None:
        self._parts.append(part)
        self._length += len(part.tokens)

    def _stopped(self, turn: Completion, stop: Sequence[str], stop_token_ids: Sequence[int]) -> bool:
        """Whether the turn ended where it was asked to, and not where the model wanted to."""
        if int(turn.tokens[-1]) in stop_token_ids:
            return True
        text = self._engine.decode(turn.tokens, special=True) if stop else ""
        return any(each in text for each in stop)
