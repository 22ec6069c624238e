"""Completions near max_tokens lose reward softly, and the run can see how much."""

from __future__ import annotations

import numpy as np
import pytest

from broker.overlong import punished, punishment
from protocol.config import Config
from protocol.rewards import weighted_functions
from protocol.types import Completion, FinishReason, Trajectory, VersionSpan


@pytest.mark.parametrize(
    ("num_tokens", "wanted"), [(1, 0.0), (75, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (140, -1.0)]
)
def test_the_punishment_falls_over_the_buffer_and_no_further(num_tokens: int, wanted: float) -> None:
    assert punishment(num_tokens, max_tokens=100, buffer_tokens=20) == pytest.approx(wanted, abs=1e-12)


def test_it_is_part_of_the_reward_and_stands_by_itself() -> None:
    completion = Completion(np.zeros(9, np.int32), np.zeros(9, np.float32), (VersionSpan(0, 0, 9),), FinishReason.STOP)
    before = Trajectory(1, 2, 0, completion, 0.75, {"gsm8k": 0.75})
    after = punished(before, max_tokens=10, buffer_tokens=4)
    assert (after.reward, after.rewards) == (0.0, {"gsm8k": 0.75, "overlong": -0.75})
    assert (before.reward, before.rewards) == (0.75, {"gsm8k": 0.75})


def test_a_failed_completion_is_not_punished() -> None:
    failed = Trajectory(1, 2, 0, None, error="timed out")
    assert punished(failed, 10, 4) is failed


def test_it_is_one_of_the_functions_that_the_reward_is_the_sum_of() -> None:
    functions = {"functions": [{"use": "gsm8k", "weight": 2.0}]}
    plain = Config.model_validate({"rewards": functions})
    punishing = Config.model_validate({"rewards": functions, "algorithm": {"overlong": "punish"}})
    assert weighted_functions(plain) == [("gsm8k", 2.0)]
    assert weighted_functions(punishing) == [("gsm8k", 2.0), ("overlong", 1.0)]
