"""Reward workers under deadlines: what reward code does can cost one call, never a run, and never becomes a zero.

Runs in the generator process. Workers are long-lived, in sessions of their own, with an explicit environment; one
that does not answer in time is killed with everything it started, and replaced. That a failure is an error with a
reason rests on `score`: it either returns what the functions said or raises RewardFailed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from protocol.errors import ConfigError, TetherError
from protocol.sections import RewardsConfig

log = logging.getLogger("tether.rewards")

START_S = 30.0
REPOSITORY = Path(__file__).resolve().parents[2]
MAX_ANSWER_BYTES = 16 << 20


class RewardFailed(TetherError):
    """A reward function raised, hung or ended its process. Names the function."""


class _Worker:
    """One process and its pipe."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.calling = ""

    @classmethod
    async def start(cls) -> _Worker:
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": os.environ.get("HOME", "/"),
            "PYTHONPATH": str(REPOSITORY),
            "LANG": "C.UTF-8",
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "actors.rewards.worker",
            env=environment,
            start_new_session=True,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        return cls(process)

    async def ask(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's answer. Raises RewardFailed if it ends instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        body = msgpack.packb(dict(call))
        try:
            self._process.stdin.write(struct.pack("<I", len(body)) + body)
            await self._process.stdin.drain()
            while True:
                size = struct.unpack("<I", await self._process.stdout.readexactly(4))[0]
                if size > MAX_ANSWER_BYTES:
                    raise RewardFailed(f"{self.calling or 'a reward function'} answered with {size} bytes")
                answer = dict(msgpack.unpackb(await self._process.stdout.readexactly(size)))
                if "calling" not in answer:
                    return answer
                self.calling = answer["calling"]
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await self._process.wait()
            raise RewardFailed(f"{self.calling or 'a reward function'} ended its process (exit code {code})") from None

    async def kill(self) -> None:
        """End it and everything in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()


class RewardPool:
    """`start` it, `score` with it, `close` it."""

    def __init__(self, settings: RewardsConfig) -> None:
        self._settings = settings
        self._idle: asyncio.Queue[_Worker | None] = asyncio.Queue()  # None: killed, to be started by the next call
        self._workers: set[_Worker] = set()
        self.names: list[str] = []

    async def start(self) -> None:
        """Raises ConfigError if a function cannot be resolved."""
        for _ in range(self._settings.workers):
            self._idle.put_nowait(await self._new_worker())

    async def score(self, completions: Sequence[str], columns: Mapping[str, Any]) -> list[list[float | None]]:
        """Values [functions][completions] of one prompt's completions; None is no opinion. Raises RewardFailed."""
        worker = await self._idle.get()
        healthy: _Worker | None = None
        try:
            worker = worker or await self._new_worker()
            async with asyncio.timeout(self._settings.timeout_s):
                answer = await worker.ask({"completions": list(completions), "columns": dict(columns)})
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
        table: list[list[float | None]] = answer["done"]
        return table

    async def close(self) -> None:
        for worker in list(self._workers):
            await worker.kill()
        self._workers.clear()

    async def _discard(self, worker: _Worker) -> None:
        self._workers.discard(worker)
        await worker.kill()

    async def _new_worker(self) -> _Worker:
        """Raises ConfigError if the functions cannot be loaded."""
        worker = await _Worker.start()
        self._workers.add(worker)
        functions = [(function.use, function.weight, dict(function.args)) for function in self._settings.functions]
        try:
            async with asyncio.timeout(START_S):
                answer = await worker.ask({"functions": functions})
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
