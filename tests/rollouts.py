"""Rollouts around a fake engine, for tests: one sample run, without broker and generator."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from actors.engine import EngineOptions
from actors.fake_engine import FakeEngine
from actors.rollout import Attempt, Episode, attempt_for, sampling_for
from actors.rollouts.runner import RolloutRunner
from actors.sample_engine import SampleEngine
from actors.texts import Texts
from protocol.config import Config
from protocol.types import Lease, LeaseKind, Prompt
from protocol.weights import Snapshot, SnapshotWriter, lay_out
from tests.small_run import make_model_files

VOCABULARY = 50
PROMPT = Prompt(3, 0, np.arange(1, 9, dtype=np.int32), {"answer": "w7"})
LEASE = Lease(LeaseKind.TRAIN, PROMPT, attempt=1, samples=4, version=0, failures=0, ttl_s=30.0)


class Bench:
    """A fake engine that holds version 0, and what a rollout needs beside it."""

    def __init__(self, folder: Path, code: str = "", mean_tokens: float = 1e9, **sections: Any) -> None:
        self.folder, self._mean_tokens = folder, mean_tokens
        make_model_files(folder / "model", VOCABULARY)
        if code:
            (folder / "mine.py").write_text(code)
            settings = sections.pop("rollout", {})
            sections["rollout"] = {"use": f"{folder / 'mine.py'}:play"} | settings
        self.config = Config.model_validate({"sampling": {"max_tokens": 24}} | sections)
        self.tokens: list[int] = []  # of each turn, as the generator hears of them

    def snapshot(self, version: int) -> Snapshot:
        layout = lay_out([("w", "float32", (8,))])
        writer = SnapshotWriter(self.folder / f"v{version}", layout)
        writer.view(layout[0])[:] = version
        return writer.finish(version)

    def run(self, work: Callable[[FakeEngine], Awaitable[Any]], step_s: float = 0.0) -> Any:
        async def whole() -> Any:
            options = EngineOptions(self.folder / "model", max_model_len=self.config.context_tokens)
            engine = FakeEngine(options, step_s=step_s, mean_tokens=self._mean_tokens, vocabulary=VOCABULARY)
            await engine.start()
            await engine.load(self.snapshot(0))
            try:
                async with asyncio.timeout(30):
                    return await work(engine)
            finally:
                await engine.close()

        return asyncio.run(whole())

    def attempt(self, sample: int = 0, lease: Lease = LEASE) -> Attempt:
        return attempt_for(lease, "train-1-3-1", sample, sampling_for(lease, sample, self.config), run_seed=5)

    def sample_engine(self, engine: FakeEngine, own_time_s: float = 30.0) -> SampleEngine:
        texts = Texts(self.folder / "model")
        return SampleEngine(
            engine, PROMPT, self.attempt(), texts, self.config.context_tokens, own_time_s, self.tokens.append
        )

    def play(self, *samples: int, lease: Lease = LEASE) -> list[Episode]:
        """What the rollout of the settings gives for these samples, at the same time."""

        async def work(engine: FakeEngine) -> list[Episode]:
            runner = RolloutRunner(self.config, self.config.rollout, self.folder / "model")
            tries = [runner.run(engine, lease, self.attempt(sample, lease), self.tokens.append) for sample in samples]
            return list(await asyncio.gather(*tries))

        return self.run(work)  # type: ignore[no-any-return]
