"""An engine without a model, for tests of everything around one: same interface, same errors, tokens from a hash.

Runs in the generator process, or anywhere else: it needs no torch. A token depends on (version, prompt, seed,
position) alone, so `fake_token` tells afterwards which version drew it. It reads the snapshots it loads and finds a
torn one.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from hashlib import blake2b

from actors.engine import EngineOptions
from actors.stepped_engine import Draw, Running, SteppedEngine
from protocol.types import SamplingParams, Tokens
from protocol.weights import Snapshot

EOS = 0


def fake_key(prompt: Tokens, seed: int, sampling: SamplingParams) -> bytes:
    """What a completion's tokens have in common; greedy ones do not depend on the seed."""
    return blake2b(prompt.astype("<i4").tobytes(), key=str(seed if sampling.temperature else 0).encode()).digest()


def fake_token(key: bytes, version: int, position: int, vocabulary: int, mean_tokens: float) -> Draw:
    """The token at `position` of the completion with `key`: EOS with probability 1 / mean_tokens, else another."""
    place = struct.pack("<qq", version, position)
    choice, end = struct.unpack("<II", blake2b(key + place, digest_size=8).digest())
    token = EOS if end < 2**32 / mean_tokens else 1 + choice % (vocabulary - 1)
    return Draw(token, -(1 + choice % 1000) / 500)


class FakeEngine(SteppedEngine):
    """See `actors.engine.Engine`."""

    def __init__(
        self,
        options: EngineOptions,
        step_s: float = 0.0,  # time of one step, in which each running request gets a token
        load_s: float = 0.0,  # time of one weight load
        mean_tokens: float = 20.0,  # of a completion that is not cut off
        vocabulary: int = 1000,
    ) -> None:
        super().__init__(options)
        self._step_s = step_s
        self._load_s = load_s
        self._mean_tokens = mean_tokens
        self._vocabulary = vocabulary

    async def _build(self) -> None:
        pass

    async def _step(self, requests: Sequence[Running]) -> list[Draw]:
        await asyncio.sleep(self._step_s)
        return [self._draw(request) for request in requests]

    def _draw(self, request: Running) -> Draw:
        assert self.held is not None
        if request.state is None:
            request.state = fake_key(request.prompt, request.seed, request.sampling)
        return fake_token(request.state, self.held.version, len(request.draws), self._vocabulary, self._mean_tokens)

    async def _swap(self, snapshot: Snapshot, requests: Sequence[Running]) -> None:
        await asyncio.to_thread(snapshot.verify)
        await asyncio.sleep(self._load_s)

    def _stop_token_ids(self) -> frozenset[int]:
        return frozenset({EOS})
