"""The part of an engine that is alike without vLLM: a queue of requests that get one token each per step.

Base of the transformers and the fake engine, in the generator process. Weights change only between two steps, because
a step and a load hold the same lock; that every token's version is recorded rests on `_append`, which runs under it.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from actors.engine import (
    EngineDead,
    EngineError,
    EngineOptions,
    EnginePoisoned,
    EngineStatistics,
    GenerationAborted,
    HeldVersion,
    LoadTimes,
    NotLoaded,
    RequestFailed,
    check_before_load,
)
from protocol.types import Completion, FinishReason, SamplingParams, Tokens, VersionSpan
from protocol.weights import Snapshot


class Draw(NamedTuple):
    """One sampled token and the log-probability it was sampled with."""

    token: int
    logprob: float


@dataclass(eq=False)
class Running:
    """A request and what it has so far."""

    prompt: Tokens
    sampling: SamplingParams
    seed: int
    ended: asyncio.Future[Completion]
    draws: list[Draw] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    state: Any = None  # of the subclass


class SteppedEngine(ABC):
    """See `actors.engine.Engine`. A subclass draws tokens and swaps weights; it is never asked for both at a time."""

    def __init__(self, options: EngineOptions) -> None:
        self.held: HeldVersion | None = None
        self.held_base = ""
        self._options = options
        self._requests: dict[str, Running] = {}  # in order of arrival: the first `max_num_seqs` of them run
        self._arrival = asyncio.Event()
        self._between_steps = asyncio.Lock()
        self._stepping: asyncio.Task[None] | None = None
        self._failure: EngineError | None = None
        self._generated_tokens = 0
        self._num_unseeded = 0
        self._tokenizer: Tokenizer | None = None  # read when a request first wants to stop at a text

    @abstractmethod
    async def _build(self) -> None:
        """Make ready for the first load."""

    @abstractmethod
    async def _step(self, requests: Sequence[Running]) -> Sequence[Draw]:
        """Draw one token for each request."""

    @abstractmethod
    async def _swap(self, snapshot: Snapshot, requests: Sequence[Running]) -> None:
        """Take over every parameter of a snapshot and of its base, or raise; the requests go on afterwards."""

    @abstractmethod
    def _stop_token_ids(self) -> frozenset[int]:
        """The tokens that end every completion."""

    async def start(self) -> None:
        await self._build()
        self._stepping = asyncio.create_task(self._run_steps())

    async def generate(
        self, request_id: str, prompt_tokens: Tokens, sampling: SamplingParams, seed: int | None
    ) -> Completion:
        if self.held is None:
            async with self._between_steps:  # the first load may be running
                pass
        self._check()
        if self.held is None:
            raise NotLoaded("no request may be served before the first weights are loaded")
        if not 0 < len(prompt_tokens) < self._options.max_model_len:
            raise RequestFailed(
                f"a prompt has at least 1 and less than {self._options.max_model_len} tokens, got {len(prompt_tokens)}"
            )
        assert request_id not in self._requests, f"request {request_id} runs already"
        if seed is None:
            seed = hash((self._options.seed, self._num_unseeded))
            self._num_unseeded += 1
        request = Running(prompt_tokens, sampling, seed, asyncio.get_running_loop().create_future())
        self._requests[request_id] = request
        self._arrival.set()
        try:
            return await request.ended
        finally:
            del self._requests[request_id]

    async def load(self, snapshot: Snapshot) -> LoadTimes:
        started = time.perf_counter()
        async with self._between_steps:
            self._check()
            check_before_load(snapshot, self._options, self.held_base)
            paused = time.perf_counter()
            try:
                await self._swap(snapshot, [*self._requests.values()])
            except BaseException as error:  # a cancelled load has stopped half-way, too
                reason = str(error) or type(error).__name__
                self._fail(EnginePoisoned(f"the load of version {snapshot.version} failed half-way: {reason}"))
                if not isinstance(error, Exception):
                    raise
                self._check()
            self.held, self.held_base = HeldVersion(snapshot.version, snapshot.digest), snapshot.manifest.base
            return LoadTimes(paused - started, time.perf_counter() - paused, 0.0)

    def _has_stop(self, request: Running) -> bool:
        """Whether the last token completed one of the texts to stop at: a text has at most as many tokens as bytes."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_file(str(self._options.model_path / "tokenizer.json"))
        stop = request.sampling.stop
        window = [draw.token for draw in request.draws[-1 - max(len(text.encode()) for text in stop) :]]
        written = self._tokenizer.decode(window, skip_special_tokens=False)
        return any(text in written for text in stop)

    def progress(self) -> Mapping[str, int]:
        return {request_id: len(request.draws) for request_id, request in self._requests.items()}

    def statistics(self) -> EngineStatistics:
        self._check()
        num_running = min(len(self._requests), self._options.max_num_seqs)
        cached = sum(len(r.prompt) + len(r.draws) for r in [*self._requests.values()][:num_running])
        room = self._options.max_num_seqs * self._options.max_model_len
        return EngineStatistics(num_running, len(self._requests) - num_running, cached / room, self._generated_tokens)

    async def abort_all(self) -> None:
        self._end_all(GenerationAborted("the request was aborted"))

    async def close(self) -> None:
        if self._stepping is not None:
            self._stepping.cancel()
        if self._failure is None:
            self._fail(EngineDead("the engine was closed"))

    async def _run_steps(self) -> None:
        try:
            while self._failure is None:
                await self._arrival.wait()
                async with self._between_steps:
                    running = [r for r in self._requests.values() if not r.ended.done()][: self._options.max_num_seqs]
                    if not running:
                        self._arrival.clear()
                        continue
                    for request, draw in zip(running, await self._step(running), strict=True):
                        self._append(request, draw)
                await asyncio.sleep(0)
        except Exception as error:
            self._fail(EngineDead(f"a step failed: {type(error).__name__}: {error}"))

    def _append(self, request: Running, draw: Draw) -> None:
        """Record a token with the version that drew it, and end the request when it is complete."""
        assert self.held is not None
        position, version = len(request.draws), self.held.version
        request.draws.append(draw)
        self._generated_tokens += 1
        if request.spans and request.spans[-1].version == version:
            request.spans[-1] = request.spans[-1]._replace(end=position + 1)
        else:
            request.spans.append(VersionSpan(version, position, position + 1))
        if request.ended.done():  # aborted or cancelled during this step
            return
        stops = draw.token in self._stop_token_ids() or draw.token in request.sampling.stop_token_ids
        if stops or (request.sampling.stop and self._has_stop(request)):
            request.ended.set_result(_completion(request, FinishReason.STOP))
        elif position + 1 == min(request.sampling.max_tokens, self._options.max_model_len - len(request.prompt)):
            request.ended.set_result(_completion(request, FinishReason.LENGTH))

    def _check(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)

    def _fail(self, failure: EngineError) -> None:
        self._failure = failure
        self._end_all(failure)

    def _end_all(self, error: EngineError) -> None:
        for request in self._requests.values():
            if not request.ended.done():
                request.ended.set_exception(type(error)(*error.args))


def _completion(request: Running, reason: FinishReason) -> Completion:
    return Completion(
        np.array([d.token for d in request.draws], dtype=np.int32),
        np.array([d.logprob for d in request.draws], dtype=np.float32),
        tuple(request.spans),
        reason,
    )
