"""How each shape of reward function that people bring is called: text or lists in, numbers out.

Runs in a reward worker. Functions are told apart by their parameters, classes are made once and called:

    (completion, answer, ...)                                Tether's own: text in, number out
    (completions, prompts, completion_ids, **columns)        TRL's: lists in, list out, all of equal length
    class with __call__(completions, **columns)              ms-swift's ORM, whose completions are always text
    (data_source, solution_str, ground_truth, extra_info)    verl's compute_score

Each may be async. TRL's completions are chat messages where the row's prompt is, as there. A function gets those of its
settings, of `completion_ids`, `max_tokens` and of the row's columns that it has parameters for, in this order; in TRL's
shape and ms-swift's also `log_metric`, `log_extra` and `trainer_state` (`logs.py`). A value is a number, None (no
opinion), or a dict with `score`, whose other numbers become metrics, and whose `pred` is the answer that evaluations
take a majority of.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from types import SimpleNamespace
from typing import Any, NamedTuple

from actors.rewards.logs import Logs, TrainerState
from protocol.errors import ConfigError

Columns = Mapping[str, Any]
Tokens = Sequence[Sequence[int]]


class Opinion(NamedTuple):
    """What a function said of one completion."""

    value: float | None
    metrics: dict[str, float]  # by the function's own keys
    answer: str | None = None  # the final answer that it found in the text, where it says so: `pred`, as in verl


Opinions = list[Opinion]
Score = Callable[[Sequence[str], Tokens, Columns, int], Opinions]
"""One prompt's completions, their tokens, its row's columns, the policy version that wrote them."""

_LOOP = asyncio.Runner()  # one for all calls: what an async function keeps between calls belongs to its loop


def shaped(brought: Callable[..., Any], arguments: Mapping[str, Any], max_tokens: int, use: str) -> Score:
    """Raises ConfigError if it has none of the shapes. `arguments`: of the settings; `max_tokens`: of a completion."""
    if inspect.isclass(brought):
        return _of_object(_made(brought, arguments), max_tokens, use)
    parameters = inspect.signature(brought).parameters
    if "completions" in parameters:
        return _per_group(brought, arguments, max_tokens, as_chat=True)
    if {"solution_str", "ground_truth"} <= set(parameters):
        return _verl(brought, arguments)
    if "completion" in parameters:
        return per_completion(brought, arguments, max_tokens)
    raise ConfigError(
        f"expected {use} to take (completion, answer), (completions, **columns) or (data_source, solution_str, "
        f"ground_truth, extra_info), its parameters are ({', '.join(parameters)}); rename them"
    )


def per_completion(function: Callable[..., Any], arguments: Mapping[str, Any], max_tokens: int) -> Score:
    wanted = _Parameters(function)

    def score(completions: Sequence[str], completion_ids: Tokens, columns: Columns, version: int) -> Opinions:
        row = wanted.of({**columns, "max_tokens": max_tokens}) | dict(arguments)
        own = [wanted.of({"completion_ids": tokens}) for tokens in completion_ids]
        pairs = zip(completions, own, strict=True)
        return _opinions([function(**row | tokens | {"completion": text}) for text, tokens in pairs])

    return score


def _per_group(function: Callable[..., Any], arguments: Mapping[str, Any], max_tokens: int, *, as_chat: bool) -> Score:
    wanted = _Parameters(function)

    def score(completions: Sequence[str], completion_ids: Tokens, columns: Columns, version: int) -> Opinions:
        named = {"prompts" if name == "prompt" else name: value for name, value in columns.items()}  # as TRL names it
        lists = {name: [value] * len(completions) for name, value in named.items()}
        tokens = [list(each) for each in completion_ids]
        lists |= {"completion_ids": tokens, "response_token_ids": tokens}  # TRL's name and ms-swift's
        is_chat = as_chat and isinstance(columns.get("prompt"), list)
        given = [[{"role": "assistant", "content": text}] if is_chat else text for text in completions]
        logs = Logs(len(completions))
        log = {"log_metric": logs.log_metric, "log_extra": logs.log_extra, "trainer_state": TrainerState(version)}
        about = wanted.of({**lists, "max_tokens": max_tokens, **log}) | dict(arguments)
        (values,) = _finished([function(**about | {"completions": given})])
        if len(values) != len(completions):
            raise ValueError(f"{len(completions)} completions were given, {len(values)} scores came back")
        pairs = zip(map(opinion_of, values), logs.of_completions(), strict=True)
        return [Opinion(opinion.value, _finite(logged | opinion.metrics)) for opinion, logged in pairs]

    return score


def _verl(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Score:
    wanted = _Parameters(function)

    def score(completions: Sequence[str], completion_ids: Tokens, columns: Columns, version: int) -> Opinions:
        known = {
            "data_source": columns.get("data_source", ""),
            "ground_truth": columns.get("ground_truth", columns.get("answer")),
            "extra_info": columns.get("extra_info"),
        }
        about = wanted.of(known) | dict(arguments)
        return _opinions([function(**about | {"solution_str": text}) for text in completions])

    return score


def _of_object(made: Callable[..., Any], max_tokens: int, use: str) -> Score:
    """Its constructor had the arguments; ms-swift's get texts, whatever the prompt is."""
    if "completions" in inspect.signature(made).parameters:
        return _per_group(made, {}, max_tokens, as_chat=False)
    return shaped(made, {}, max_tokens, use)


def _made(kind: type, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """An ORM class takes its settings as attributes of one `args`, any other class as keywords."""
    if "args" in inspect.signature(kind).parameters:
        return kind(args=SimpleNamespace(**arguments))  # type: ignore[no-any-return]
    return kind(**arguments)  # type: ignore[no-any-return]


class _Parameters:
    """Which of the values that there are a function has parameters for."""

    def __init__(self, function: Callable[..., Any]) -> None:
        parameters = inspect.signature(function).parameters
        self._names = set(parameters)
        self._takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    def of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if self._takes_all or name in self._names}


def _opinions(results: list[Any]) -> Opinions:
    return [opinion_of(result) for result in _finished(results)]


def _finished(results: list[Any]) -> list[Any]:
    """What the calls came to; those of an async function are awaited, all at once."""
    if not any(inspect.isawaitable(result) for result in results):
        return results

    async def together() -> list[Any]:
        return list(await asyncio.gather(*results))

    return _LOOP.run(together())


def opinion_of(returned: Any) -> Opinion:
    """What a function returned, as a finite number or None. Raises ValueError for anything else."""
    value, beside, answer = returned, {}, None
    if isinstance(returned, Mapping):
        if "score" not in returned:
            raise ValueError(f"expected score among the keys of what it returned, got {', '.join(map(str, returned))}")
        value = returned["score"]
        answer = None if returned.get("pred") is None else str(returned["pred"])
        beside = {str(key): float(each) for key, each in returned.items() if key != "score" and isinstance(each, Real)}
    if value is not None and not math.isfinite(value := float(value)):
        raise ValueError(f"expected a finite number, got {value}")
    return Opinion(value, _finite(beside), answer)


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    return {key: number for key, number in numbers.items() if math.isfinite(number)}
