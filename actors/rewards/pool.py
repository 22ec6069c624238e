"""Reward workers under deadlines: what reward code does can cost one call, never a run, and never becomes a zero.

Runs in the generator process. Workers are long-lived, with an explicit environment; one that does not answer in time,
or starts too many processes, is killed with everything it started, and replaced. That a failure is an error with a
reason rests on `score`: it either returns what the functions said or raises RewardFailed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.rewards.process import RewardFailed, WorkerProcess
from protocol.brought_code import shown_name
from protocol.errors import ConfigError
from protocol.fields import MAX_METRICS, MAX_NAME
from protocol.sections import RewardsConfig

START_S = 30.0


@dataclass(frozen=True, slots=True)
class Scored:
    """What the functions said of one prompt's completions."""

    values: list[list[float | None]]  # [functions][completions]; None: no opinion
    metrics: list[dict[str, float]]  # [completions], by FUNCTION/KEY
    answers: list[dict[str, str]]  # [completions], in an evaluation: the final answer found, by function


class RewardPool:
    """`start` it, `score` with it, `close` it."""

    def __init__(
        self,
        settings: RewardsConfig,
        max_tokens: int,
        *,
        names: Sequence[str] | None = None,
        num_trained: int | None = None,
    ) -> None:
        """`names`: what results call the functions, where code has another file's name here than in the run.

        `num_trained`: only so many of the functions, the first, score what is trained; None: all.
        """
        self._names = [shown_name(function.use) for function in settings.functions] if names is None else names
        self._settings, self._max_tokens, self._num_trained = settings, max_tokens, num_trained
        self._idle: asyncio.Queue[WorkerProcess | None] = asyncio.Queue()  # None: killed, the next call starts another
        self._workers: set[WorkerProcess] = set()

    async def start(self) -> None:
        """Raises ConfigError if a function cannot be resolved."""
        for _ in range(self._settings.workers):
            self._idle.put_nowait(await self._new_worker())

    async def score(
        self,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Any],
        version: int,
        *,
        evaluating: bool = False,
    ) -> Scored:
        """What every function says of one prompt's completions. Raises RewardFailed if one does not.

        version: of the policy that wrote them.
        """
        call = {
            "completions": completions,
            "completion_ids": completion_ids,
            "columns": columns,
            "version": version,
        }
        call |= {"evaluating": True} if evaluating else {"num_functions": self._num_trained}
        worker = await self._idle.get()
        healthy: WorkerProcess | None = None
        try:
            worker = worker or await self._new_worker()
            async with asyncio.timeout(self._settings.timeout_s):
                answer = await worker.answer_within_bounds(call)
            healthy = worker
        except TimeoutError:
            culprit = (worker and worker.calling) or "scoring"
            raise RewardFailed(f"{culprit} gave no answer within {self._settings.timeout_s:g} s") from None
        except ConfigError as error:  # of a replacement: the code could be loaded when the run began
            raise RewardFailed(str(error)) from None
        finally:
            self._idle.put_nowait(healthy)
            if healthy is None and worker is not None:
                await self._discard(worker)
        if "failed" in answer:
            raise RewardFailed(f"{worker.calling} raised {answer['failed']}")
        for metrics in answer["metrics"]:
            _check_metrics(metrics)
        answers = [{name: text[:MAX_NAME] for name, text in found.items()} for found in answer["answers"]]
        return Scored(answer["values"], answer["metrics"], answers)

    async def close(self) -> None:
        for worker in list(self._workers):
            await worker.kill()
        self._workers.clear()

    async def _discard(self, worker: WorkerProcess) -> None:
        self._workers.discard(worker)
        await worker.kill()

    async def _new_worker(self) -> WorkerProcess:
        """Raises ConfigError if the functions cannot be loaded."""
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": os.environ.get("HOME", "/")}
        worker = await WorkerProcess.start("worker", environment)
        self._workers.add(worker)
        named = zip(self._names, self._settings.functions, strict=True)
        functions = [(name, function.use, function.weight, dict(function.args)) for name, function in named]
        reason = "it was stopped"
        try:
            async with asyncio.timeout(START_S):
                answer = await worker.ask({"functions": functions, "max_tokens": self._max_tokens})
            reason = answer.get("failed", "")
        except TimeoutError:
            reason = f"it was not done within {START_S:.0f} s; does importing it wait for something?"
        except RewardFailed as error:
            reason = str(error)
        finally:
            if reason:
                await self._discard(worker)
        if reason:
            raise ConfigError(f"the reward code cannot be loaded: {reason}")
        return worker


def _check_metrics(metrics: Mapping[str, float]) -> None:
    """Raises RewardFailed if they would not fit a result."""
    longest = max(metrics, key=len, default="")
    if len(metrics) > MAX_METRICS or len(longest) > MAX_NAME:
        raise RewardFailed(
            f"at most {MAX_METRICS} numbers beside the scores of a completion are expected, as FUNCTION/KEY of up to "
            f"{MAX_NAME} characters, got {len(metrics)}, one called {longest[:40]}; return fewer keys, or shorter ones"
        )
