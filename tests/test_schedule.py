"""The learning rate over a run."""

from __future__ import annotations

import pytest

from learner.schedule import learning_rate


def test_the_first_warmup_step_already_moves_the_weights() -> None:
    assert [learning_rate(s, 10, 1.0, warmup_steps=4) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_run_of_warmup_alone_reaches_the_peak() -> None:
    assert learning_rate(3, 4, 2.0, "cosine", warmup_steps=4) == 2.0


@pytest.mark.parametrize(("kind", "middle"), [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)])
def test_a_decaying_schedule_goes_from_its_peak_to_its_minimum(kind: str, middle: float) -> None:
    def rate(step: int) -> float:
        return learning_rate(step, 12, 1.0, kind, warmup_steps=2, minimum=0.1)  # type: ignore[arg-type]

    assert rate(2) == 1.0
    assert rate(7) == pytest.approx(middle)
    assert rate(12) == rate(50) == pytest.approx(1.0 if kind == "constant" else 0.1)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_no_step_of_a_run_has_a_rate_of_zero(kind: str) -> None:
    assert all(learning_rate(step, 7, 1e-3, kind, warmup_steps=2) > 0 for step in range(7))  # type: ignore[arg-type]


def test_cosine_falls_slowly_first() -> None:
    assert learning_rate(1, 10, 1.0, "cosine") > learning_rate(1, 10, 1.0, "linear")
