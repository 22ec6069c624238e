"""From a completion's tokens to its reward: what the functions see, and how they are added up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from actors.rollout import Episode
from actors.scorer import Score, Scorer
from protocol.sections import RewardsConfig
from protocol.types import Completion, FinishReason, Prompt, VersionSpan
from tests.small_run import make_run

CODE = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "words": len(solution_str.split()), "pred": solution_str}

def silent(completions, **columns):
    return [None for _ in completions]
"""


def score(folder: Path, *functions: dict[str, object], answer: str = "w3 w4") -> Score:
    """Of a completion of two tokens, where eight are allowed."""
    model = Path(make_run(folder).model.path)
    (folder / "mine.py").write_text(CODE)
    named = [function | {"use": str(function["use"]).replace("mine", str(folder / "mine"))} for function in functions]
    settings = RewardsConfig.model_validate({"functions": named})
    tokens = np.array([3, 4], np.int32)
    completion = Completion(tokens, np.zeros(2, np.float32), (VersionSpan(0, 0, 2),), FinishReason.STOP)

    async def run() -> Score:
        scorer = Scorer(settings, model, max_tokens=8)
        try:
            await scorer.start()
            return await scorer.score(Prompt(0, 0, tokens, {"answer": answer}), Episode(completion))
        finally:
            await scorer.close()

    return asyncio.run(run())


def test_a_reward_is_the_weighted_sum_of_those_that_have_an_opinion(tmp_path: Path) -> None:
    made = score(
        tmp_path / "run",
        {"use": "mine.py:compute_score", "weight": 2.0},
        {"use": "mine.py:silent", "weight": 100.0},
        {"use": "length", "weight": -0.25, "args": {"characters": 4}},
    )
    assert made.error == ""
    assert made.rewards == {"mine:compute_score": 1.0, "mine:silent": None, "length": 1.0}
    assert made.reward == 1.75
    assert made.metrics == {"mine:compute_score/words": 2.0}


def test_without_any_opinion_there_is_an_error_and_no_zero(tmp_path: Path) -> None:
    made = score(tmp_path / "run", {"use": "mine.py:silent"}, {"use": "math_accuracy"}, answer="a lot")
    assert made.error == "no reward function has an opinion"
