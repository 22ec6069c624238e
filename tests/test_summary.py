"""What a run prints and draws when it has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.summary import summary


def evaluation(version: int, accuracy: float, samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "version": version,
        "num_prompts": 200,
        "accuracy": accuracy,
        "rewards": {},
        "length_mean": 9.0,
        "samples": samples,
    }


def sample(prompt: str, completion: str, reward: float) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "answer": "12", "reward": reward}


def write(run_dir: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (run_dir / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(tmp_path: Path) -> Path:
    write(tmp_path, "metrics.jsonl", [{"step": i, "time": float(i), "reward/mean": i / 10} for i in range(8)])
    before = [sample("How many?", "11\x1b[31m", 0), sample("Still wrong", "a", 0), sample("Only before", "b", 0)]
    after = [sample("Still wrong", "c", 0), sample("How many?", "7 + 5\n= 12", 1), sample("Only after", "d", 1)]
    write(
        tmp_path, "evaluations.jsonl", [evaluation(0, 0.3, before), evaluation(4, 0.4, []), evaluation(8, 0.545, after)]
    )
    return tmp_path


def test_the_gain_is_said_in_points(tmp_path: Path) -> None:
    said = "held-out accuracy: 30.0% at version 0, 54.5% at version 8 (+24.5 points, 200 prompts)"
    assert said in summary(run(tmp_path), 80)


def test_both_curves_are_drawn_within_the_width(tmp_path: Path) -> None:
    lines = summary(run(tmp_path), 60)
    assert "reward by step" in lines
    assert "held-out accuracy by version" in lines
    drawn = [line for line in lines if "┤" in line]
    assert len(drawn) == 12
    assert max(map(len, drawn)) <= 60


def test_the_same_questions_are_shown_before_and_after_learned_ones_first(tmp_path: Path) -> None:
    lines = summary(run(tmp_path), 80)
    start = lines.index("question  How many?")
    assert lines[start + 1 : start + 3] == [r"  before  [reward 0] 11\x1b[31m", "  after   [reward 1] 7 + 5 = 12"]
    assert [line for line in lines if line.startswith("question")] == ["question  How many?", "question  Still wrong"]


def test_the_curves_are_saved_as_a_picture(tmp_path: Path) -> None:
    lines = summary(run(tmp_path), 80)
    assert f"picture: {tmp_path / 'curves.png'}" in lines
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert lines[-1] == f"curves:  tensorboard --logdir {tmp_path / 'tensorboard'}"


def test_a_run_without_a_step_has_no_summary(tmp_path: Path) -> None:
    assert summary(tmp_path, 80) == []


def test_a_run_without_evaluations_still_shows_its_reward(tmp_path: Path) -> None:
    write(tmp_path, "metrics.jsonl", [{"step": i, "time": 0.0, "reward/mean": 0.5} for i in range(2)])
    lines = summary(tmp_path, 80)
    assert "reward by step" in lines
    assert not any("held-out" in line for line in lines)


def scored(version: int, strict: float, lenient: float) -> dict[str, Any]:
    rows = [
        {"source": source, "function": function, "metrics": {"mean@1": value}}
        for source in ("", "test.jsonl")
        for function, value in (("gsm8k", strict), ("gsm8k_flexible", lenient))
    ]
    return evaluation(version, strict, []) | {"scores": rows, "samples_per_prompt": 1}


def test_what_the_lenient_scorer_said_before_and_after_stands_beside_the_strict_one(tmp_path: Path) -> None:
    write(tmp_path, "metrics.jsonl", [{"step": i, "time": 0.0, "reward/mean": 0.5} for i in range(2)])
    write(tmp_path, "evaluations.jsonl", [scored(0, 0.0, 0.3), scored(2, 0.5, 0.55)])
    lines = summary(tmp_path, 80)
    gain = next(number for number, line in enumerate(lines) if line.startswith("held-out accuracy:"))
    assert "0.0% at version 0, 50.0% at version 2 (+50.0 points" in lines[gain]
    assert lines[gain + 1] == "  test.jsonl gsm8k_flexible: mean@1 30.0%, 55.0% (+25.0)"
    assert lines[gain + 2] == "", "accuracy is said once"
