"""What the broker refuses of a trajectory, each rule at its limit: just inside, and just beyond."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from broker.checks import MAX_LOGPROB, invalid_reason, trajectory
from protocol.messages import Result
from protocol.types import FinishReason, VersionSpan

LIMITS: dict[str, Any] = {
    "max_tokens": 200,
    "vocab_size": 50,
    "versions": range(3, 6),
    "reward_names": ["score", "other"],
}


def result(length: int = 4, **fields: Any) -> Result:
    """A good one, but for `fields`; its spans follow the number of tokens."""
    given: dict[str, Any] = {
        "epoch": 1,
        "prompt": 7,
        "attempt": 2,
        "sample": 1,
        "spans": [(3, 0, length)],
        "reward": 1.0,
        "rewards": {"score": 1.0, "other": None},
        "tokens": np.arange(length, dtype=np.int32) % 50,
        "behavior_logprobs": np.full(length, -0.5, np.float32),
        "observed": np.zeros(0, np.bool_),
    }
    return Result(**given | fields)


def refusal(**fields: Any) -> str:
    return invalid_reason(result(**fields), **LIMITS)


def logprobs(*values: float) -> np.ndarray[Any, Any]:
    return np.array(values, np.float32)


def test_a_good_result_is_taken() -> None:
    assert refusal() == ""


@pytest.mark.parametrize(("length", "allowed"), [(1, True), (200, True), (201, False)])
def test_a_completion_is_no_longer_than_it_was_asked_for(length: int, allowed: bool) -> None:
    assert refusal(length=length) == ("" if allowed else "201 tokens, 1 to 200 are allowed")


def test_a_completion_without_tokens_is_refused() -> None:
    assert refusal(length=0, spans=[]) == "0 tokens, 1 to 200 are allowed"


def test_an_error_carries_no_tokens() -> None:
    assert refusal(length=0, spans=[], error="out of memory") == ""
    assert refusal(error="out of memory") == "an error with tokens"


@pytest.mark.parametrize("length", [3, 5])
def test_each_token_has_one_log_probability(length: int) -> None:
    assert refusal(behavior_logprobs=np.zeros(length, np.float32)) == f"{length} log-probabilities for 4 tokens"


def test_observation_marks_cover_every_token_or_there_are_none() -> None:
    assert refusal(has_observed=True, observed=np.zeros(4, np.bool_)) == ""
    assert refusal(has_observed=True, observed=np.ones(4, np.bool_)) == "all of 4 tokens are observed"
    assert refusal(has_observed=True, observed=np.zeros(3, np.bool_)) == "3 observation marks for 4 tokens"
    assert refusal(has_observed=False, observed=np.zeros(4, np.bool_)) == "4 observation marks for 4 tokens"


@pytest.mark.parametrize(("token", "allowed"), [(0, True), (49, True), (50, False), (-1, False)])
def test_every_token_is_in_the_vocabulary(token: int, allowed: bool) -> None:
    said = refusal(tokens=np.array([1, 2, token, 3], np.int32))
    assert said == ("" if allowed else "a token outside the vocabulary of 50")


@pytest.mark.parametrize(
    ("value", "allowed"), [(-1e30, True), (0.0, True), (MAX_LOGPROB / 2, True), (0.01, False), (-np.inf, False)]
)
def test_a_log_probability_is_finite_and_not_above_zero(value: float, allowed: bool) -> None:
    said = refusal(behavior_logprobs=logprobs(-1.0, value, -1.0, -1.0))
    assert said == ("" if allowed else "a log-probability that is infinite or above 0")


@pytest.mark.parametrize(("num_missing", "allowed"), [(0, True), (2, True), (3, False), (200, False)])
def test_one_percent_of_the_log_probabilities_may_be_missing(num_missing: int, allowed: bool) -> None:
    values = np.full(200, -1.0, np.float32)
    values[:num_missing] = np.nan
    said = refusal(length=200, behavior_logprobs=values)
    assert said == ("" if allowed else f"{num_missing} of 200 log-probabilities are missing")


def test_what_a_tool_said_needs_no_log_probabilities_but_the_rest_does() -> None:
    observed = np.array([False, True, True, False])
    tool = logprobs(-1.0, np.nan, np.nan, -1.0)
    assert refusal(has_observed=True, observed=observed, behavior_logprobs=tool) == ""
    own = logprobs(np.nan, np.nan, np.nan, -1.0)
    said = refusal(has_observed=True, observed=observed, behavior_logprobs=own)
    assert said == "1 of 2 log-probabilities are missing"


def test_what_a_tool_said_does_not_excuse_what_is_missing_of_the_rest() -> None:
    values, observed = np.full(200, -1.0, np.float32), np.ones(200, np.bool_)
    observed[:40], values[:2] = False, np.nan
    said = refusal(length=200, has_observed=True, observed=observed, behavior_logprobs=values)
    assert said == "2 of 40 log-probabilities are missing"


@pytest.mark.parametrize(
    "spans",
    [
        [(3, 1, 4)],  # does not begin at 0
        [(3, 0, 2), (4, 3, 4)],  # gap
        [(3, 0, 3), (4, 2, 4)],  # overlap
        [(4, 0, 2), (3, 2, 4)],  # back to older weights
        [(3, 0, 0), (3, 0, 4)],  # empty
    ],
)
def test_version_spans_follow_each_other(spans: list[tuple[int, int, int]]) -> None:
    assert refusal(spans=spans).startswith("version spans with gaps or out of order")


@pytest.mark.parametrize(("spans", "covered"), [([], 0), ([(3, 0, 3)], 3), ([(3, 0, 5)], 5)])
def test_version_spans_cover_every_token(spans: list[tuple[int, int, int]], covered: int) -> None:
    assert refusal(spans=spans) == f"version spans cover {covered} of 4 tokens"


@pytest.mark.parametrize(("version", "allowed"), [(2, False), (3, True), (5, True), (6, False)])
def test_only_versions_from_the_lease_to_the_newest_can_have_sampled(version: int, allowed: bool) -> None:
    said = refusal(spans=[(version, 0, 4)])
    assert said == ("" if allowed else f"tokens of version {version}, 3 to 5 are possible")


def test_a_completion_may_go_on_with_newer_weights() -> None:
    assert refusal(spans=[(3, 0, 1), (5, 1, 4)]) == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.1e6, -2e9])
def test_a_reward_is_a_finite_number_of_reasonable_size(value: float) -> None:
    assert refusal(reward=value) == f"a reward of {value}, -1e+06 to 1e+06 are allowed"
    assert refusal(rewards={"score": value}) == f"a reward of {value}, -1e+06 to 1e+06 are allowed"


def test_a_function_may_have_no_opinion_and_a_reward_may_be_negative() -> None:
    assert refusal(reward=-1e6, rewards={"score": None}) == ""


def test_a_result_becomes_the_trajectory_that_it_describes() -> None:
    observed = np.array([False, True, False, False])
    made = trajectory(
        result(
            metrics={"score/acc": 0.5},
            finish_reason="length",
            spans=[(3, 0, 1), (4, 1, 4)],
            has_observed=True,
            observed=observed,
        )
    )
    assert (made.prompt, made.attempt, made.sample, made.reward) == (7, 2, 1, 1.0)
    assert made.rewards == {"score": 1.0, "other": None}
    assert made.metrics == {"score/acc": 0.5}
    assert made.completion is not None
    assert made.completion.tokens.tolist() == [0, 1, 2, 3]
    assert made.completion.spans == (VersionSpan(3, 0, 1), VersionSpan(4, 1, 4))
    assert made.completion.finish_reason is FinishReason.LENGTH
    assert made.completion.observed is observed


def test_an_error_becomes_a_trajectory_without_a_completion() -> None:
    made = trajectory(result(length=0, spans=[], error="reward failed: score raised KeyError"))
    assert made.completion is None
    assert made.error == "reward failed: score raised KeyError"


def test_a_reward_that_the_run_does_not_have_is_refused_by_name() -> None:
    assert refusal(rewards={"score": 1.0, "invented": 1.0}) == "a reward called invented, the run has score, other"


@pytest.mark.parametrize("name", ["invented/acc", "score", "mean", ""])
def test_a_metric_belongs_to_a_reward_of_the_run(name: str) -> None:
    assert refusal(metrics={"score/acc": 1.0, "other/a/b": -2.0}) == ""
    said = f"a metric called {name}, expected FUNCTION/KEY of score, other"
    assert refusal(metrics={"score/acc": 1.0, name: 1.0}) == said


def test_an_answer_to_vote_on_belongs_to_a_function_of_the_run() -> None:
    assert refusal(answers={"score": "12"}) == ""
    assert refusal(answers={"somebody": "12"}).startswith("an answer found by somebody, the run has ")
