"""metrics.jsonl, the curves in TensorBoard and the samples, also after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from learner.curves import critic_curves
from learner.losses import policy_curves
from learner.metrics import MetricsWriter, is_known
from learner.samples import write_samples
from learner.trained_model import OptimizerStep


def lines(folder: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_what_is_written_is_in_the_file_and_in_tensorboard(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(0, {"reward/mean": 0.25, "policy/loss": -1.0})
    writer.write(1, {"reward/mean": 0.5})
    writer.close()
    assert [(line["step"], line["reward/mean"]) for line in lines(tmp_path)] == [(0, 0.25), (1, 0.5)]
    assert curve(tmp_path, "reward/mean") == [(0, 0.25), (1, 0.5)]
    assert curve(tmp_path, "policy/loss") == [(0, -1.0)]


def test_a_line_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(0, {"reward/mean": 0.25})
    assert len(lines(tmp_path)) == 1
    writer.close()


def test_what_is_not_finite_is_null_and_no_point(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(0, {"policy/loss": float("nan"), "policy/grad_norm": float("inf"), "reward/mean": 1.0})
    writer.close()
    (line,) = lines(tmp_path)
    assert (line["policy/loss"], line["policy/grad_norm"], line["reward/mean"]) == (None, None, 1.0)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_resumed_run_has_one_point_per_step(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path)
    for step in range(5):
        first.write(step, {"reward/mean": float(step)})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "rew')  # killed while it wrote
    second = MetricsWriter(tmp_path, first_step=3)
    for step in range(3, 6):
        second.write(step, {"reward/mean": 10.0 + step})
    second.close()
    wanted = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0)]
    assert [(line["step"], line["reward/mean"]) for line in lines(tmp_path)] == wanted
    assert curve(tmp_path, "reward/mean") == wanted


def test_a_curve_that_the_table_does_not_explain_is_refused(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    with pytest.raises(AssertionError, match=r"rewards/mean is not in metrics.CURVES"):
        writer.write(0, {"rewards/mean": 1.0})
    writer.close()
    assert lines(tmp_path) == []
    assert all(map(is_known, ("reward/gsm8k", "time/training", "generator/g0/tokens_per_s", "ledger/trained")))
    assert is_known("generators/running_min")
    assert not any(map(is_known, ("policy/other", "reward", "mismatch/")))


def test_every_average_of_the_loss_is_a_known_curve() -> None:
    counted = ("tokens", "clipped_low", "clipped_high", "clipped_dual")
    sums = dict.fromkeys((*counted, "loss", "k1", "kl_reference", "entropy", "ratio", "ratio_squared"), 1.0)
    assert all(map(is_known, policy_curves(sums)))


def test_every_curve_of_the_critic_is_known() -> None:
    names = ("tokens", "clipped", "value", "return", "return_squared", "error", "error_squared", "loss")
    step = OptimizerStep(True, 1.0, dict.fromkeys(names, 1.0), 1)
    assert all(map(is_known, critic_curves([step])))


def test_samples_of_a_step_are_lines_and_replace_those_of_an_earlier_try(tmp_path: Path) -> None:
    write_samples(tmp_path, 3, [{"text": "zwölf\n", "reward": 0.0}])
    path = write_samples(tmp_path, 3, [{"text": "é", "reward": 1.0}, {"text": "b", "reward": None}])
    assert path == tmp_path / "samples" / "step_000003.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"text": "é", "reward": 1.0},
        {"text": "b", "reward": None},
    ]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
