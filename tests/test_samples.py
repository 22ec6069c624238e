"""Samples of a run: what a step's lines hold, and what tools/samples.py shows of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.samples import cut_evaluations, cut_samples, sample_fields, spread, write_samples
from protocol.errors import Exit
from protocol.types import Completion, FinishReason, Share, ShareItem, VersionSpan
from tools.samples import main


def sample(step: int, number: int, reward: float = 0.0, tokens: int = 5, **changes: Any) -> dict[str, Any]:
    """One sample of prompt 10 * step + number, in a group of two unequal rewards."""
    return {
        "step": step,
        "prompt_number": 10 * step + number,
        "sample": 0,
        "prompt": "How many?",
        "completion": f"answer {step}.{number}",
        "reward": reward,
        "rewards": {"gsm8k": reward},
        "group_rewards": [reward, reward + 1.0],
        "prompt_tokens": 3,
        "completion_tokens": tokens,
        "finish_reason": "stop",
        "versions": [[step, 0, tokens]],
    } | changes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    equal = {"group_rewards": [1.0, 1.0, 1.0]}
    write_samples(tmp_path, 0, [sample(0, 0, reward=-0.5), sample(0, 1, tokens=9)])
    write_samples(tmp_path, 2, [sample(2, 0, reward=1.0, tokens=7, **equal), sample(2, 1, reward=0.5)])
    write_samples(tmp_path, 11, [sample(11, 0), sample(11, 1, reward=2.0, group_rewards=[2.0])])
    return tmp_path


def shown(run: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[int]:
    """Numbers of the prompts, in the order in which they are shown."""
    assert main([str(run), "--json", *flags]) == Exit.DONE
    return [json.loads(line)["prompt_number"] for line in capsys.readouterr().out.splitlines()]


def test_a_sample_has_its_rewards_by_function_its_groups_rewards_its_versions_and_lengths() -> None:
    nan = np.nan
    spans = (VersionSpan(3, 0, 2), VersionSpan(4, 2, 3))
    tokens = np.arange(3, dtype=np.int32)
    observed = np.array([False, True, False])
    completion = Completion(tokens, np.zeros(3, np.float32), spans, FinishReason.LENGTH, observed)
    item = ShareItem(1, 2, 77, np.zeros(5, np.int32), completion)
    rewards = np.float32([[0, 0, 0], [nan, 0.5, 1.25]])
    by_function = np.float32([[[0, 0, 0], [nan, 1, 2]], [[0, 0, 0], [nan, 0, nan]]])
    share = Share(9, 4, b"d" * 16, 0, 1, 6, rewards, rewards, (item,), function_rewards=by_function)
    assert sample_fields(share, item, ["a", "b"], "why?", "so") == {
        "step": 4,
        "prompt_number": 77,
        "sample": 2,
        "prompt": "why?",
        "completion": "so",
        "reward": 1.25,
        "rewards": {"a": 2.0, "b": None},
        "group_rewards": [0.5, 1.25],
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "observed_tokens": 1,
        "finish_reason": "length",
        "versions": [[3, 0, 2], [4, 2, 3]],
    }


@pytest.mark.parametrize(
    ("count", "chosen"),
    [(0, []), (1, [(0, 0)]), (3, [(0, 0), (1, 0), (2, 0)]), (9, [(g, s) for g in (0, 1, 2) for s in (0, 1)])],
)
def test_samples_are_spread_over_the_groups_whatever_their_length(count: int, chosen: list[tuple[int, int]]) -> None:
    nothing = np.zeros(0, np.int32)
    completion = Completion(nothing, np.zeros(0, np.float32), (), FinishReason.STOP)
    places = [(2, 1), (0, 0), (1, 1), (0, 1), (2, 0), (1, 0)]
    items = [ShareItem(group, number, 50 + group, nothing, completion) for group, number in places]
    assert [(item.group, item.sample) for item in spread(items, count)] == chosen


def test_samples_of_steps_that_are_made_again_go_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut_samples(run, 2)
    assert shown(run, capsys) == [0, 1]
    cut_samples(run / "nowhere", 0)


def test_the_newest_step_comes_first_and_four_are_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(run, capsys) == [110, 111, 20, 21]
    assert shown(run, capsys, "--count", "9") == [110, 111, 20, 21, 0, 1]


@pytest.mark.parametrize(
    ("flags", "prompts"),
    [
        (("--step", "2"), [20, 21]),
        (("--step", "1:11"), [110, 111, 20, 21]),
        (("--step", ":2"), [20, 21, 0, 1]),
        (("--reward", "0.5"), [21]),
        (("--reward", "0.5:1"), [20, 21]),
        (("--reward=-1:0",), [110, 0, 1]),
        (("--equal-groups",), [20]),
        (("--longest", "--count", "2"), [1, 20]),
        (("--worst", "--count", "2"), [0, 110]),
        (("--worst", "--step", "2:", "--reward", "0.1:"), [21, 20, 111]),
    ],
)
def test_filters_and_orders_choose_samples(
    run: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], prompts: list[int]
) -> None:
    assert shown(run, capsys, *flags) == prompts


def test_a_sample_is_shown_in_full_and_without_what_a_terminal_obeys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoken = sample(
        7, 1, reward=1.1, completion="<think>\n\x1b[2J\u2028</think>", finish_reason="length",
        rewards={"gsm8k": 1.0, "a:b": None}, group_rewards=[1.1, 1.1], versions=[[5, 0, 2], [6, 2, 5]],
    )  # fmt: skip
    write_samples(tmp_path, 7, [spoken])
    assert main([str(tmp_path)]) == Exit.DONE
    assert capsys.readouterr().out.splitlines() == [
        "step 7  prompt 71  sample 0  versions 5 to 6",
        "  reward      1.1  (gsm8k 1, a:b no opinion; its group of 2: all equal)",
        "  tokens      3 + 5, cut off",
        "  prompt      How many?",
        "  completion  <think>",
        r"              \x1b[2J",
        "              </think>",
        "",
    ]


def test_when_no_sample_is_like_that_it_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--reward", "7"]) == Exit.DONE
    assert capsys.readouterr() == ("", "no sample is like that\n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--step", "5"), "has samples of the steps 0 to 11, none of those of --step"),
        (("--step", "x:3"), "expected a number or LOW:HIGH behind --step, got 'x:3'"),
        (("--reward", "3:1"), "the lower number first behind --reward, got '3:1'"),
        (("--count", "0"), "--count must be at least 1, got 0"),
    ],
)
def test_a_wrong_flag_is_one_error(
    run: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert main([str(run), *flags]) == Exit.SETTINGS
    assert said in capsys.readouterr().err


def test_a_folder_without_samples_and_a_line_that_is_none_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nowhere")]) == Exit.SETTINGS
    assert f"expected samples in {tmp_path / 'nowhere' / 'samples'}, found none" in capsys.readouterr().err
    newest = run / "samples" / "step_000011.jsonl"
    newest.write_text(newest.read_text() + '{"step": 11}\n')
    assert main([str(run)]) == Exit.SETTINGS
    said = capsys.readouterr().err
    assert "expected a sample with completion, completion_tokens," in said
    assert f"at {newest}:3" in said


def test_held_out_completions_are_shown_by_the_version_that_was_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evaluations").mkdir()
    lines = [sample(4, 0), {"step": 4, "prompt_number": 9, "error": "reward failed"}]
    (tmp_path / "evaluations" / "version_000004.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert shown(tmp_path, capsys, "--evaluations") == [40], "what failed has nothing to show"
    assert main([str(tmp_path)]) == Exit.SETTINGS
    assert main([str(tmp_path / "nowhere"), "--evaluations"]) == Exit.SETTINGS
    assert "name the folder of a run that was evaluated" in capsys.readouterr().err
    cut_evaluations(tmp_path, 5)
    assert list((tmp_path / "evaluations").iterdir())
    cut_evaluations(tmp_path, 4)
    assert not list((tmp_path / "evaluations").iterdir())
