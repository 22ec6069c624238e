"""The fake engine keeps an engine's promises, without a model, and fast."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engine import EngineDead, EngineOptions, EnginePoisoned, GenerationAborted, HeldVersion, NotLoaded
from actors.fake_engine import EOS, FakeEngine, fake_key, fake_token
from protocol.errors import SnapshotError
from protocol.snapshot_file import WEIGHTS_FILE
from protocol.types import Completion, FinishReason, SamplingParams, VersionSpan
from protocol.weights import Snapshot, SnapshotWriter, lay_out
from tests.engines import all_reached, begin, outcome, prompts, until

OPTIONS = EngineOptions(Path("no-model"), max_model_len=4096, max_num_seqs=16)
LAYOUT = lay_out([("weight", "float32", (1000,))])


def snapshot(folder: Path, version: int) -> Snapshot:
    writer = SnapshotWriter(folder / f"v{version}", LAYOUT)
    writer.view(LAYOUT[0])[:] = version
    return writer.finish(version)


def with_engine(engine: FakeEngine, use: Callable[[FakeEngine], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        await engine.start()
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(run(), 60))


def make(step_s: float = 0.0, load_s: float = 0.0, mean_tokens: float = 20.0) -> FakeEngine:
    """To be called in a running loop or before it; nothing starts yet."""
    return FakeEngine(OPTIONS, step_s, load_s, mean_tokens)


def test_every_token_is_the_one_that_its_recorded_version_draws(tmp_path: Path) -> None:
    questions = prompts(5)

    async def use(engine: FakeEngine) -> list[Completion]:
        await engine.load(snapshot(tmp_path, 3))
        tasks = begin(engine, questions, SamplingParams(300))
        for version, tokens in ((4, 50), (7, 120)):
            await all_reached(engine, 5, tokens)
            await engine.load(snapshot(tmp_path, version))
        return await asyncio.gather(*tasks)

    completions = with_engine(make(mean_tokens=1e9), use)
    for seed, (question, completion) in enumerate(zip(questions, completions, strict=True)):
        assert [span.version for span in completion.spans] == [3, 4, 7]
        assert completion.finish_reason is FinishReason.LENGTH
        key = fake_key(question, seed, SamplingParams(300))
        for span in completion.spans:
            for position in range(span.start, span.end):
                draw = fake_token(key, span.version, position, 1000, 1e9)
                assert completion.tokens[position] == draw.token
                assert completion.behavior_logprobs[position] == np.float32(draw.logprob)


def test_completions_depend_on_version_and_seed_and_end_where_the_hash_says(tmp_path: Path) -> None:
    async def use(engine: FakeEngine) -> list[Completion]:
        await engine.load(snapshot(tmp_path, 0))
        same = [await asyncio.gather(*begin(engine, prompts(200), SamplingParams(500))) for _ in range(2)]
        assert [c.tokens.tolist() for c in same[0]] == [c.tokens.tolist() for c in same[1]]
        other = await asyncio.gather(*begin(engine, prompts(200), SamplingParams(500), seed=1000))
        assert [c.tokens.tolist() for c in same[0]] != [c.tokens.tolist() for c in other]
        return same[0]

    completions = with_engine(make(mean_tokens=10.0), use)
    assert {c.finish_reason for c in completions} == {FinishReason.STOP}
    assert all((c.tokens[-1] == EOS) and EOS not in c.tokens[:-1] for c in completions)
    assert 7 < np.mean([len(c.tokens) for c in completions]) < 13


def test_greedy_completions_do_not_depend_on_the_seed(tmp_path: Path) -> None:
    async def use(engine: FakeEngine) -> None:
        await engine.load(snapshot(tmp_path, 0))
        [question] = prompts(1)
        first, second = await asyncio.gather(*begin(engine, [question, question], SamplingParams(50, temperature=0.0)))
        assert first.tokens.tolist() == second.tokens.tolist()

    with_engine(make(), use)


def test_a_load_stops_all_tokens_and_drops_no_request(tmp_path: Path) -> None:
    async def use(engine: FakeEngine) -> None:
        await engine.load(snapshot(tmp_path, 0))
        tasks = begin(engine, prompts(20), SamplingParams(100))
        await until(lambda: engine.statistics().num_running == 16, "a full engine")
        assert engine.statistics().num_waiting == 4
        load = asyncio.create_task(engine.load(snapshot(tmp_path, 1)))
        totals = set()
        while not load.done():
            totals.add(engine.statistics().generated_tokens)
            await asyncio.sleep(0.001)
        assert len(totals) <= 3  # the step that ran, and the first one afterwards
        assert load.result().load_s >= 0.05
        assert engine.held == HeldVersion(1, Snapshot.open(tmp_path / "v1", 1).digest)
        completions = await asyncio.gather(*tasks)
        assert {len(c.tokens) for c in completions} == {100}
        assert completions[-1].spans == (VersionSpan(1, 0, 100),)  # it waited for room
        assert engine.statistics().generated_tokens == 2000

    with_engine(make(load_s=0.05, mean_tokens=1e9), use)


def test_nothing_is_served_before_the_first_load_and_a_request_waits_for_a_running_one(tmp_path: Path) -> None:
    async def use(engine: FakeEngine) -> None:
        [question] = prompts(1)
        assert isinstance(await outcome(engine.generate("early", question, SamplingParams(5), 0)), NotLoaded)
        load = asyncio.create_task(engine.load(snapshot(tmp_path, 6)))
        await asyncio.sleep(0)
        completion = await engine.generate("waiting", question, SamplingParams(5), 0)
        assert load.done()
        assert completion.spans[0].version == 6

    with_engine(make(load_s=0.05), use)


def test_a_torn_snapshot_poisons_and_one_cut_short_is_refused(tmp_path: Path) -> None:
    async def use(engine: FakeEngine) -> None:
        await engine.load(snapshot(tmp_path, 0))
        short = snapshot(tmp_path, 1)
        os.truncate(short.folder / WEIGHTS_FILE, 10)
        assert isinstance(await outcome(engine.load(short)), SnapshotError)
        [task] = begin(engine, prompts(1), SamplingParams(3000))
        await all_reached(engine, 1, 1)
        torn = snapshot(tmp_path, 2)
        (torn.folder / WEIGHTS_FILE).write_bytes(bytes(4000))
        for call in (engine.load(torn), task, engine.load(snapshot(tmp_path, 3))):
            error = await outcome(call)
            assert isinstance(error, EnginePoisoned)
            assert "does not match its digest" in str(error)

    with_engine(make(mean_tokens=1e9), use)


def test_a_cancelled_load_poisons(tmp_path: Path) -> None:
    async def use(engine: FakeEngine) -> None:
        load = asyncio.create_task(engine.load(snapshot(tmp_path, 0)))
        await asyncio.sleep(0)
        load.cancel()
        await asyncio.wait({load}, timeout=5)
        assert load.cancelled()
        error = await outcome(engine.generate("later", prompts(1)[0], SamplingParams(5), 0))
        assert isinstance(error, EnginePoisoned)

    with_engine(make(load_s=20.0), use)


def test_abort_cancel_and_close_end_requests(tmp_path: Path) -> None:
    async def use(engine: FakeEngine) -> None:
        await engine.load(snapshot(tmp_path, 0))
        aborted = begin(engine, prompts(3), SamplingParams(4000), "a")
        await all_reached(engine, 3, 1)
        await engine.abort_all()
        assert {type(await outcome(task)) for task in aborted} == {GenerationAborted}
        cancelled, closed = begin(engine, prompts(2), SamplingParams(4000), "b")
        await all_reached(engine, 2, 1)
        cancelled.cancel()
        await asyncio.wait({cancelled}, timeout=5)
        assert list(engine.progress()) == ["b1"]
        await engine.close()
        await engine.close()
        assert isinstance(await outcome(closed), EngineDead)
        with pytest.raises(EngineDead, match="closed"):
            engine.statistics()

    with_engine(make(mean_tokens=1e9), use)


def test_it_gives_hundreds_of_completions_a_second(tmp_path: Path) -> None:
    async def use(engine: FakeEngine) -> float:
        await engine.load(snapshot(tmp_path, 0))
        started = time.perf_counter()
        await asyncio.gather(*begin(engine, prompts(500), SamplingParams(100)))
        return 500 / (time.perf_counter() - started)

    assert with_engine(make(), use) > 300


def test_importing_what_surrounds_an_engine_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, actors.fake_engine, actors.vllm_engine; assert not {'torch', 'vllm'} & set(sys.modules)"
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=os.environ | {"PYTHONPATH": str(root)})
