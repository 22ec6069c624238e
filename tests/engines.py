"""What the tests of all engines share: prompts, a loop that outlives one test, and waiting with a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from actors.engine import Engine
from protocol.types import Completion, SamplingParams, Tokens


def prompts(number: int, length: int = 40, shared: int = 0, vocabulary: int = 200) -> list[Tokens]:
    """Random prompts that begin with the same `shared` tokens; none holds the end of sequence."""
    rng = np.random.default_rng(7)
    head = rng.integers(2, vocabulary, shared)
    return [
        np.concatenate([head, rng.integers(2, vocabulary, length - shared)]).astype(np.int32) for _ in range(number)
    ]


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        await asyncio.sleep(0.002)


def begin(
    engine: Engine, questions: list[Tokens], sampling: SamplingParams, name: str = "r", seed: int = 0
) -> list[asyncio.Task[Completion]]:
    """Start one request per question, with the seeds seed, seed + 1, .."""
    return [
        asyncio.create_task(engine.generate(f"{name}{i}", question, sampling, seed + i))
        for i, question in enumerate(questions)
    ]


async def all_reached(engine: Engine, number: int, tokens: int) -> None:
    """Wait until `number` requests run and each has so many tokens."""
    await until(
        lambda: len(engine.progress()) == number and min(engine.progress().values()) >= tokens,
        f"{number} requests with {tokens} tokens each",
    )


async def outcome(call: Awaitable[Any], timeout_s: float = 20.0) -> Any:
    """The result of a call, or the exception it raised."""
    try:
        return await asyncio.wait_for(call, timeout_s)
    except Exception as error:
        return error
