"""Reward workers: whatever reward code does costs one call, and is an error with a reason, never a zero."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.rewards.pool import RewardFailed, RewardPool
from protocol.errors import ConfigError
from protocol.sections import RewardConfig, RewardsConfig
from tests.engines import until

TIMEOUT_S = 1.0
CODE = """
import os, subprocess, sys, threading, time

def score(completion, answer, pids="", session=""):
    if completion == "raise": return 1 / 0
    if completion == "hang": time.sleep(600)
    if completion == "spin":
        while True: pass
    if completion == "exit": sys.exit(3)
    if completion == "die": os._exit(7)
    if completion == "allocate": return len(bytearray(10 << 30))
    if completion == "fork":
        while True: os.fork()
    if completion == "fork once" and os.fork() == 0: return 5.0
    if completion == "metrics": return {"score": 1, "acc": True, "pred": "x"}
    if completion == "many": return {"score": 1} | {str(n): n for n in range(65)}
    if completion == "text": return "good"
    if completion == "nan": return float("nan")
    if completion == "child":
        child = subprocess.Popen(["sleep", "600"], start_new_session=session == "its own")
        open(pids, "w").write(str(child.pid))
        time.sleep(600)
    if completion == "print":
        print("to standard output", flush=True)
        os.write(1, b"raw bytes" * 1000)
        return float(sys.stdin.read() == "")
    if completion == "environment": return float(len(os.environ))
    if completion == "pid": return float(os.getpid())
    return float(len(completion))
"""


@asynccontextmanager
async def pool(
    tmp_path: Path, workers: int = 1, timeout_s: float = TIMEOUT_S, **args: Any
) -> AsyncIterator[RewardPool]:
    (tmp_path / "evil.py").write_text(CODE)
    functions = (RewardConfig(use="gsm8k"), RewardConfig(use=f"{tmp_path / 'evil.py'}:score", args=args))
    opened = RewardPool(RewardsConfig(functions=functions, workers=workers, timeout_s=timeout_s), 100)
    await opened.start()
    try:
        yield opened
    finally:
        await opened.close()


async def values(pool: RewardPool, *completions: str) -> Sequence[float | None]:
    """What the brought function says."""
    return (await pool.score(completions, [[7]] * len(completions), {"answer": "#### 2"}, 0)).values[1]


async def pid_of_worker(pool: RewardPool) -> int:
    (pid,) = await values(pool, "pid")
    assert pid is not None
    return int(pid)


def has_ended(pid: int) -> bool:
    """Whether a process that is not our child is gone, or waits only to be reaped."""
    try:
        process = psutil.Process(pid)
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(2)
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_groups_completions_are_scored_by_every_function(tmp_path: Path) -> None:
    async def go() -> None:
        async with pool(tmp_path) as rewards:
            scored = await rewards.score(["#### 2", "#### 3", "2"], [[1], [2], [3]], {"answer": "1+1=2\n#### 2"}, 0)
            assert scored.values == [[1.0, 0.0, 0.0], [6.0, 6.0, 1.0]]

    asyncio.run(go())


@pytest.mark.parametrize(
    ("completion", "reason", "survives"),
    [
        ("raise", "evil:score raised ZeroDivisionError: division by zero", True),
        ("text", "evil:score raised ValueError: could not convert string to float: 'good'", True),
        ("nan", "evil:score raised ValueError: expected a finite number, got nan", True),
        ("allocate", "evil:score raised MemoryError", True),
        ("many", "at most 64 numbers beside the scores of a completion are .* got 65, one called evil:score/", True),
        ("hang", "evil:score gave no answer within 1 s", False),
        ("spin", "evil:score gave no answer within 1 s", False),
        ("fork", "evil:score had more than 64 processes at a time", False),
        ("exit", r"evil:score ended its process \(exit code 3\)", False),
        ("die", r"evil:score ended its process \(exit code 7\)", False),
    ],
)
def test_a_failure_has_a_name_and_a_reason_and_costs_one_call(
    tmp_path: Path, completion: str, reason: str, survives: bool
) -> None:
    async def go() -> None:
        async with pool(tmp_path) as rewards:
            before = await pid_of_worker(rewards)
            started = time.monotonic()
            with pytest.raises(RewardFailed, match=reason):
                await values(rewards, "fine", completion)
            assert (await pid_of_worker(rewards) == before) == survives
            assert time.monotonic() - started < TIMEOUT_S + 8  # it is killed and replaced, not waited for
            assert await values(rewards, "fine", "") == [4.0, 0.0]

    asyncio.run(go())


@pytest.mark.parametrize("session", ["the worker's", "its own"])
def test_the_deadline_ends_everything_that_reward_code_started(tmp_path: Path, session: str) -> None:
    async def go() -> int:
        async with pool(tmp_path, pids=str(tmp_path / "pid"), session=session) as rewards:
            with pytest.raises(RewardFailed, match="gave no answer within 1 s"):
                await values(rewards, "child")
            return int((tmp_path / "pid").read_text())

    assert has_ended(asyncio.run(go()))


def test_what_reward_code_prints_does_not_disturb_the_pipe(tmp_path: Path) -> None:
    async def go() -> None:
        async with pool(tmp_path) as rewards:
            assert await values(rewards, "print", "after") == [1.0, 5.0]

    asyncio.run(go())


def test_a_process_that_reward_code_forks_does_not_answer_beside_its_parent(tmp_path: Path) -> None:
    """Its answer would be taken for that of the next call, and every later one would be another completion's."""

    async def go() -> None:
        async with pool(tmp_path) as rewards:
            for text in ("fork once", "1", "fork once", "22", "333"):
                assert await values(rewards, text) == [float(len(text))]

    asyncio.run(go())


def test_a_replacement_whose_lease_is_dropped_meanwhile_leaves_no_worker_behind(tmp_path: Path) -> None:
    async def go() -> None:
        async with pool(tmp_path) as rewards:
            with pytest.raises(RewardFailed, match="ended its process"):
                await values(rewards, "die")
            (tmp_path / "evil.py").write_text("import time\ntime.sleep(600)")
            before = set(psutil.Process().children())
            waiting = asyncio.create_task(values(rewards, "fine"))
            await until(lambda: set(psutil.Process().children()) > before, "a worker is started")
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert set(psutil.Process().children()) == before

    asyncio.run(go())


def test_workers_see_nothing_of_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_LOGGING_LEVEL", "OMP_NUM_THREADS", "SECRET_TOKEN"):
        monkeypatch.setenv(name, "1")

    async def go() -> None:
        async with pool(tmp_path) as rewards:
            environment = psutil.Process(await pid_of_worker(rewards)).environ()
            assert set(environment) <= {"PATH", "HOME", "PYTHONPATH", "LANG", "LC_CTYPE"}
            assert await values(rewards, "environment") == [float(len(environment))]

    asyncio.run(go())


def test_a_hanging_call_does_not_hold_up_another_worker(tmp_path: Path) -> None:
    async def go() -> None:
        async with pool(tmp_path, workers=2, timeout_s=30.0) as rewards:
            hanging = asyncio.create_task(values(rewards, "hang"))
            for _ in range(20):
                assert await asyncio.wait_for(values(rewards, "abc"), 20) == [3.0]
            assert not hanging.done()
            hanging.cancel()
            with pytest.raises(asyncio.CancelledError):
                await hanging
            both = await asyncio.wait_for(asyncio.gather(pid_of_worker(rewards), pid_of_worker(rewards)), 20)
            assert len(set(both)) == 2  # the worker of the cancelled call was replaced

    asyncio.run(go())


def test_closing_leaves_no_worker_behind(tmp_path: Path) -> None:
    async def go() -> list[int]:
        async with pool(tmp_path, workers=2) as rewards:
            return list(await asyncio.gather(pid_of_worker(rewards), pid_of_worker(rewards)))

    assert not [pid for pid in asyncio.run(go()) if psutil.pid_exists(pid)]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("def other(completion): return 1", "expected a function score"),
        ("import os; os._exit(9)", "ended its process"),
    ],
)
def test_reward_code_that_cannot_be_loaded_stops_the_start(tmp_path: Path, code: str, said: str) -> None:
    (tmp_path / "broken.py").write_text(code)

    async def go() -> None:
        rewards = RewardPool(RewardsConfig(functions=(RewardConfig(use=f"{tmp_path / 'broken.py'}:score"),)), 100)
        try:
            with pytest.raises(ConfigError, match=f"the reward code cannot be loaded: .*{said}"):
                await rewards.start()
        finally:
            await rewards.close()

    asyncio.run(go())


def test_a_worker_imports_nothing_heavy() -> None:
    code = (
        "import sys, actors.rewards.worker; print([n for n in ('torch', 'numpy', 'vllm', 'sympy') if n in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert ended.stdout.strip() == "[]", ended.stderr


STUCK = """
import asyncio, sys
from pathlib import Path
from tests.test_reward_pool import pid_of_worker, pool

async def main() -> None:
    async with pool(Path(sys.argv[1]), timeout_s=600.0) as rewards:
        print(await pid_of_worker(rewards), flush=True)
        await rewards.score(["spin"], [[1]], {"answer": ""}, 0)

asyncio.run(main())
"""


def test_a_worker_that_is_stuck_leaves_with_its_killed_generator(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUCK, str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[1])
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait(10)
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.wait(10)


def test_a_replacement_that_cannot_be_loaded_is_an_error_of_that_call_and_tried_again_by_the_next(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        async with pool(tmp_path) as rewards:
            code = (tmp_path / "evil.py").read_text()
            with pytest.raises(RewardFailed, match="ended its process"):
                await values(rewards, "die")
            (tmp_path / "evil.py").write_text("raise OSError('no such table')")
            with pytest.raises(RewardFailed, match=r"importing .*evil.py raised OSError: no such table; mend the file"):
                await values(rewards, "good")
            (tmp_path / "evil.py").write_text(code)
            assert await values(rewards, "good") == [4.0]

    asyncio.run(run())


def test_numbers_beside_a_score_come_back_under_the_functions_name(tmp_path: Path) -> None:
    async def run() -> None:
        async with pool(tmp_path) as rewards:
            scored = await rewards.score(["metrics", "ab"], [[1], [2]], {"answer": "#### 2"}, 0)
            assert scored.values == [[0.0, 0.0], [1.0, 2.0]]
            assert scored.metrics == [{"evil:score/acc": 1.0}, {}]

    asyncio.run(run())


def test_hostile_mathematics_costs_one_deadline_and_is_no_zero() -> None:
    settings = RewardsConfig(functions=(RewardConfig(use="math_accuracy"),), timeout_s=4.0)

    async def run() -> None:
        rewards = RewardPool(settings, 100)
        await rewards.start()
        try:
            with pytest.raises(RewardFailed, match="math_accuracy gave no answer within 4 s"):
                await rewards.score([r"\boxed{9^{9^{9^{9}}}}"], [[1]], {"answer": "1"}, 0)
            rewards_after = await rewards.score([r"\boxed{1}"], [[1]], {"answer": "1"}, 0)
            assert rewards_after.values == [[1.0]]
        finally:
            await rewards.close()

    asyncio.run(run())
