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
from protocol.errors import ConfigError
from protocol.fields import MAX_METRICS, MAX_NAME
from protocol.sections import RewardsConfig

START_S = 30.0


@dataclass(frozen=True, slots=True)
class Scored:
    """What the functions said of one prompt's completions."""

    values: list[list[float | None]]  # [functions][completions]; None: no opinion
    metrics: list[dict[str, float]]  # [completions], by FUNCTION/KEY


class RewardPool:
    """`start` it, `score` with it, `close` it."""

    def __init__(self, settings: RewardsConfig, max_tokens: int) -> None:
        self._settings, self._max_tokens = settings, max_tokens
        self._idle: asyncio.Queue[WorkerProcess | None] = (
            asyncio.Queue()
        )  # None: killed, to be started by the next call
        self._workers: set[WorkerProcess] = set()
        self.names: list[str] = []

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
        return Scored(answer["values"], answer["metrics"])

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
        functions = [(function.use, function.weight, dict(function.args)) for function in self._settings.functions]
        try:
            async with asyncio.timeout(START_S):
                answer = await worker.ask({"functions": functions, "max_tokens": self._max_tokens})
            reason = answer.get("failed", "")
        except TimeoutError:
            reason = f"it was not done within {START_S:.0f} s; does importing it wait for something?"
        except RewardFailed as error:
            reason = str(error)
        if reason:
            await self._discard(worker)
            raise ConfigError(f"the reward code cannot be loaded: {reason}")
        self.names = answer["ready"]
        return worker


def _check_metrics(metrics: Mapping[str, float]) -> None:
    """Raises RewardFailed if they would not fit a result."""
    longest = max(metrics, key=len, default="")
    if len(metrics) > MAX_METRICS or len(longest) > MAX_NAME:
        raise RewardFailed(
            f"at most {MAX_METRICS} numbers beside the scores of a completion are expected, as FUNCTION/KEY of up to "
            f"{MAX_NAME} characters, got {len(metrics)}, one called {longest[:40]}; return fewer keys, or shorter ones"
        )
