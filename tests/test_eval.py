"""Evaluations of a real run, and tools/eval.py on what it left: the same numbers, by the same code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from protocol.errors import Exit
from tests.cluster_process import START_S, ClusterProcess, lines_of
from tests.easy_task import MAX_TOKENS, make_easy_task
from tools.eval import find_model, first_error, main, recipe, report

ROOT = Path(__file__).resolve().parents[1]
REWARDS = """def strict(completion, answer):
    words = completion.split()
    last = words[-1] if words else None
    return {"score": float(last == answer), "pred": last}


def lenient(completion, answer):
    return float(answer in completion.split())
"""
ROLLOUT = """from actors.conversation import Conversation

async def twice(engine, prompt):
    talk = Conversation(engine, prompt)
    await talk.generate(max_tokens=4)
    talk.observe(engine.encode("w2"))
    await talk.generate()
    return talk.completion()
"""
STEPS = 3

pytestmark = pytest.mark.timeout(240)


class Evaluated(NamedTuple):
    """A run of three steps, and what tools/eval.py said of its newest checkpoint."""

    task: Path
    run_dir: Path
    said: str
    last: dict[str, Any]  # of the run's own evaluations
    alone: dict[str, Any]
    errors: str  # what the tool said meanwhile


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    task = make_easy_task(tmp_path_factory.mktemp("task"))
    (task / "reward.py").write_text(REWARDS)
    (task / "rollout.py").write_text(ROLLOUT)
    for name, count in (("a", 7), ("b", 3)):
        rows = [{"question": f"w{2 + row} w3", "answer": "w5"} for row in range(count)]
        (task / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {
        "model": "model",
        "dataset": "data",
        "reward": "reward.py:strict",
        "eval-reward": "reward.py:lenient",
        "rollout": "rollout.py:twice",
        "device": "cpu",
        "generators.engine": "transformers",
        "steps": STEPS,
        "run-name": "run",
        "prompts-per-step": 4,
        "group-size": 4,
        "sampling.max_tokens": MAX_TOKENS,
        "data.max_prompt_tokens": 16,
        "data.eval": "a.jsonl,b.jsonl",
        "evaluation.samples": 4,
        "evaluation.temperature": 1.0,
        "evaluation.every": 2,
        "evaluation.before_training": "false",
        "learner.learning_rate": 1e-2,
        "watchdog.heartbeat_s": 0.5,
        "watchdog.lease_ttl_s": 10,
    }
    run_dir = task / "runs" / "run"
    with ClusterProcess(task, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))) as run:
        assert run.end() == Exit.DONE, run.said
    command = [sys.executable, str(ROOT / "tools" / "eval.py"), str(run_dir), "--json", "--out", "all.jsonl"]
    tool = subprocess.run(command, cwd=task, capture_output=True, text=True, timeout=START_S, check=False)
    assert tool.returncode == Exit.DONE, tool.stderr
    last = lines_of(run_dir / "evaluations.jsonl")[-1]
    return Evaluated(task, run_dir, run.said, last, json.loads(tool.stdout), tool.stderr)


def test_a_checkpoint_by_itself_has_the_numbers_of_its_runs_last_evaluation(evaluated: Evaluated) -> None:
    compared = ("accuracy", "rewards", "scores", "num_prompts", "samples_per_prompt", "length_mean", "errors")
    assert evaluated.last["version"] == STEPS
    assert {name: evaluated.alone[name] for name in compared} == {name: evaluated.last[name] for name in compared}
    assert evaluated.alone["model"] == str(evaluated.run_dir / "checkpoints" / f"step_{STEPS}" / "hf")


def test_strict_and_lenient_scores_of_each_source_stand_side_by_side(evaluated: Evaluated) -> None:
    found = [(row["source"], row["function"], row["completions"]) for row in evaluated.last["scores"]]
    strict, lenient = "reward:strict", "reward:lenient"
    both = [("", 40), ("a.jsonl", 28), ("b.jsonl", 12)]
    assert found == [(source, function, count) for source, count in both for function in (strict, lenient)]
    metrics = [row["metrics"] for row in evaluated.last["scores"]]
    assert all(low["mean@4"] <= high["mean@4"] for low, high in zip(metrics[::2], metrics[1::2], strict=True))
    assert "maj@4" in metrics[0]
    assert "maj@4" not in metrics[1]
    assert f"evaluation of version {STEPS}: accuracy {evaluated.last['accuracy']:.1%} (mean@4 of 10" in evaluated.said
    assert "reward:lenient" in evaluated.said


def test_evaluations_are_curves_of_their_version(evaluated: Evaluated) -> None:
    rows = [row for row in lines_of(evaluated.run_dir / "metrics.jsonl") if "eval/accuracy" in row]
    steps = [row["step"] for row in rows]
    assert steps[-1] == STEPS
    assert steps[0] >= 2, "not before training, as it was asked for"
    board = EventAccumulator(str(evaluated.run_dir / "tensorboard"))
    board.Reload()
    for name in ("eval/accuracy", "eval/error_frac", "eval/reward:lenient", "eval/b.jsonl/reward:strict/pass@4"):
        assert rows[-1][name] == pytest.approx(board.Scalars(name)[-1].value, abs=1e-6)
        assert board.Scalars(name)[-1].step == STEPS


def test_the_tool_writes_every_completion_and_they_are_those_of_the_run(evaluated: Evaluated) -> None:
    own = lines_of(evaluated.run_dir / "evaluations" / f"version_{STEPS:06}.jsonl")
    alone = lines_of(evaluated.task / "all.jsonl")
    assert len(own) == len(alone) == 40
    assert {line["versions"][0][0] for line in own} == {STEPS}
    for line in (*own, *alone):
        del line["step"], line["versions"]
    assert alone == own


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--out", "nowhere/all.jsonl"],
            "expected a file behind --out in a folder that can be written to, got nowhere",
        ),
        (["--run.out=kept"], "--run.out=kept is not for an evaluation, whose folder is made and removed; leave it out"),
        (["--run-name", "a"], "--run-name is not for an evaluation"),
        (["--dry-run"], "--dry-run is not for an evaluation"),
    ],
)
def test_flags_that_would_cost_the_numbers_are_told_before_the_work(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["some/model", *flags]) == Exit.SETTINGS
    assert f"error: {said}" in capsys.readouterr().err


def test_why_a_completion_failed_is_said_beside_how_many_did(tmp_path: Path) -> None:
    written = tmp_path / "version_000000.jsonl"
    lines = [{"completion": "a"}, {"error": "reward failed: mine:f\nraised"}, {"error": "other"}]
    written.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"model": "m", "num_prompts": 3, "samples_per_prompt": 1, "length_mean": 1.0, "errors": 2}
    said = report(row | {"first_error": first_error(written)})[-1]
    assert said == "2 of 3 completions failed and are in no number; the first: reward failed: mine:f\\nraised"
    said = report(row | {"first_error": first_error(tmp_path / "nothing was written")})[-1]
    assert said == "2 of 3 completions failed and are in no number"


def test_a_model_that_is_none_and_a_damaged_checkpoint_are_told_before_anything_starts(
    evaluated: Evaluated, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint = evaluated.run_dir / "checkpoints" / f"step_{STEPS}"
    assert find_model(str(checkpoint)) == (str(checkpoint / "hf"), evaluated.run_dir)
    file = checkpoint / "hf" / "config.json"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole.replace(b"{", b"[", 1))
        assert main([str(checkpoint)]) == Exit.SETTINGS
        assert f"{checkpoint} is damaged and not evaluated: hf/config.json does not" in capsys.readouterr().err
        assert main([str(evaluated.run_dir)]) == Exit.SETTINGS
        said = capsys.readouterr().err
        assert "this checkpoint is damaged and not used" in said
        assert "error: expected a run with a checkpoint, found none in" in said
    finally:
        file.write_bytes(whole)


def test_a_runs_rollout_makes_the_completions_of_its_evaluations_too(tmp_path: Path) -> None:
    settings = {"rollout": {"use": "calculator", "timeout_s": 7.0}}
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    assert {name: recipe(tmp_path)["rollout"][name] for name in ("use", "timeout_s")} == settings["rollout"]
