"""A calculator, in the form in which GSM8K's answers have one: behind `<<47*36=` the tool writes `1692>>`.

Runs in the generator process. The result is an observation: it is in the text that rewards read, and outside the loss.
Where there is nothing to work out, the tool is silent and the model goes on by itself.
"""

from __future__ import annotations

import re

from actors.conversation import Conversation
from actors.rollout import Episode
from actors.rollouts.arithmetic import NotASum, worked_out
from actors.sample_engine import SampleEngine
from protocol.types import Prompt

ASKED = re.compile(r"<<([^<>=]*)=$")


async def calculator(engine: SampleEngine, prompt: Prompt) -> Episode:
    """Turns that end at each `=`, until the model ends its answer or there is no room."""
    conversation, calls = Conversation(engine, prompt), 0
    while not conversation.ended:
        await conversation.generate(stop=["="])
        asked = ASKED.search(conversation.text())
        if asked is None or conversation.ended:
            continue
        try:
            conversation.observe(engine.encode(f"{worked_out(asked.group(1))}>>"))
            calls += 1
        except NotASum:
            continue
    return Episode(conversation.completion(), metrics={"calls": float(calls)})
