"""Reward functions by name, and how each of the shapes that people bring is called.

Runs in a reward worker. A function is a built-in name or FILE.py:NAME, in one of three shapes, told apart by its
parameters:

    (completion, answer, ...)                                Tether's own: text in, number out
    (completions, prompts, **columns)                        TRL's: lists in, list out, all of equal length
    (data_source, solution_str, ground_truth, extra_info)    verl's compute_score

A value is a number, None (no opinion), or a dict with `score`.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.rewards.gsm8k import gsm8k, gsm8k_flexible
from protocol.errors import ConfigError
from protocol.rewards import shown_name

BUILT_IN: dict[str, Callable[..., Any]] = {"gsm8k": gsm8k, "gsm8k_flexible": gsm8k_flexible}

Columns = Mapping[str, Any]
Scores = list[float | None]


@dataclass(frozen=True, slots=True)
class Reward:
    """One function of the sum."""

    name: str
    weight: float
    score: Callable[[Sequence[str], Columns], Scores]  # completions of one prompt, and its row's columns


def resolve(use: str, weight: float, arguments: Mapping[str, Any]) -> Reward:
    """Raises ConfigError if there is no such function, or its shape is none we can call."""
    if use in BUILT_IN:
        return Reward(use, weight, _per_completion(BUILT_IN[use], arguments))
    file, _, name = use.partition(":")
    if not file.endswith(".py") or not name:
        raise ConfigError(
            f"expected a reward of {', '.join(BUILT_IN)} or FILE.py:NAME, got {use}; set rewards.functions or --reward"
        )
    function = getattr(_load(Path(file)), name, None)
    if not callable(function):
        raise ConfigError(f"expected a function {name} in {file}, there is none; set rewards.functions")
    return Reward(shown_name(use), weight, _shaped(function, arguments, use))


def _shaped(
    function: Callable[..., Any], arguments: Mapping[str, Any], use: str
) -> Callable[[Sequence[str], Columns], Scores]:
    parameters = inspect.signature(function).parameters
    if "completions" in parameters:
        return _per_group(function, arguments)
    if {"solution_str", "ground_truth"} <= set(parameters):
        return _verl(function, arguments)
    if "completion" in parameters:
        return _per_completion(function, arguments)
    raise ConfigError(
        f"expected {use} to take (completion, answer), (completions, **columns) or (data_source, solution_str, "
        f"ground_truth, extra_info), its parameters are ({', '.join(parameters)}); rename them"
    )


def _per_completion(
    function: Callable[..., Any], arguments: Mapping[str, Any]
) -> Callable[[Sequence[str], Columns], Scores]:
    wanted = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())

    def score(completions: Sequence[str], columns: Columns) -> Scores:
        given = {name: value for name, value in columns.items() if takes_all or name in wanted} | dict(arguments)
        return [value_of(function(completion=text, **given)) for text in completions]

    return score


def _per_group(
    function: Callable[..., Any], arguments: Mapping[str, Any]
) -> Callable[[Sequence[str], Columns], Scores]:
    wanted = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())

    def score(completions: Sequence[str], columns: Columns) -> Scores:
        named = {"prompts" if name == "prompt" else name: value for name, value in columns.items()}  # as TRL names it
        given = {name: [value] * len(completions) for name, value in named.items() if takes_all or name in wanted}
        values = function(completions=list(completions), **given, **arguments)
        if len(values) != len(completions):
            raise ValueError(f"{len(completions)} completions were given, {len(values)} scores came back")
        return [value_of(value) for value in values]

    return score


def _verl(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[Sequence[str], Columns], Scores]:
    wanted = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())

    def score(completions: Sequence[str], columns: Columns) -> Scores:
        known = {
            "data_source": columns.get("data_source", ""),
            "ground_truth": columns.get("ground_truth", columns.get("answer")),
            "extra_info": columns.get("extra_info"),
        }
        about = {name: value for name, value in known.items() if takes_all or name in wanted}
        return [value_of(function(solution_str=text, **about, **arguments)) for text in completions]

    return score


def value_of(value: Any) -> float | None:
    """What a function returned, as a finite number or None. Raises ValueError for anything else."""
    if isinstance(value, Mapping):
        value = value.get("score")
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {number}")
    return number


def _load(file: Path) -> Any:
    if not file.is_file():
        raise ConfigError(f"expected reward code in {file}, there is no such file; set rewards.functions")
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own code raises when it is imported
        raise ConfigError(f"importing {file} raised {type(error).__name__}: {error}; mend the file") from error
    return module
