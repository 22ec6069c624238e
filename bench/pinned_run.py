"""A run of `launch/cluster.py` whose generator has one core and whose learner has another, for benchmarks.

Everything is the product's own: processes, sockets, files. `PinnedRun` adds only where they run (`pin`), that one side
may stand still (`alone`), and that a core may be kept busy by something else (`Spinner`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from launch.broker_line import BrokerLine
from protocol.errors import TetherError
from tests.cluster_process import ClusterProcess

GENERATOR_CORE, LEARNER_CORE = 0, 1
SPIN = "import numpy\na = numpy.random.default_rng(0).random((256, 256), numpy.float32)\nwhile True: a @ a"
PIN_EVERY_S = 0.1


class Spinner:
    """Keeps one core busy with small matrix products, whenever it is asked to."""

    def __init__(self, core: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._popen = subprocess.Popen([sys.executable, "-c", SPIN], env=environment)
        os.sched_setaffinity(self._popen.pid, {core})
        self._popen.send_signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def busy(self, wanted: bool = True) -> Iterator[None]:
        if wanted:
            self._popen.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._popen.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()


class PinnedRun(ClusterProcess):
    """One start of the cluster command with one generator and one learner rank; use it as a context manager."""

    def __init__(self, folder: Path, run_dir: Path, *arguments: str) -> None:
        super().__init__(folder, *arguments)
        self.run_dir = run_dir
        self._over = threading.Event()
        self._pinning = threading.Thread(target=self._keep_pinned, daemon=True)
        self._pinning.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._pinning.join()
        for process in self.tree():  # what stands still would not hear of the end
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        super().__exit__(*error)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """All but the generator, or all but the learner, go on."""
        other = {"generator-0": "learner-0", "learner-0": "generator-0"}[name]
        stopped = self._family(other)
        for process in stopped:
            process.suspend()
        try:
            yield
        finally:
            for process in stopped:
                process.resume()

    def status(self) -> Mapping[str, Any]:
        """The broker's, as `tools/status.py` shows it; {} before the broker answers."""

        async def ask() -> Mapping[str, Any]:
            line = BrokerLine(self.run_dir, "bench", lambda status: None)
            try:
                return await line.status()
            except (TetherError, OSError):
                return {}
            finally:
                await line.close()

        return asyncio.run(ask())

    def peer(self, name: str) -> Mapping[str, Any]:
        """What the broker knows of one process; {} if it has not said hello yet."""
        found = [process for process in self.status().get("processes", ()) if process["name"] == name]
        return found[0] if found else {}

    def _family(self, name: str) -> list[psutil.Process]:
        process = self.process(name)
        return [process, *process.children(recursive=True)]

    def _keep_pinned(self) -> None:
        """Children inherit where their parent runs, so this matters for the first moments of each process only."""
        while not self._over.wait(PIN_EVERY_S):
            for name, core in (("generator-0", GENERATOR_CORE), ("learner-0", LEARNER_CORE)):
                with contextlib.suppress(AssertionError, psutil.Error, OSError):
                    for process in self._family(name):
                        for thread in process.threads():
                            os.sched_setaffinity(thread.id, {core})
