"""What a rollout's code may do: each way to fail is an error with its name on it, and none becomes a zero."""

from __future__ import annotations

import asyncio
import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engine import EngineDead, RequestFailed
from actors.fake_engine import FakeEngine
from actors.loop_watch import LoopWatch
from actors.rollout import RolloutFailed
from actors.rollouts import runner as runner_module
from actors.rollouts.runner import RolloutRunner
from protocol.config import Config
from protocol.errors import ConfigError
from protocol.types import FinishReason, LeaseKind, VersionSpan
from tests.engines import until
from tests.rollouts import LEASE, PROMPT, Bench

HEAD = """import asyncio, os, sys
from actors.conversation import Conversation
from actors.rollout import Episode

async def play(engine, prompt, turns=3):
"""
TALK = """
    talk = Conversation(engine, prompt)
    for _ in range(turns):
        await talk.generate(max_tokens=4)
        talk.observe(engine.encode(prompt.columns["answer"]))
    return talk.completion()
"""


def test_equal_seeds_give_equal_rollouts_and_samples_differ(tmp_path: Path) -> None:
    first = Bench(tmp_path / "a", HEAD + TALK).play(0, 1)
    again = Bench(tmp_path / "b", HEAD + TALK).play(0, 1)
    for one, other in zip(first, again, strict=True):
        assert one.completion.tokens.tolist() == other.completion.tokens.tolist()
        assert one.completion.tokens.tolist()[4::5] == [7, 7, 7], "what the environment said"
    assert first[0].completion.tokens.tolist() != first[1].completion.tokens.tolist()


def test_the_turns_of_an_evaluation_are_greedy(tmp_path: Path) -> None:
    bench = Bench(tmp_path, HEAD + TALK)
    one, other = bench.play(0, 1, lease=replace(LEASE, kind=LeaseKind.EVALUATE))
    assert one.completion.tokens.tolist() == other.completion.tokens.tolist()


def test_arguments_of_the_settings_reach_the_rollout(tmp_path: Path) -> None:
    [episode] = Bench(tmp_path, HEAD + TALK, rollout={"args": {"turns": 2}}).play(0)
    assert len(episode.completion.tokens) == 10


def test_a_reward_and_metrics_of_the_environment_come_with_the_completion(tmp_path: Path) -> None:
    code = HEAD + "    return Episode(await engine.generate(prompt.tokens), 2, {'moves': 3})\n"
    [episode] = Bench(tmp_path, code, rollout={"weight": 0.5}).play(0)
    assert (episode.reward, episode.metrics) == (2.0, {"environment/moves": 3.0})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return None", "mine:play: gave None, expected a Completion or an Episode"),
        ("return 'w1 w2'", "mine:play: gave str w1 w2, expected a Completion"),
        ("raise ValueError('no such tool')", "mine:play raised ValueError: no such tool"),
        ("return [1][5]", "mine:play raised IndexError"),
        ("sys.exit(3)", "mine:play raised SystemExit: 3"),
        ("raise KeyboardInterrupt", "mine:play raised KeyboardInterrupt"),
        ("raise BaseException('odd')", "mine:play raised BaseException: odd"),
        (
            "class Mute(Exception):\n        def __str__(self): raise ValueError\n    raise Mute",
            "mine:play raised Mute",
        ),
        ("raise asyncio.CancelledError", "mine:play cancelled itself"),
        ("await asyncio.Event().wait()", r"mine:play gave no answer within 0\.2 s of its own \(rollout\.timeout_s\)"),
        (
            "try:\n        await asyncio.Event().wait()\n    except BaseException: await asyncio.Event().wait()",
            r"mine:play gave no answer within 0\.2 s",
        ),
        (
            "return Episode(await engine.generate(prompt.tokens), 1.0)",
            r"gave the reward float 1\.0, .*set rollout\.weight",
        ),
        (
            "return Episode(await engine.generate(prompt.tokens), None, {'x': float('nan')})",
            "gave float nan as x, expected a number",
        ),
        (
            "return Episode(await engine.generate(prompt.tokens), None, dict.fromkeys(map(str, range(65)), 1))",
            "at most 64 metrics",
        ),
        (
            "while True: await engine.generate(prompt.tokens)",
            r"mine:play: one sample generated 768 tokens, 32 times sampling\.max_tokens; end it sooner",
        ),
        ("return (await engine.generate(prompt.tokens)).tokens", "gave ndarray .*, expected a Completion"),
        ("await engine.generate(prompt.tokens, max_tokens=8.5)", r"max_tokens is a whole number, got 8\.5"),
        ("await engine.generate(prompt.tokens, stop_token_ids=['w7'])", "token ids are a list of integers"),
        ("await engine.generate(prompt.tokens, stop_token_ids=[50])", "token ids are 0 to 49, got 50"),
        (
            "turn = await engine.generate(prompt.tokens)\n    turn.tokens[-1] = 0\n    return turn",
            "mine:play raised ValueError: .* read-only",
        ),
        (
            "class Last(Exception):\n        def __str__(self): sys.exit(3)\n    raise Last",
            "mine:play raised Last",
        ),
    ],
)
def test_what_a_rollout_does_wrong_is_an_error_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, reason: str
) -> None:
    monkeypatch.setattr(runner_module, "END_S", 0.1)
    with pytest.raises(RolloutFailed, match=reason):
        Bench(tmp_path, f"{HEAD}    {body}\n", rollout={"timeout_s": 0.2}).play(0)


def test_what_a_rollout_does_to_its_row_is_nobody_elses(tmp_path: Path) -> None:
    """The other samples have the same row, and so have the rewards."""
    lease = replace(LEASE, prompt=replace(PROMPT, columns={"answer": "w7", "extra": {"moves": [1]}}))
    code = HEAD + "    prompt.columns['extra']['moves'].append(2)\n    prompt.columns.pop('answer')\n" + TALK
    with pytest.raises(RolloutFailed, match="KeyError: 'answer'"):
        Bench(tmp_path, code).play(0, 1, lease=lease)
    assert lease.prompt.columns == {"answer": "w7", "extra": {"moves": [1]}}


def test_a_metric_whose_name_is_not_unicode_can_be_sent(tmp_path: Path) -> None:
    code = HEAD + "    return Episode(await engine.generate(prompt.tokens), metrics={'\\udc80': 1})\n"
    [episode] = Bench(tmp_path, code).play(0)
    assert episode.metrics == {"environment/?": 1.0}


def test_a_turn_that_the_rollout_did_not_wait_for_ends_with_its_sample(tmp_path: Path) -> None:
    code = f"""{HEAD}
    tries = [asyncio.create_task(engine.generate(prompt.tokens, max_tokens=most)) for most in (2, 20)]
    done, _ = await asyncio.wait(tries, return_when=asyncio.FIRST_COMPLETED)
    return done.pop().result()
"""
    bench = Bench(tmp_path, code)

    async def work(engine: FakeEngine) -> None:
        runner = RolloutRunner(bench.config, bench.config.rollout, tmp_path / "model")
        episode = await runner.run(engine, LEASE, bench.attempt(), bench.tokens.append)
        assert len(episode.completion.tokens) == 2
        await until(lambda: not engine.progress(), "the other turn has ended")
        assert bench.tokens == [2], "it was not waited for"

    bench.run(work, step_s=0.01)


def test_the_engines_time_is_not_the_rollouts(tmp_path: Path) -> None:
    bench = Bench(tmp_path, HEAD + TALK, rollout={"timeout_s": 0.25})

    async def work(engine: FakeEngine) -> Any:
        runner = RolloutRunner(bench.config, bench.config.rollout, tmp_path / "model")
        return await runner.run(engine, LEASE, bench.attempt(), bench.tokens.append)

    episode = bench.run(work, step_s=0.04)  # 12 tokens: half a second
    assert len(episode.completion.tokens) == 15


def test_what_the_engine_raised_ends_the_sample_even_if_the_rollout_goes_on(tmp_path: Path) -> None:
    code = f"""{HEAD}
    whole = await engine.generate(prompt.tokens)
    try:
        await engine.generate([1] * 5000)
    except Exception:
        pass
    return whole
"""
    with pytest.raises(RolloutFailed, match="there is no room for another token"):
        Bench(tmp_path / "long", code.replace("        pass", "        raise")).play(0)
    bench = Bench(tmp_path / "dead", code.replace("[1] * 5000", "prompt.tokens"))

    async def work(engine: FakeEngine, error: type[Exception]) -> None:
        runner = RolloutRunner(bench.config, bench.config.rollout, tmp_path / "dead" / "model")
        running = asyncio.create_task(runner.run(engine, LEASE, bench.attempt(), bench.tokens.append))
        await until(lambda: any(name.endswith("-1") for name in engine.progress()), "the second turn")
        await (engine.abort_all() if error is RequestFailed else engine.close())
        with pytest.raises(error):
            await running

    for error in (RequestFailed, EngineDead):
        bench.run(lambda engine, error=error: work(engine, error), step_s=0.01)  # type: ignore[misc]
        (tmp_path / "dead" / "v0").rename(tmp_path / f"v0 {error.__name__}")


def test_a_request_that_fails_is_told_once_and_not_by_the_event_loop_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path, HEAD + "    return await engine.generate(prompt.tokens)\n")
    unheard: list[str] = []

    async def work(engine: FakeEngine) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context["message"]))
        runner = RolloutRunner(bench.config, bench.config.rollout, tmp_path / "model")
        running = asyncio.create_task(runner.run(engine, LEASE, bench.attempt(), bench.tokens.append))
        await until(lambda: bool(engine.progress()), "its turn")
        await engine.abort_all()
        await asyncio.wait({running})
        assert isinstance(running.exception(), RequestFailed)

    bench.run(work, step_s=0.01)
    gc.collect()
    assert not unheard


def test_a_cancelled_sample_aborts_its_turn_and_its_rollout_generates_no_more(tmp_path: Path) -> None:
    code = f"""{HEAD}
    try:
        await engine.generate(prompt.tokens)
    except BaseException:
        return await engine.generate(prompt.tokens)
"""
    bench = Bench(tmp_path, code)

    async def work(engine: FakeEngine) -> None:
        runner = RolloutRunner(bench.config, bench.config.rollout, tmp_path / "model")
        running = asyncio.create_task(runner.run(engine, LEASE, bench.attempt(), bench.tokens.append))
        await until(lambda: bool(engine.progress()), "it generates")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not engine.progress()
        assert bench.tokens == []

    bench.run(work, step_s=0.01)


@pytest.mark.parametrize(
    ("code", "settings", "reason"),
    [
        ("def play(engine, prompt): ...", {}, r"expected an async function in .*mine\.py:play"),
        ("async def other(engine, prompt): ...", {}, r"expected a function play in .*mine\.py, there is none"),
        ("async def play(engine): ...", {}, r"cannot be called with engine, prompt and nothing else: too many"),
        ("async def play(engine, prompt): ...", {"args": {"k": 1}}, "engine, prompt and k: got an unexpected keyword"),
        ("import nowhere", {}, r"importing .*mine\.py raised ModuleNotFoundError"),
        ("raise SystemExit", {}, r"importing .*mine\.py raised SystemExit"),
    ],
)
def test_code_that_cannot_be_called_is_told_at_the_start(
    tmp_path: Path, code: str, settings: dict[str, Any], reason: str
) -> None:
    bench = Bench(tmp_path, code, rollout=settings)
    with pytest.raises(ConfigError, match=reason):
        RolloutRunner(bench.config, bench.config.rollout, tmp_path / "model")


def test_a_completion_made_by_hand_goes_out_in_the_types_of_the_wire(tmp_path: Path) -> None:
    """Whatever the rollout says of the log-probabilities of what was observed."""
    code = (
        HEAD
        + """
    import numpy as np
    from protocol.types import Completion
    made = await engine.generate(prompt.tokens, max_tokens=4)
    tokens = [*made.tokens.tolist(), 7, 7]
    spans = [[0, 0, 2], [0, 2, 6]]
    logprobs = [*made.behavior_logprobs.tolist(), 9.0, float("inf")]
    return Completion(tokens, logprobs, spans, "length", [False] * 4 + [True] * 2)
"""
    )
    [episode] = Bench(tmp_path, code).play(0)
    made = episode.completion
    assert (made.tokens.dtype, made.behavior_logprobs.dtype) == (np.int32, np.float32)
    assert np.isnan(made.behavior_logprobs).tolist() == [False] * 4 + [True] * 2
    assert made.spans == (VersionSpan(0, 0, 6),)
    assert made.finish_reason is FinishReason.LENGTH


def test_a_single_turn_is_the_engines_own_answer(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    async def work(engine: FakeEngine) -> None:
        runner = RolloutRunner(Config(), Config().rollout, tmp_path / "model")
        episode = await runner.run(engine, LEASE, bench.attempt(), bench.tokens.append)
        attempt = bench.attempt()
        plain = await engine.generate("plain", PROMPT.tokens, attempt.sampling, attempt.seed)
        assert episode.completion.tokens.tolist() == plain.tokens.tolist()
        assert runner.code_file == ""

    bench.run(work)


# --- Code that blocks the event loop


BLOCKING = """import threading
held = threading.Event()

async def play(engine, prompt):
    held.wait(30)
"""


def test_code_that_blocks_the_loop_is_named_with_its_line_and_given_up_past_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("actors.loop_watch.WARN_S", 0.1)
    bench = Bench(tmp_path, BLOCKING)
    given_up: list[str] = []

    async def work(engine: FakeEngine) -> None:
        runner = RolloutRunner(bench.config, bench.config.rollout, tmp_path / "model")

        def give_up(reason: str) -> None:
            given_up.append(reason)
            runner._function.__globals__["held"].set()

        watch = LoopWatch(runner.name, runner.code_file, 0.3, give_up)
        with pytest.raises(RolloutFailed, match="mine:play: gave None"):
            await runner.run(engine, LEASE, bench.attempt(), bench.tokens.append)
        watch.close()

    with caplog.at_level(logging.WARNING, "tether.rollout"):
        bench.run(work)
    [said] = [record.getMessage() for record in caplog.records if "blocks" in record.getMessage()]
    assert f"mine:play blocks this generator at {tmp_path / 'mine.py'}:5 (play): it must await, or call" in said
    assert len(given_up) == 1
    assert f"at {tmp_path / 'mine.py'}:5 (play)" in given_up[0]


def test_a_loop_that_others_block_is_not_blamed_on_the_rollout(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import threading

    monkeypatch.setattr("actors.loop_watch.WARN_S", 0.02)

    async def work() -> None:
        watch = LoopWatch("mine:play", "/nowhere/mine.py", 0.02, lambda reason: pytest.fail(reason))
        threading.Event().wait(0.3)
        watch.close()

    with caplog.at_level(logging.WARNING, "tether.rollout"):
        asyncio.run(work())
    assert not caplog.records
