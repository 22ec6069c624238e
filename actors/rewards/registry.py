"""Reward functions by name: built in, FILE.py:NAME, or the NAME of a module that Python finds.

Runs in a reward worker. A module is imported when a run uses it: math-verify brings sympy, which few runs need.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from actors.brought_code import brought_function
from actors.rewards.shapes import Opinion, Score, per_completion, shaped
from protocol.brought_code import shown_name
from protocol.errors import ConfigError
from protocol.rewards import BUILT_IN

HOMES: Mapping[str, tuple[str, ...]] = {  # module of this package -> its functions
    "gsm8k": ("gsm8k", "gsm8k_flexible"),
    "math_accuracy": ("math_accuracy", "math_accuracy_reasoning", "math_accuracy_swift"),
    "math_dapo": ("math_dapo",),
    "formats": ("think_format", "think_answer_format"),
    "cosine": ("cosine", "cosine_swift"),
    "lengths": ("soft_overlong", "soft_overlong_swift", "length"),
    "repetition": ("repetition", "repetition_tokens"),
    "xml": ("xml_count", "xml_soft_format", "xml_strict_format", "xml_int", "xml_correctness"),
}
ANSWERS: Mapping[str, str] = {  # function -> what finds the final answer in a text, in the same module
    "gsm8k": "marked_number",
    "gsm8k_flexible": "last_number",
    "math_accuracy": "boxed",
    "math_accuracy_reasoning": "boxed_behind_reasoning",
    "math_accuracy_swift": "tagged",
    "math_dapo": "stated_answer",
    "xml_correctness": "tagged_text",
}
GIVEN = ("completion", "answer", "completion_ids", "max_tokens")  # what a built-in function has without args


@dataclass(frozen=True, slots=True)
class Reward:
    """One function of the sum."""

    name: str
    weight: float
    score: Score
    find_answer: Callable[[str], str | None] | None = None  # None: its opinions say it, if anything does

    def final_answer(self, completion: str, opinion: Opinion) -> str | None:
        """What a majority votes on; None: the text has no answer, or the function has no idea of one."""
        return self.find_answer(completion) if self.find_answer else opinion.answer


def resolve(use: str, weight: float, arguments: Mapping[str, Any], max_tokens: int) -> Reward:
    """Raises ConfigError if there is no such function, or its shape is none we can call.

    max_tokens: of a completion in training; what lengths are measured by in evaluations too.
    """
    home = next((module for module, names in HOMES.items() if use in names), "")
    if home:
        module = importlib.import_module(f"actors.rewards.{home}")
        function, find = getattr(module, use), getattr(module, ANSWERS[use]) if use in ANSWERS else None
        _check_arguments(use, function, arguments)
        return Reward(use, weight, per_completion(function, arguments, max_tokens), find and _with(find, arguments))
    place, _, name = use.partition(":")
    if not place or not name:
        raise ConfigError(
            f"expected a reward of {', '.join(BUILT_IN)}, FILE.py:NAME or package.module:NAME, got {use}; "
            "set rewards.functions or --reward"
        )
    brought = brought_function(use, "reward", "rewards.functions")
    return Reward(shown_name(use), weight, shaped(brought, arguments, max_tokens, use))


def _with(find: Callable[..., str | None], arguments: Mapping[str, Any]) -> Callable[[str], str | None]:
    """With those of the function's arguments that it has too."""
    parameters = inspect.signature(find).parameters
    return partial(find, **{name: value for name, value in arguments.items() if name in parameters})


def _check_arguments(use: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    taken = inspect.signature(function).parameters
    parameters = {name: each for name, each in taken.items() if name not in GIVEN}
    missing = [name for name, each in parameters.items() if each.default is each.empty and name not in arguments]
    unknown = [name for name in arguments if name not in parameters and (name != "max_tokens" or name not in taken)]
    if missing or unknown:
        seen = f"{', '.join(missing)} is missing" if missing else f"got {', '.join(unknown)}"
        raise ConfigError(
            f"expected {use} to have args of {', '.join(parameters) or 'no name'}, {seen}; set args beside its name in "
            "rewards.functions"
        )
