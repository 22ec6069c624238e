"""Formats of reasoning: is the completion written as it was asked for?

Runs in a reward worker. Each is 1 or 0; the rules are those of the libraries named, so that runs can be compared.
"""

from __future__ import annotations

import re

_THINK = re.compile(r"<think>(?!.*<think>).*?</think>", re.DOTALL)
_THINK_ANSWER = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)


def think_format(completion: str) -> float:
    """1 for a text that starts with its only <think> and closes it (TRL's think_format_reward)."""
    return float(_THINK.match(completion) is not None)


def think_answer_format(completion: str) -> float:
    """1 for <think>...</think>, white space, <answer>...</answer> and nothing else (ms-swift's `format`)."""
    return float(_THINK_ANSWER.fullmatch(completion) is not None)
