"""The demo, as a stranger runs it: every part real, and the model gets better."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.demo import GAINS, STARTS_BETWEEN, Outcome, run_demo


@pytest.mark.timeout(600)
def test_the_demo_teaches_a_model_within_its_time(tmp_path: Path) -> None:
    outcome = run_demo(0, tmp_path)
    assert outcome.exit_code == 0
    assert STARTS_BETWEEN[0] <= outcome.before <= STARTS_BETWEEN[1]
    assert outcome.after - outcome.before >= GAINS
    folder = next(tmp_path.iterdir())
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "evaluations.jsonl",
        "curves.png",
        "tensorboard",
        "samples",
        "checkpoints",
    ):
        assert (folder / name).exists(), f"the demo left no {name}"


def test_a_demo_that_does_not_learn_breaks_the_promise() -> None:
    assert Outcome(0, 0, 0.30, 0.60, 200.0).kept
    for broken in (
        (0, 0.30, 0.45, 200.0),
        (0, 0.10, 0.60, 200.0),
        (0, 0.60, 0.90, 200.0),
        (0, 0.3, 0.6, 400.0),
        (1, 0.3, 0.6, 9.0),
    ):
        assert not Outcome(0, *broken).kept
