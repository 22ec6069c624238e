"""The plain rollout: the prompt's tokens in, one completion out."""

from __future__ import annotations

from actors.sample_engine import SampleEngine
from protocol.types import Completion, Prompt


async def single_turn(engine: SampleEngine, prompt: Prompt) -> Completion:
    return await engine.generate(prompt.tokens)
