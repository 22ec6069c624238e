"""Learner ranks as processes: each runs parts of `tests/rank_program.py` on a folder and writes down what it saw."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 240.0  # a world takes some 30 s on two idle cores


class RankProcesses:
    """A world of `num_ranks` that meets over gloo. Whatever still runs is killed when it is left."""

    def __init__(self, folder: Path, num_ranks: int, *parts: str) -> None:
        self._folder, self._num_ranks = folder, num_ranks
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self._processes = [self._start(rank, port, parts) for rank in range(num_ranks)]

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def seen(self) -> list[dict[str, Any]]:
        """What each rank saw, by rank; waits for all to end."""
        deadline = time.monotonic() + DEADLINE_S
        try:
            codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in self._processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the ranks did not end within {DEADLINE_S} s\n{self._logs()}") from None
        assert codes == [0] * self._num_ranks, self._logs()
        return [json.loads((self._folder / f"rank{rank}.json").read_text()) for rank in range(self._num_ranks)]

    def _logs(self) -> str:
        return "\n".join((self._folder / f"rank{rank}.log").read_text() for rank in range(self._num_ranks))

    def _start(self, rank: int, port: int, parts: tuple[str, ...]) -> subprocess.Popen[bytes]:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self._num_ranks)}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rest = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.rank_program", str(self._folder), *parts]
        with open(self._folder / f"rank{rank}.log", "wb") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=os.environ | place | meeting | rest, stdout=log, stderr=subprocess.STDOUT
            )
