"""Reward workers under deadlines: what reward code does can cost one call, never a run, and never becomes a zero.

Runs in the generator process. Workers are long-lived, in sessions of their own, with an explicit environment; one
that does not answer in time, or starts too many processes, is killed with everything it started, and replaced. That a
failure is an error with a reason rests on `score`: it either returns what the functions said or raises RewardFailed.

Processes are counted here and not limited by the kernel: RLIMIT_NPROC counts all of a user's, and does not bind root.
Code that forks faster than it is counted is ended all the same: a signal to a group reaches every member or new child.
Only what leaves both session and ancestry (a daemon that forks twice) is out of reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgpack

from protocol.errors import ConfigError, TetherError
from protocol.fields import MAX_METRICS, MAX_NAME
from protocol.sections import RewardsConfig

log = logging.getLogger("tether.rewards")

START_S = 30.0
REPOSITORY = Path(__file__).resolve().parents[2]
MAX_ANSWER_BYTES = 16 << 20
MAX_PROCESSES = 64  # that one worker's code may have at a time
COUNT_EVERY_S = 0.2


class RewardFailed(TetherError):
    """A reward function raised, hung or ended its process. Names the function."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What the functions said of one prompt's completions."""

    values: list[list[float | None]]  # [functions][completions]; None: no opinion
    metrics: list[dict[str, float]]  # [completions], by FUNCTION/KEY
    answers: list[dict[str, str]]  # [completions], in an evaluation: the final answer found, by function


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
            "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
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

    async def answer_within_bounds(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """As `ask`; raises RewardFailed also when its code starts too many processes meanwhile."""
        asking = asyncio.create_task(self.ask(call))
        try:
            while True:
                done, _ = await asyncio.wait({asking}, timeout=COUNT_EVERY_S)
                if len(self._started(MAX_PROCESSES + 1)) > MAX_PROCESSES:
                    raise RewardFailed(f"{self.calling} had more than {MAX_PROCESSES} processes at a time")
                if done:
                    return asking.result()
        finally:
            asking.cancel()

    def _started(self, at_most: int) -> list[int]:
        return list(islice(_descendants(self._process.pid), at_most))

    async def kill(self) -> None:
        """End it, everything in its session, and children of it that left the session."""
        started = self._started(100 * MAX_PROCESSES)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for child in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        await self._process.wait()


class RewardPool:
    """`start` it, `score` with it, `close` it."""

    def __init__(self, settings: RewardsConfig, max_tokens: int, num_trained: int | None = None) -> None:
        """`num_trained`: only so many of the functions, the first, score what is trained; None: all."""
        self._settings, self._max_tokens, self._num_trained = settings, max_tokens, num_trained
        self._idle: asyncio.Queue[_Worker | None] = asyncio.Queue()  # None: killed, to be started by the next call
        self._workers: set[_Worker] = set()
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
        *,
        evaluating: bool = False,
    ) -> Scored:
        """What every function says of one prompt's completions. Raises RewardFailed if one does not."""
        call: dict[str, Any] = {"completions": completions, "completion_ids": completion_ids, "columns": columns}
        call |= {"evaluating": True} if evaluating else {"num_functions": self._num_trained}
        worker = await self._idle.get()
        healthy: _Worker | None = None
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


def _descendants(pid: int) -> Iterator[int]:
    """Children, their children and so on, as the kernel lists them now."""
    parents = [pid]
    while parents:
        children = _children(parents.pop())
        yield from children
        parents += children


def _children(pid: int) -> list[int]:
    """Of all its threads; none if it has ended."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found
