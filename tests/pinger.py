"""An honest peer in a process of its own that does nothing but ask, and how long each answer took.

A thread beside it does nothing but sleep: by how much it oversleeps says how long a process had to wait for a core,
which is no fault of the broker. Both are told apart by when they happened, on the clock that all processes of a
machine share.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from protocol.addresses import Addresses
from protocol.keys import read_client_key
from protocol.messages import Hello, Role, StatusRequest
from protocol.session import Session
from tests.wire import wait_until

ROOT = Path(__file__).resolve().parents[1]
EVERY_S = 0.002


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of what happened within one span of time, in seconds."""

    pings: list[float]
    overslept: list[float]

    @property
    def p99(self) -> float:
        return sorted(self.pings)[int(0.99 * len(self.pings))]

    @property
    def worst(self) -> float:
        return max(self.pings)

    @property
    def jitter(self) -> float:
        return max(self.overslept)

    def __str__(self) -> str:
        median = sorted(self.pings)[len(self.pings) // 2]
        shown = {"p50": median, "p99": self.p99, "max": self.worst, "max of the jitter": self.jitter}
        return f"{len(self.pings)} pings: " + ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in shown.items())


class Pinger:
    """Pings the broker of a run folder from `with` to its end."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.pinger", str(folder)]
        reports = folder / "pings.jsonl"  # a pipe would be full before anybody reads it
        with reports.open("w") as file:
            self._process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file)
        self._reports = reports.open()
        self._unfinished = ""
        self._pings: list[tuple[float, float]] = []
        self._overslept: list[tuple[float, float]] = []

    def __enter__(self) -> Pinger:
        self.up_to(time.monotonic())
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(10)
        self._reports.close()

    def between(self, start: float, end: float) -> Latencies:
        """What began in [start, end)."""
        self.up_to(end)
        return Latencies(
            [took for began, took in self._pings if start <= began < end],
            [late for began, late in self._overslept if start <= began < end],
        )

    def up_to(self, end: float) -> None:
        """Wait for the report of a ping that began after `end`."""
        wait_until(lambda: self._read() > end, "the report of the honest peer")

    def _read(self) -> float:
        """When the last ping that is reported began."""
        assert self._process.poll() is None, "the honest peer has died"
        *lines, self._unfinished = (self._unfinished + self._reports.read()).split("\n")
        for line in lines:
            pings, overslept = json.loads(line)
            self._pings += pings
            self._overslept += overslept
        return self._pings[-1][0] if self._pings else 0.0


async def ping(folder: Path) -> None:
    """Ask, and report twenty times a second on stdout, until killed."""
    key = read_client_key(folder / "keys" / "status.key")
    hello = Hello(role=Role.STATUS.value, name="pinger", incarnation=1)
    session = await Session.open(Addresses.read(folder), key, lambda: hello)
    pings: list[tuple[float, float]] = []
    overslept: list[tuple[float, float]] = []
    threading.Thread(target=sleep_forever, args=(overslept,), daemon=True).start()
    reported = 0.0
    while True:
        await asyncio.sleep(EVERY_S)
        began = time.monotonic()
        await session.ask(StatusRequest())
        pings.append((began, time.monotonic() - began))
        if began - reported > 0.05:
            print(json.dumps([pings, overslept]), flush=True)
            pings.clear()
            del overslept[: len(overslept)]
            reported = began


def sleep_forever(overslept: list[tuple[float, float]]) -> None:
    while True:
        began = time.monotonic()
        time.sleep(EVERY_S)
        overslept.append((began, time.monotonic() - began - EVERY_S))


if __name__ == "__main__":
    asyncio.run(ping(Path(sys.argv[1])))
