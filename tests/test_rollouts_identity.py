"""A rollout does not travel: which there is, whose code it is, and settings that exclude each other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.rollouts.runner import RolloutRunner
from launch.flags import parse
from launch.generator import load_rollout
from protocol.config import Config
from protocol.errors import ConfigError
from protocol.messages import Role
from protocol.rewards import names_in_results, weighted_functions
from protocol.rollouts import BUILT_IN, check_rollout, rollout_digest, with_own_file
from protocol.settings import build
from tests.broker_alone import BrokerAlone, Peer
from tests.small_run import make_model_files


def code(folder: Path, text: str = "async def play(engine, prompt): ...\n") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "game.py").write_text(text)
    return f"{folder / 'game.py'}:play"


def test_equal_code_has_an_equal_digest_wherever_it_lies_and_a_built_in_has_none(tmp_path: Path) -> None:
    here, there = code(tmp_path / "here"), code(tmp_path / "there")
    assert rollout_digest(here) == rollout_digest(there) != ""
    assert rollout_digest(here) != rollout_digest(code(tmp_path / "other", "async def play(engine, prompt): 1\n"))
    assert {rollout_digest(name) for name in BUILT_IN} == {""}


def test_each_host_uses_its_own_file_and_the_runs_settings(tmp_path: Path) -> None:
    run = Config.model_validate({"rollout": {"use": "/run/game.py:play", "timeout_s": 7.0}}).rollout
    assert with_own_file(run, "/my/game.py:play") == run.model_copy(update={"use": "/my/game.py:play"})
    built_in = Config.model_validate({"rollout": {"use": "calculator"}}).rollout
    assert with_own_file(built_in, "") == built_in


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        ("calculater", "expected a rollout of single_turn, calculator, FILE.py:NAME or package.module:NAME, got calcu"),
        ("nowhere.at.all:play", "expected a rollout of single_turn, calculator, FILE.py:NAME"),
        ("game.py:", "expected a rollout of single_turn"),
        ("/nowhere/game.py:play", "expected rollout code in /nowhere/game.py, there is no such file; set rollout.use"),
    ],
)
def test_a_rollout_that_is_not_there_is_told_before_anything_starts(use: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_rollout(use)


def test_every_built_in_rollout_is_there_and_can_be_called(tmp_path: Path) -> None:
    make_model_files(tmp_path / "model", 10)
    for name in BUILT_IN:
        check_rollout(name)
        config = Config.model_validate({"rollout": {"use": name}})
        assert RolloutRunner(config, config.rollout, tmp_path / "model").name == name


def test_other_rollout_code_is_refused_with_what_to_do(tmp_path: Path) -> None:
    use = code(tmp_path / "code")
    broker = BrokerAlone(tmp_path / "run", rollout={"use": use})
    generator = Peer(broker, Role.GENERATOR, "far")
    said = "rollout: far would make completions by another rollout than the run; give it the same file with --rollout"
    assert generator.refused_hello() == said
    assert generator.refused_hello(rollout_digest="f" * 32) == said
    generator.hello(rollout_digest=rollout_digest(use))


def test_the_flag_names_a_rollout() -> None:
    assert build([], parse(["--rollout", "calculator"]).values).config.rollout.use == "calculator"


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"rewards": {"functions": []}}, "at least one reward is needed, got none"),
        ({"rollout": {"weight": 0.5}}, r"a single turn gives no reward of its own to weigh, got rollout\.weight 0\.5"),
    ],
)
def test_settings_that_give_no_reward_are_refused(sections: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Config.model_validate(sections)


def test_the_environments_reward_is_one_of_the_sum_where_it_has_a_weight() -> None:
    alone = Config.model_validate({"rollout": {"use": "a.py:play", "weight": 2.0}, "rewards": {"functions": []}})
    assert weighted_functions(alone) == [("environment", 2.0)]
    beside = Config.model_validate(
        {"rollout": {"use": "a.py:play", "weight": 0.0}, "algorithm": {"overlong": "punish"}}
    )
    assert weighted_functions(beside) == [("gsm8k", 1.0), ("environment", 0.0), ("overlong", 1.0)]
    assert names_in_results(Config(), evaluating=False) == ["gsm8k"]
    assert names_in_results(Config.model_validate({"rollout": {"use": "a.py:play"}}), evaluating=False) == [
        "gsm8k",
        "environment",
    ]


def test_the_rollout_is_among_the_settings_that_both_ends_compare() -> None:
    plain, other = (Config.model_validate({"rollout": {"use": use}}) for use in BUILT_IN)
    assert plain.result_digest() != other.result_digest()


def test_a_rollout_whose_import_does_not_end_is_refused_in_time(tmp_path: Path) -> None:
    make_model_files(tmp_path / "model", 8)
    use = code(tmp_path, "import time\n\ntime.sleep(1.0)\n\nasync def play(engine, prompt): ...\n")
    config = Config.model_validate({"rollout": {"use": use}})
    with pytest.raises(ConfigError, match=r"game\.py:play to be imported within 0\.1 s, it was not; does"):
        asyncio.run(load_rollout(config, config.rollout, tmp_path / "model", within_s=0.1))
