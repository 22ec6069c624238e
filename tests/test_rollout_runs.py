"""Rollouts of a user's own in whole runs: real broker, sessions and generators around fake engines."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np

from broker.service import Service
from protocol.addresses import Addresses
from protocol.config import Config
from protocol.errors import Exit
from tests.small_run import FakeGenerator, ScriptedLearner, broker, make_run
from tests.test_standalone import MAIN, accepted_of, ended, started
from tests.wire import wait_until

GAME = """from actors.conversation import Conversation
from actors.rollout import Episode

async def play(engine, prompt):
    talk = Conversation(engine, prompt)
    while not talk.ended:
        await talk.generate(max_tokens=3)
        if not talk.ended:
            talk.observe(engine.encode("w7 w8"))
    return Episode(talk.completion(), reward=float(prompt.number % 2), metrics={"length": 24 - talk.room})
"""
IMPATIENT = "import sys, actors.loop_watch, launch.generator as main; actors.loop_watch.STILL_S = 2.0; main.main()"
FAILING = """async def play(engine, prompt):
    if prompt.number == 2:
        raise RuntimeError("the game is broken")
    return await engine.generate(prompt.tokens)
"""


def game_run(folder: Path, game: str = GAME, **sections: dict[str, object]) -> Config:
    settings = {"rollout": {"use": f"{folder / 'game.py'}:play"}, "sampling": {"max_tokens": 24}} | sections
    config = make_run(folder, run={"steps": 3}, **settings)
    (folder / "game.py").write_text(game)
    return config


def test_turns_observations_and_the_environments_reward_reach_the_learner(tmp_path: Path) -> None:
    """Without any reward function; what is held out is right by the environment's word."""
    rollout = {"use": f"{tmp_path / 'game.py'}:play", "weight": 0.5}
    config = game_run(tmp_path, rollout=rollout, rewards={"functions": []}, evaluation={"every": 10})
    generator = FakeGenerator(tmp_path, config, mean_tokens=20.0)
    with broker(tmp_path, config), ScriptedLearner(tmp_path, config) as learner, generator:
        learner.link.evaluate(0)
        while learner.step():
            pass
        learner.link.refresh()
        last = learner.link.evaluations()[-1]
    assert [(row["source"], row["function"]) for row in last.scores][:1] == [("", "environment")]
    shares = [taken.share for taken in learner.trained]
    items = [item for share in shares for item in share.items]
    several = [item.completion for item in items if item.completion.observed is not None]
    assert len(several) > len(items) / 2
    for made in several:
        assert made.observed is not None
        assert np.isnan(made.behavior_logprobs).tolist() == made.observed.tolist()
        told = np.flatnonzero(made.observed)
        assert (made.tokens[told][::2] == 7).all()
        assert told[:2].tolist() == [3, 4]
    for share in shares:
        sampled = sum(
            len(i.completion.tokens) - (0 if i.completion.observed is None else int(i.completion.observed.sum()))
            for i in share.items
        )
        assert share.total_tokens == sampled, "tokens inside the loss"
        for item in share.items:
            assert share.rewards[item.group, item.sample] == 0.5 * (item.prompt % 2)
            assert share.function_rewards[0, item.group, item.sample] == item.prompt % 2
    numbers = learner.trained[0].numbers
    assert 0.0 <= numbers["reward/environment"] <= 1.0
    assert numbers["reward/environment/length"] > 3
    assert last.errors == 0
    assert last.accuracy == last.rewards["environment"] == 0.5, "of the prompts 0 to 5 every other one is won"
    lines = (tmp_path / "evaluations" / "version_000003.jsonl").read_text().splitlines()
    held_out = [json.loads(line) for line in lines]
    assert any(0 < line["observed_tokens"] < line["completion_tokens"] for line in held_out)


def test_a_rollout_that_fails_for_a_prompt_costs_that_prompt_and_no_other(tmp_path: Path) -> None:
    config = game_run(tmp_path, FAILING)
    with broker(tmp_path, config) as service, ScriptedLearner(tmp_path, config) as learner:
        with FakeGenerator(tmp_path, config):
            while learner.step():
                pass
        assert failed_of(service) == 1
    assert 2 not in learner.prompts
    quarantined = (tmp_path / "quarantine.jsonl").read_text()
    assert "rollout failed: game:play raised RuntimeError: the game is broken" in quarantined


def test_a_standalone_generator_brings_the_rollout_itself_and_is_refused_with_another(tmp_path: Path) -> None:
    config = game_run(tmp_path, rollout={"use": f"{tmp_path / 'game.py'}:play", "weight": 1.0})
    other = tmp_path / "other.py"
    other.write_text(GAME.replace("max_tokens=3", "max_tokens=4"))
    with broker(tmp_path, config) as service, ScriptedLearner(tmp_path, config) as learner:
        for more in ([], ["--rollout", f"{other}:play"]):
            with ended(join(tmp_path, *more)) as process:
                _, said = process.communicate(timeout=30)
            assert process.returncode == Exit.REFUSED
            assert said.strip().endswith("by another rollout than the run; give it the same file with --rollout")
        moved = tmp_path / "elsewhere.py"
        moved.write_text(GAME)
        with ended(join(tmp_path, "--rollout", f"{moved}:play")):
            wait_until(lambda: accepted_of(service, "guest"), "it contributes")
            assert learner.step()
    assert any(item.completion.observed is not None for item in learner.trained[0].share.items)


def test_a_generator_that_its_rollout_blocks_says_where_and_ends(tmp_path: Path) -> None:
    """It would else hold its leases and its device in silence: its heartbeats stand still, too."""
    blocking = "import threading\n\nasync def play(engine, prompt):\n    threading.Event().wait()\n"
    use = f"{tmp_path / 'game.py'}:play"
    config = game_run(tmp_path, blocking, rollout={"use": use, "timeout_s": 0.5})
    with (
        broker(tmp_path, config),
        ScriptedLearner(tmp_path, config),
        ended(join(tmp_path, "--rollout", use)) as process,
    ):
        _, said = process.communicate(timeout=60)
    assert process.returncode == Exit.ENGINE_STALLED
    assert f"game:play blocks this generator at {tmp_path / 'game.py'}:4 (play): it must await, or call" in said
    assert said.strip().splitlines()[-1].endswith("game.py:4 (play); this process ends")


def test_a_generator_whose_rollout_keeps_the_interpreter_to_itself_ends_with_its_stack(tmp_path: Path) -> None:
    """Nothing in Python can end it: a regular expression lets no other thread run."""
    greedy = "import re\n\nasync def play(engine, prompt):\n    re.match('(a+)+$', 'a' * 60 + 'b')\n"
    use = f"{tmp_path / 'game.py'}:play"
    config = game_run(tmp_path, greedy, rollout={"use": use, "timeout_s": 0.5})
    with (
        broker(tmp_path, config),
        ScriptedLearner(tmp_path, config),
        ended(join(tmp_path, "--rollout", use, program=("-c", IMPATIENT))) as process,
    ):
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f'File "{tmp_path / "game.py"}", line 4 in play' in said


def test_tools_that_hang_in_threads_cost_their_samples_and_hold_up_neither_engine_nor_end(tmp_path: Path) -> None:
    hanging = """import asyncio, threading

async def play(engine, prompt):
    if prompt.number < 2:
        await asyncio.to_thread(threading.Event().wait)
    return await engine.generate(prompt.tokens)
"""
    use = f"{tmp_path / 'game.py'}:play"
    rollout = {"use": use, "timeout_s": 0.2}
    config = game_run(tmp_path, hanging, rollout=rollout, batch={"prompts": 4, "group_size": 8})
    with broker(tmp_path, config) as service, ScriptedLearner(tmp_path, config) as learner:
        with ended(join(tmp_path, "--rollout", use)) as process:
            wait_until(lambda: failed_of(service) == 2, "2 prompts x 8 samples x 3 tries are given up")
            assert learner.step()
            assert learner.step(), "with new weights"
            process.terminate()
            _, said = process.communicate(timeout=30)
        assert process.returncode == Exit.DONE, said


def failed_of(service: Service) -> int:
    scheduler = service._run.scheduler
    return scheduler.ledger.counts()["failed"] if scheduler else 0


def join(folder: Path, *more: str, program: tuple[str, ...] = (str(MAIN),)) -> subprocess.Popen[str]:
    control, key = Addresses.read(folder).control, folder / "keys" / "generator.key"
    reward = f"{folder / 'reward.py'}:score:0.5"  # as the run was given it; what it weighs is the run's matter
    return started(
        folder, "--connect", control, "--key", str(key), "--reward", reward, "--name", "guest", *more, program=program
    )
