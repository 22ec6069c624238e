"""The learning rate over a run."""

from __future__ import annotations

import pytest

from learner.schedule import learning_rate, learning_rates
from protocol.config import Config


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


def config(**critic: float) -> Config:
    learner = {"learning_rate": 2e-4, "schedule": "linear", "warmup_steps": 2, "min_learning_rate": 2e-5}
    return Config.model_validate({"learner": learner, "critic": critic, "algorithm": {"advantage": "gae"}})


def test_policy_and_critic_share_a_shape_at_two_peaks() -> None:
    for step in range(10):
        policy, critic = learning_rates(config(learning_rate=1e-3), step, 10)
        assert policy == learning_rate(step, 10, 2e-4, "linear", 2, 2e-5)
        assert critic == pytest.approx(5 * policy)


def test_the_policys_schedule_begins_when_the_critic_has_warmed_up() -> None:
    rates = [learning_rates(config(learning_rate=1e-3, warmup_steps=4), step, 10) for step in range(10)]
    policy, critic = zip(*rates, strict=True)
    assert policy[:4] == (0, 0, 0, 0)
    assert policy[4:] == tuple(learning_rate(step, 6, 2e-4, "linear", 2, 2e-5) for step in range(6))
    assert critic == pytest.approx([5 * learning_rate(step, 10, 2e-4, "linear", 2, 2e-5) for step in range(10)])


def test_without_a_critic_no_step_waits_for_it() -> None:
    settings = Config.model_validate({"critic": {"warmup_steps": 4}, "learner": {"learning_rate": 1e-4}})
    assert learning_rates(settings, 0, 10)[0] == 1e-4
