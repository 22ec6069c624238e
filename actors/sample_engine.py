"""The engine as the rollout of one sample has it: the run's sampling, this sample's seeds, and a clock.

Runs in the generator process, one for each sample. Its request ids begin with the sample's, which is how the
generator counts what a lease has so far. That nothing is trained which the model did not write there rests on `check`,
which compares a rollout's completion with what was generated here, token by token.

Legend: L tokens of a completion.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from actors.engine import Engine, EngineError
from actors.rollout import Attempt, RolloutFailed, turn_seed
from actors.texts import Texts
from protocol.types import Completion, FinishReason, Logprobs, Prompt, SamplingParams, Tokens, VersionSpan

SPARE = 32  # a sample may generate so many times max_tokens in all, with what it throws away
MAX_SPAN_TOKENS = 1 << 24  # an end beyond it is none of ours


class SampleEngine:
    """What a rollout is called with. Token ids are arrays or lists of integers."""

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        attempt: Attempt,
        texts: Texts,
        context_tokens: int,
        own_time_s: float,
        generated: Callable[[int], None],
    ) -> None:
        self.max_tokens = attempt.sampling.max_tokens  # of the whole completion: turns and observations together
        self.failure: EngineError | None = None  # what the engine raised: not the rollout's to forgive
        self.expired: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._engine, self._prompt, self._attempt, self._texts = engine, prompt, attempt, texts
        self._context_tokens, self._left_s, self._generated = context_tokens, own_time_s, generated
        self._num_turns = self._num_generated = self._num_waiting = 0
        self._turns: dict[bytes, list[Completion]] = defaultdict(list)  # by digest of what they were generated behind
        self._calls: set[asyncio.Future[Completion]] = set()  # what the engine works on
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._start_clock()

    @property
    def version(self) -> int:
        """Policy version that the next token would be sampled by."""
        assert self._engine.held is not None, "leases come after weights"
        return self._engine.held.version

    async def generate(
        self,
        tokens: Tokens | Sequence[int],
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        max_tokens: int | None = None,
    ) -> Completion:
        """What the model writes behind `tokens`, which are the prompt's and all that came since.

        It ends with the token that completes a text of `stop`, with one of `stop_token_ids`, where the model itself
        ends, or after `max_tokens`. Raises RequestFailed or EngineDead, which end the sample even if they are caught.
        """
        context = self.checked(tokens)
        sampling = self._sampling(len(context), stop, stop_token_ids, max_tokens)
        turn, self._num_turns = self._num_turns, self._num_turns + 1
        request_id = f"{self._attempt.request_id}-{turn}" if turn else self._attempt.request_id
        asked = self._engine.generate(request_id, context, sampling, turn_seed(self._attempt, turn))
        call = asyncio.ensure_future(asked)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        try:
            with self._clock_stopped():
                made = await call
        except EngineError as error:
            self.failure = error
            raise
        for array in (made.tokens, made.behavior_logprobs):
            array.setflags(write=False)  # it is what `check` compares with
        self._num_generated += len(made.tokens)
        self._generated(len(made.tokens))
        self._turns[_digest(context)].append(made)
        return made

    def encode(self, text: str) -> Tokens:
        """Token ids of what a tool or a user said."""
        return self._texts.encode(text)

    def decode(self, tokens: Tokens | Sequence[int], *, special: bool = False) -> str:
        """The text of some tokens; `special`: with the names of special tokens."""
        return self._texts.decode(self.checked(tokens), special=special)

    async def between_turns(self, messages: Sequence[Mapping[str, str]]) -> Tokens:
        """Token ids of chat messages as the model's chat template puts them between two of its turns."""
        return await self._texts.between_turns(messages)

    def checked(self, tokens: Tokens | Sequence[int]) -> Tokens:
        """The ids as an array [L] of int32. Raises RolloutFailed if they are none of the model's."""
        ids = np.asarray(tokens if len(tokens) else np.zeros(0, np.int32))
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise RolloutFailed(f"token ids are a list of integers, got {ids.dtype} of shape {ids.shape}")
        outside = ids[(ids < 0) | (ids >= self._texts.vocabulary)]
        if len(outside):
            raise RolloutFailed(f"token ids are 0 to {self._texts.vocabulary - 1}, got {outside[0]}")
        return ids.astype(np.int32)

    def check(self, completion: Completion) -> Completion:
        """The same as it may be sent: in the types of the wire, with no log-probability of what was observed.

        Raises RolloutFailed unless its tokens fit, and every one that is not observed was generated in its place.
        """
        tokens = self.checked(completion.tokens)
        length = len(tokens)
        if not 0 < length <= self.max_tokens:
            raise RolloutFailed(f"a completion has 1 to {self.max_tokens} tokens (sampling.max_tokens), got {length}")
        observed = np.zeros(length, np.bool_) if completion.observed is None else np.asarray(completion.observed)
        if observed.shape != (length,) or observed.dtype != np.bool_:
            raise RolloutFailed(
                f"observed has a mark for each of {length} tokens, got {observed.dtype}{observed.shape}"
            )
        if observed.all():
            raise RolloutFailed("every token is observed, and none of the model's is left to train")
        versions, logprobs = _token_versions(completion.spans), np.asarray(completion.behavior_logprobs, np.float32)
        if len(versions) != length or logprobs.shape != (length,):
            raise RolloutFailed(
                f"spans and log-probabilities cover {length} tokens, got {len(versions)} and {len(logprobs)}; let "
                "Conversation.completion make them"
            )
        place = 0
        while place < length:
            place += 1 if observed[place] else self._generated_at(place, tokens, logprobs, versions, observed)
        marks = observed if observed.any() else None
        known = np.where(observed, np.float32(np.nan), logprobs)
        return Completion(tokens, known, _spans(versions), FinishReason(completion.finish_reason), marks)

    def close(self) -> None:
        """From now on it generates nothing, also for tasks that the rollout has left behind."""
        self._closed = True
        for call in list(self._calls):
            call.cancel()
        if self._timer is not None:
            self._timer.cancel()

    def _sampling(
        self, num_context: int, stop: Sequence[str], stop_token_ids: Sequence[int], max_tokens: int | None
    ) -> SamplingParams:
        """What to ask the engine for. Raises RolloutFailed if there is nothing to ask for."""
        if self._closed:
            raise RolloutFailed("this sample has ended; a rollout must not go on behind its end")
        stop = stop if isinstance(stop, str) else tuple(stop)
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise RolloutFailed(f"stop is a list of texts that are not empty, got {stop!r}")
        if not isinstance(max_tokens, int | np.integer | None):
            raise RolloutFailed(f"max_tokens is a whole number, got {max_tokens!r}")
        most = self.max_tokens if max_tokens is None else min(int(max_tokens), self.max_tokens)
        room = min(most, self._context_tokens - num_context)
        if room < 1:
            raise RolloutFailed("there is no room for another token; look at Conversation.ended before each turn")
        if self._num_generated >= SPARE * self.max_tokens:
            raise RolloutFailed(
                f"one sample generated {self._num_generated} tokens, {SPARE} times sampling.max_tokens; end it sooner"
            )
        own = self._attempt.sampling
        ids = (*own.stop_token_ids, *self.checked(tuple(stop_token_ids)).tolist())
        return replace(own, max_tokens=room, stop=(*own.stop, *stop), stop_token_ids=ids)

    def _generated_at(
        self, start: int, tokens: Tokens, logprobs: Logprobs, versions: NDArray[np.int64], observed: NDArray[np.bool_]
    ) -> int:
        """How many tokens from `start` on are those of one turn that was generated there."""
        behind = _digest(np.concatenate([self._prompt.tokens, tokens[:start]]))
        best = 0
        for turn in self._turns.get(behind, []):
            size = min(len(turn.tokens), len(tokens) - start)
            here = slice(start, start + size)
            same = (turn.tokens[:size] == tokens[here]) & ~observed[here]
            one, other = turn.behavior_logprobs[:size], logprobs[here]
            same &= (one == other) | (np.isnan(one) & np.isnan(other))
            same &= _token_versions(turn.spans)[:size] == versions[here]
            best = max(best, size if same.all() else int(same.argmin()))
        if not best:
            raise RolloutFailed(
                f"token {start} of the completion was not generated behind those before it: keep the ids that generate "
                "returned, never encode what the model wrote, and mark what it did not write as observed"
            )
        return best

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        if self._num_waiting == 0 and self._timer is not None:
            self._left_s = self._timer.when() - asyncio.get_running_loop().time()
            self._timer.cancel()
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1
            if self._num_waiting == 0 and not self._closed:
                self._start_clock()

    def _start_clock(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(max(self._left_s, 0.0), self._expire)

    def _expire(self) -> None:
        if not self.expired.done():
            self.expired.set_result(None)


def _digest(tokens: Tokens) -> bytes:
    return blake2b(np.ascontiguousarray(tokens, "<i4").tobytes(), digest_size=16).digest()


def _token_versions(spans: Iterable[VersionSpan]) -> NDArray[np.int64]:
    """Policy version of each token, as far as the spans go on from one to the next."""
    versions: list[int] = []
    for version, start, end in spans:
        if start == len(versions) and end <= MAX_SPAN_TOKENS and (not versions or version >= versions[-1]):
            versions += [version] * (end - start)
    return np.array(versions, np.int64)


def _spans(versions: NDArray[np.int64]) -> tuple[VersionSpan, ...]:
    """One for each run of equal versions."""
    cuts = [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist(), len(versions)]
    return tuple(VersionSpan(int(versions[start]), start, end) for start, end in pairwise(cuts))
