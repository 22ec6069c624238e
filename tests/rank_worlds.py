"""Worlds of several ranks, each started once: brokers, generators and what each rank is to do.

The test process runs the generators, and the broker of the run that nothing disturbs; the other broker is
`tests/dying_broker.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from actors.engine import LoadTimes, RequestFailed
from actors.fake_engine import FakeEngine
from actors.stepped_engine import Draw, Running
from learner import checkpoint
from learner.ranks import Ranks
from protocol.config import Config
from protocol.types import Completion, SamplingParams, Tokens
from protocol.weights import Snapshot
from tests.learning import RATE, model_folder, open_policy, sampled_steps, train_step
from tests.rank_processes import ROOT, RankProcesses
from tests.rank_program import DEATH_REPEAT_S
from tests.small_run import FakeGenerator, broker, make_run
from tests.watched_rank import train_watched

NUM_COMPLETIONS = [2, 7, 1]  # of the steps of the served run: no number of ranks divides them all


class World(NamedTuple):
    """What became of one."""

    folder: Path
    seen: list[dict[str, Any]]  # by rank


class EngineNearModel(FakeEngine):
    """Log-probabilities as a model would give that is near the learner's: ratios on both sides of the clips."""

    def _draw(self, request: Running) -> Draw:
        token, logprob = super()._draw(request)
        return Draw(token, logprob - 4.3)


class OneRemainder(EngineNearModel):
    """Of prompt 0 two samples end in time, four fail, and one begins only when version 2 is there.

    With G = 7, P = 1, S = 0 and splitting at the bound, the batches have `NUM_COMPLETIONS`, whatever the timing.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._is_time = asyncio.Event()

    async def load(self, snapshot: Snapshot) -> LoadTimes:
        times = await super().load(snapshot)
        if snapshot.version == 2:
            self._is_time.set()
        return times

    async def generate(
        self, request_id: str, prompt_tokens: Tokens, sampling: SamplingParams, seed: int | None
    ) -> Completion:
        prompt, sample = (int(request_id.split("-")[place]) for place in (2, 4))
        if prompt == 0 and sample > 2:
            raise RequestFailed("left out")
        if prompt == 0 and sample == 2:
            await self._is_time.wait()
        return await super().generate(request_id, prompt_tokens, sampling, seed)


class EngineOfMoods(EngineNearModel):
    """Of four groups that an epoch begins with, two wait for the next version; in the first epoch the other two do.

    So what an epoch's first batch is made of, the next epoch would train later.
    """

    PATIENCE_S = 2.0  # then nothing else is left to train, and no next version comes

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._loaded = asyncio.Event()
        self._groups: dict[str, list[str]] = {}  # by epoch, in the order they began

    async def load(self, snapshot: Snapshot) -> LoadTimes:
        times = await super().load(snapshot)
        self._loaded.set()
        self._loaded = asyncio.Event()
        return times

    async def generate(
        self, request_id: str, prompt_tokens: Tokens, sampling: SamplingParams, seed: int | None
    ) -> Completion:
        _, epoch, prompt, _, _ = request_id.split("-")
        groups = self._groups.setdefault(epoch, [])
        if prompt not in groups:
            groups.append(prompt)
        slow = range(2, 4) if len(self._groups) == 1 else range(2)
        if groups.index(prompt) in slow:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.PATIENCE_S):
                    await self._loaded.wait()
        return await super().generate(request_id, prompt_tokens, sampling, seed)


def write_config(folder: Path, config: Config) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))


def served_run(folder: Path, model: str, zero: int) -> Config:
    """Three steps of 2, 7 and 1 completions; the third row is too long for a lease."""
    config = make_run(
        folder,
        model={"path": model, "dtype": "float32"},
        data={"shuffle": False},
        batch={"prompts": 1, "group_size": 7},
        staleness={"max": 0, "at_bound": "split"},
        learner={"zero": zero, "learning_rate": RATE, "micro_batch_tokens": 24, "logprob_chunk_tokens": 16},
        run={"steps": 0, "epochs": 1.0, "device": "cpu"},
    )
    rows = [{"question": question, "answer": "none"} for question in ("w3 w4", "w5 w6 w7", "w8 " * 40)]
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_config(folder, config)
    return config


@contextmanager
def serving_run(folder: Path, config: Config) -> Iterator[None]:
    """A broker and a generator for a run of `served_run`."""
    with broker(folder, config), FakeGenerator(folder, config, engine_type=OneRemainder):
        yield


def served_alone(folder: Path, model: str, ranks: Ranks) -> World:
    """The same run with one rank, in this process."""
    config = served_run(folder / "served", model, zero=0)
    with serving_run(folder / "served", config):
        return World(folder, [{"served": train_watched(folder / "served", ranks)}])


def bereaved_run(folder: Path, model: str) -> Config:
    """Two groups of four make a batch; four may be open, so which two come first is a matter of time."""
    config = make_run(
        folder,
        num_rows=28,
        model={"path": model, "dtype": "float32"},
        batch={"prompts": 2, "group_size": 4},
        staleness={"max": 1, "pacing": False},
        learner={"zero": 2, "learning_rate": RATE, "micro_batch_tokens": 64},
        watchdog={"heartbeat_s": 0.1},
        run={"steps": 0, "epochs": 1.0, "device": "cpu"},
    )
    write_config(folder, config)
    return config


@contextmanager
def dying_broker(folder: Path) -> Iterator[None]:
    """`tests/dying_broker.py` in a process group of its own, which is killed in the end."""
    command = [sys.executable, "-m", "tests.dying_broker", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "broker.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def world_of_two(folder: Path) -> World:
    """Ranks that lose their broker again and again, among other things."""
    model = model_folder(folder / "untied", tied=False)
    served, bereaved = folder / "served", folder / "bereaved"
    served_config, config = served_run(served, model, zero=2), bereaved_run(bereaved, model)
    with ExitStack() as stack:
        world = stack.enter_context(RankProcesses(folder, 2, "gradients", "prepared", "served", "bereaved"))
        stack.enter_context(serving_run(served, served_config))
        stack.enter_context(pytest.MonkeyPatch.context()).setattr("protocol.channel.REPEAT_S", DEATH_REPEAT_S)
        stack.enter_context(dying_broker(bereaved))
        stack.enter_context(FakeGenerator(bereaved, config, engine_type=EngineOfMoods))
        return World(folder, world.seen())


def world_of_three(folder: Path, ranks: Ranks) -> World:
    """No parameter of the tiny model divides by three: ZeRO 3's slices are of unlike lengths."""
    for tied in (True, False):
        model_folder(folder / ("tied" if tied else "untied"), tied)
    policy = open_policy(str(folder / "tied"), ranks)
    for rows in sampled_steps(str(folder / "tied"))[:2]:
        train_step(policy, ranks, rows, learning_rate=RATE)
    checkpoint.save(folder / "one_rank", 2, policy, {"ledger": b"\x00\xff"}, 1, ranks)
    served = folder / "served"
    config = served_run(served, str(folder / "untied"), zero=3)
    with RankProcesses(folder, 3, "gradients", "adapters", "served", "alone") as world, serving_run(served, config):
        return World(folder, world.seen())
