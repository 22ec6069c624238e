"""`python launch/cluster.py` as a user starts it, in a process of its own, and a tiny task for it.

Everything a test does to a run goes through signals, files and what is printed. Whatever a test started and did not end
is killed, by its process id, when its ClusterProcess is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tests.models import make_tiny_qwen2

ROOT = Path(__file__).resolve().parents[1]
START_S = 90.0
"""How long anything may take that waits for torch to be imported by several processes at a time."""

REWARD = """def score(completion, answer):
    words = completion.split()
    return sum(word[1:].isdigit() and int(word[1:]) % 2 for word in words) / max(1, len(words))
"""
NUM_ROWS = 80

Seen = TypeVar("Seen")


def make_task(folder: Path) -> Path:
    """A tiny model with weights, its data and its reward code, in `folder`."""
    make_tiny_qwen2(folder / "model", tied=True).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for name, count in (("train", NUM_ROWS), ("test", 6)):
        rows = [{"question": f"w{2 + row} w{2 + row * 7 % 99}", "answer": "none"} for row in range(count)]
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "reward.py").write_text(REWARD)
    return folder


def flags(**changed: str | int | float) -> list[str]:
    """Flags of a short run in a task's folder, with some changed: `flags(**{"run-name": "a"})`."""
    values: dict[str, str | int | float] = {
        "model": "model",
        "dataset": "data",
        "reward": "reward.py:score",
        "device": "cpu",
        "prompts-per-step": 4,
        "group-size": 4,
        "generators.engine": "transformers",
        "sampling.max_tokens": 24,
        "data.max_prompt_tokens": 16,
        "learner.learning_rate": 1e-4,
        "watchdog.heartbeat_s": 0.5,
        "watchdog.lease_ttl_s": 10,
        "evaluation.every": 0,
    }
    return [word for name, value in (values | changed).items() for word in (f"--{name}", str(value))]


def fast_flags(**changed: str | int | float) -> list[str]:
    """Flags of a run in which everything is real but the sampled tokens: a step takes some hundredths of a second.

    Every completion is in samples/, and its tokens tell which version drew them (`actors.fake_engine.fake_token`).
    """
    values: dict[str, str | int | float] = {
        "generators.engine": "fake",
        "checkpoint.every": 5,
        "run.samples_per_step": 1000,
    }
    return flags(**(values | changed))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file that may be growing."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class ClusterProcess:
    """One start of the command. `said` is everything it printed so far."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        command = [sys.executable, str(ROOT / "launch" / "cluster.py"), *arguments]
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
        self.said = ""
        self._popen = subprocess.Popen(
            command, cwd=folder, env=env | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> ClusterProcess:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.tree(), self._popen]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._popen.wait()
        self._reader.join()
        assert self._popen.stdout is not None
        self._popen.stdout.close()

    def until(self, look: Callable[[], Seen], what: str, timeout_s: float = START_S) -> Seen:
        """The first answer of `look` that is true; fails when the command ends first."""
        deadline = time.monotonic() + timeout_s
        while not (seen := look()):
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}; it said:\n{self.said}"
            assert self._popen.poll() is None, f"ended before {what}; it said:\n{self.said}"
            time.sleep(0.05)
        return seen

    def until_step(self, run_dir: Path, step: int) -> None:
        def done() -> bool:
            return any(row["step"] >= step for row in steps_of(run_dir))

        self.until(done, f"the end of step {step}")

    def end(self, timeout_s: float = START_S) -> int:
        """Its exit code, waited for."""
        try:
            code = self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {timeout_s} s; it said:\n{self.said}") from None
        self._reader.join()
        return code

    def interrupt(self) -> None:
        self._popen.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """The supervisor alone."""
        self._popen.kill()
        self._popen.wait()

    def tree(self) -> list[psutil.Process]:
        """Everything below the command, to the last reward worker and engine core."""
        try:
            return psutil.Process(self._popen.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def process(self, name: str) -> psutil.Process:
        """A process of the run as the console calls it: broker, learner-1, generator-0."""
        role, _, number = name.partition("-")
        for child in psutil.Process(self._popen.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                words, rank = child.cmdline(), child.environ().get("RANK", "")
                is_it = {"broker": True, "learner": rank == number, "generator": name in words}[role]
                if is_it and any(word.endswith(f"launch/{role}.py") for word in words):
                    return child
        raise AssertionError(f"{name} does not run; the command said:\n{self.said}")

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self.said += line


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of training steps in metrics.jsonl; those of evaluations are left out."""
    return [row for row in lines_of(run_dir / "metrics.jsonl") if "reward/mean" in row]


def samples_of(run_dir: Path) -> list[dict[str, Any]]:
    """Every trained completion that the run wrote down, in the order of the steps."""
    return [sample for path in sorted((run_dir / "samples").glob("*.jsonl")) for sample in lines_of(path)]


def ledger_of(row: Mapping[str, float]) -> dict[str, float]:
    """The ledger's counts, without their reasons, as of one line of metrics.jsonl."""
    return {name.removeprefix("ledger/"): value for name, value in row.items() if re.fullmatch(r"ledger/\w+", name)}
