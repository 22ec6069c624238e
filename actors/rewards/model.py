"""The reward model as one more function: conversations in, scores out, whatever waits together in one forward.

Runs in the generator process; the model itself runs in `model_worker.py`. Completions are asked for one by one, and
while the worker computes the next ones gather. A worker that does not answer in time, or ends, is killed and replaced
by the next batch; what it had is an error by name, never a number, which rests on `_answer`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.rewards.process import RewardFailed, WorkerProcess
from protocol.errors import ConfigError, TetherError
from protocol.reward_model import REWARD_MODEL, check_reward_model
from protocol.sections import RewardModelConfig

log = logging.getLogger("tether.rewards")

START_S = 900.0  # tens of GB may have to be read from a slow disk
GATHER_S = 0.003  # the samples of a group tend to end within it


@dataclass(eq=False)
class _Asked:
    """One conversation, and who waits for its score."""

    messages: Sequence[Mapping[str, Any]]
    completion: str
    outcome: asyncio.Future[float]

    def fail(self, reason: str) -> None:
        if not self.outcome.done():  # its lease may have been dropped meanwhile
            self.outcome.set_exception(RewardFailed(f"{REWARD_MODEL}: {reason}"))


class RewardModel:
    """`start` it, `score` with it, `close` it. `device`: of the generator."""

    def __init__(self, settings: RewardModelConfig, device: str, trust_remote_code: bool) -> None:
        self._settings = settings
        device = device if settings.device == "auto" else settings.device
        dtype = settings.dtype if settings.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
        self._load = {
            "path": settings.path,
            "label": settings.label,
            "max_tokens": settings.max_tokens,
            "device": device,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
        }
        self._waiting: list[_Asked] = []
        self._arrived = asyncio.Event()
        self._worker: WorkerProcess | None = None  # None: killed, to be started by the next batch
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the model. Raises ConfigError if its folder cannot be used."""
        check_reward_model(self._settings)
        self._worker = await self._new_worker()
        self._serving = asyncio.get_running_loop().create_task(self._serve())

    async def score(self, messages: Sequence[Mapping[str, Any]], completion: str) -> float:
        """What the model says of this answer. Raises RewardFailed if it says nothing."""
        asked = _Asked(messages, completion, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        self._arrived.set()
        return await asked.outcome  # every batch before it ends by its deadline

    async def close(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        await self._discard()
        for asked in self._waiting:
            asked.fail("this generator leaves")

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            if len(self._waiting) < self._settings.batch_size:
                await asyncio.sleep(GATHER_S)
            batch = self._taken()
            if batch:
                await self._answer(batch)

    def _taken(self) -> list[_Asked]:
        """Those that waited longest, without those that nobody waits for any more."""
        waiting = [asked for asked in self._waiting if not asked.outcome.done()]
        size = self._settings.batch_size
        self._waiting = waiting[size:]
        if not self._waiting:
            self._arrived.clear()
        return waiting[:size]

    async def _answer(self, batch: Sequence[_Asked]) -> None:
        """Every outcome of the batch is set when this returns."""
        try:
            values, reasons = await self._scores(batch)
        except asyncio.CancelledError:
            for asked in batch:
                asked.fail("this generator leaves")
            raise
        except Exception as error:  # of one batch: whatever it is, nobody may be left waiting
            reason = str(error) if isinstance(error, TetherError) else f"{type(error).__name__}: {error}"
            log.warning("%s: %d completions have no score: %s", REWARD_MODEL, len(batch), reason)
            for asked in batch:
                asked.fail(reason)
            return
        for asked, value, reason in zip(batch, values, reasons, strict=True):
            if value is None:
                asked.fail(reason)
            elif not asked.outcome.done():
                asked.outcome.set_result(value)

    async def _scores(self, batch: Sequence[_Asked]) -> tuple[list[float | None], list[str]]:
        """Values and reasons. Raises RewardFailed or ConfigError if the worker gives none; it is gone then."""
        worker = self._worker = self._worker or await self._new_worker()
        conversations = [{"messages": list(asked.messages), "completion": asked.completion} for asked in batch]
        healthy = False
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                answer = await worker.ask({"conversations": conversations})
            healthy = True
        except TimeoutError:
            raise RewardFailed(f"no answer within {self._settings.timeout_s:g} s") from None
        finally:
            if not healthy:
                await self._discard()
        if "failed" in answer:
            raise RewardFailed(answer["failed"])
        return answer["values"], answer["reasons"]

    async def _new_worker(self) -> WorkerProcess:
        """Raises ConfigError if the model cannot be loaded."""
        worker = await WorkerProcess.start("model_worker", os.environ)  # which names the cards and the caches
        worker.calling = "its worker"
        reason = "it was stopped"
        try:
            async with asyncio.timeout(START_S):
                reason = (await worker.ask(self._load)).get("failed", "")
        except TimeoutError:
            reason = f"it was not done within {START_S:.0f} s"
        except RewardFailed as error:
            reason = str(error)
        finally:
            if reason:
                await worker.kill()
        if reason:
            raise ConfigError(f"the reward model in {self._settings.path} cannot be loaded: {reason}")
        return worker

    async def _discard(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.kill()
