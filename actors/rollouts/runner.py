"""Runs a rollout for one sample after the other, under a deadline: what its code does can cost a sample, and never
becomes a zero.

Runs in the generator process, in its event loop. That a failure is an error with the rollout's name rests on `run`:
it returns an Episode whose completion can be trained, or raises. Code that blocks the loop is found by `loop_watch.py`;
code that ends the process is a crash like any other, which the broker counts.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.brought_code import brought_function
from actors.engine import Engine
from actors.rollout import Attempt, Episode, RolloutFailed
from actors.sample_engine import SampleEngine
from actors.texts import Texts
from protocol.brought_code import is_brought, shown_name
from protocol.config import Config
from protocol.errors import ConfigError
from protocol.fields import MAX_METRICS, MAX_NAME
from protocol.rollouts import BUILT_IN, ENVIRONMENT, SINGLE_TURN
from protocol.sections import RolloutConfig
from protocol.types import Completion, Lease

log = logging.getLogger("tether.rollout")

MAX_REWARD = 1e6  # what the broker takes
END_S = 1.0  # a rollout that was cancelled may use so long to end


class RolloutRunner:
    """One rollout with its arguments, for all samples of a generator. `settings`: the run's, with code of this host.

    Raises ConfigError if the code cannot be loaded or called.
    """

    def __init__(self, config: Config, settings: RolloutConfig, model: Path) -> None:
        self.name = shown_name(settings.use)
        self._settings, self._context_tokens = settings, config.context_tokens
        self._function = _function(settings)
        self._texts = Texts(model)
        self._stubborn: set[asyncio.Task[Episode]] = set()  # cancelled, and still running

    @property
    def code_file(self) -> str:
        """Where its code stands; "" where nobody's tools can block: in a single turn."""
        return "" if self._settings.use == SINGLE_TURN else inspect.getfile(inspect.unwrap(self._function))

    async def run(self, engine: Engine, lease: Lease, attempt: Attempt, generated: Callable[[int], None]) -> Episode:
        """One sample; `generated` hears of its tokens after each turn. Raises RolloutFailed, or what the engine did."""
        own = SampleEngine(
            engine, lease.prompt, attempt, self._texts, self._context_tokens, self._settings.timeout_s, generated
        )
        task = asyncio.create_task(self._episode(own, lease))
        try:
            ends: set[asyncio.Future[Any]] = {task, own.expired}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if own.failure is not None:
                raise own.failure
            if not task.done():
                raise RolloutFailed(
                    f"{self.name} gave no answer within {self._settings.timeout_s:g} s of its own (rollout.timeout_s)"
                )
            if task.cancelled():
                raise RolloutFailed(f"{self.name} cancelled itself")
            return task.result()
        finally:
            own.close()
            await self._end(task)

    async def _episode(self, engine: SampleEngine, lease: Lease) -> Episode:
        """What the rollout gave, checked. Whatever it raises becomes RolloutFailed: even SystemExit, which would end
        the generator."""
        try:
            prompt = replace(lease.prompt, columns=deepcopy(lease.prompt.columns))  # which the rewards have, too
            made = await self._function(engine, prompt, **self._settings.args)
            if not isinstance(made, Completion | Episode):
                raise RolloutFailed(f"gave {_shown(made)}, expected a Completion or an Episode")
            episode = made if isinstance(made, Episode) else Episode(made)
            return self._checked(episode, engine.check(episode.completion))
        except asyncio.CancelledError:
            raise
        except RolloutFailed as error:
            raise RolloutFailed(f"{self.name}: {error}") from None
        except BaseException as error:  # the user's own code may raise anything
            raise RolloutFailed(f"{self.name} raised {_said(error)}") from error

    def _checked(self, episode: Episode, completion: Completion) -> Episode:
        """Raise RolloutFailed unless the broker would take reward and metrics."""
        if episode.reward is not None and self._settings.weight is None:
            raise RolloutFailed(f"gave the reward {_shown(episode.reward)}, which has no weight; set rollout.weight")
        reward = None if episode.reward is None else _number(episode.reward, "a reward")
        metrics = {_metric(key): _number(value, f"{key}") for key, value in episode.metrics.items()}
        longest = max(metrics, key=len, default="")
        if len(metrics) > MAX_METRICS or len(longest) > MAX_NAME:
            raise RolloutFailed(
                f"at most {MAX_METRICS} metrics with names of up to {MAX_NAME - len(ENVIRONMENT) - 1} characters are "
                f"expected, got {len(metrics)}, one called {longest[:40]}"
            )
        return Episode(completion, reward, metrics)

    async def _end(self, task: asyncio.Task[Episode]) -> None:
        """Cancel what still runs. Code that does not end then is left to itself, without an engine."""
        if task.done():
            return self._ended(task)
        task.cancel()
        self._stubborn.add(task)
        task.add_done_callback(self._ended)
        await asyncio.wait({task}, timeout=END_S)
        if not task.done():
            log.warning("%s goes on after it was cancelled; let asyncio.CancelledError through", self.name)

    def _ended(self, task: asyncio.Task[Episode]) -> None:
        self._stubborn.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: what it says comes too late for its sample, or the engine has said it


def _function(settings: RolloutConfig) -> Callable[..., Any]:
    use = settings.use
    if is_brought(use):
        function = brought_function(use, "rollout", "rollout.use")
    elif use in BUILT_IN:
        function = getattr(importlib.import_module(f"actors.rollouts.{use}"), use)
    else:
        raise ConfigError(f"expected a rollout of {', '.join(BUILT_IN)} or FILE.py:NAME, got {use}; set rollout.use")
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(f"expected an async function in {use}, it is none; write async def NAME(engine, prompt)")
    _check_arguments(function, use, settings.args)
    return function


def _check_arguments(function: Callable[..., Any], use: str, arguments: Mapping[str, Any]) -> None:
    try:
        inspect.signature(function).bind(None, None, **arguments)
    except TypeError as error:
        raise ConfigError(
            f"{use} cannot be called with engine, prompt and {', '.join(arguments) or 'nothing else'}: {error}; set "
            "rollout.args, or give its further parameters a default"
        ) from None


def _said(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:  # of an exception whose text cannot be made
        return type(error).__name__


def _metric(key: Any) -> str:
    """Its name on the wire: a user's own words may not be Unicode."""
    return f"{ENVIRONMENT}/{key}".encode(errors="replace").decode()


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= MAX_REWARD:
        raise RolloutFailed(f"gave {_shown(value)} as {what}, expected a number from -{MAX_REWARD:g} to {MAX_REWARD:g}")
    return number


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:80]}" if value is not None else "None"
