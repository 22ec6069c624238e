"""A reward worker as its generator sees it: a process in a session of its own, asked through one pipe, killed whole.

Runs in the generator process. That nothing of a worker outlives `kill` rests on its session and on the kernel's list of
children; only what leaves both session and ancestry (a daemon that forks twice) is out of reach.

Processes are counted here and not limited by the kernel: RLIMIT_NPROC counts all of a user's, and does not bind root.
Code that forks faster than it is counted is ended all the same: a signal to a group reaches every member or new child.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import struct
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import msgpack

from protocol.errors import TetherError

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_ANSWER_BYTES = 16 << 20
MAX_PROCESSES = 64  # that one worker's code may have at a time
COUNT_EVERY_S = 0.2


class RewardFailed(TetherError):
    """A reward function raised, hung or ended its process. Names the function."""


class WorkerProcess:
    """One process and its pipe."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.calling = ""  # what it says it is busy with

    @classmethod
    async def start(cls, module: str, environment: Mapping[str, str]) -> WorkerProcess:
        """Of a module of this package that speaks as `pipe.py` does. `environment`: beside what Python needs."""
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            f"actors.rewards.{module}",
            env={**environment, "PYTHONPATH": path, "LANG": "C.UTF-8"},
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
