"""From a completion's tokens to its reward: what the functions see, and how they are added up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from actors.rollout import Episode
from actors.scorer import Score, Scorer
from protocol.config import Config
from protocol.rewards import with_files
from protocol.types import Completion, FinishReason, Prompt, VersionSpan
from tests.small_run import make_run

CODE = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "words": len(solution_str.split()), "pred": solution_str}

def version(completions, trainer_state):
    return [trainer_state.global_step]

def silent(completions, **columns):
    return [None for _ in completions]
"""


def score(folder: Path, *functions: dict[str, object], answer: str = "w3 w4") -> Score:
    """Of a completion of two tokens, where eight are allowed."""
    model = Path(make_run(folder).model.path)
    (folder / "mine.py").write_text(CODE)
    named = [function | {"use": str(function["use"]).replace("mine", str(folder / "mine"))} for function in functions]
    config = Config.model_validate({"rewards": {"functions": named}, "sampling": {"max_tokens": 8}})
    tokens = np.array([3, 4], np.int32)
    completion = Completion(
        tokens, np.zeros(2, np.float32), (VersionSpan(2, 0, 1), VersionSpan(3, 1, 2)), FinishReason.STOP
    )

    async def run() -> Score:
        scorer = Scorer(config, config.rewards, model)
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


def test_functions_of_evaluations_are_called_there_alone_and_are_no_part_of_the_sum(tmp_path: Path) -> None:
    model = Path(make_run(tmp_path / "run").model.path)
    (tmp_path / "mine.py").write_text(CODE + "\ndef bonus(completion, answer):\n    return 5.0\n")
    mine = str(tmp_path / "mine.py")
    trained = [{"use": f"{mine}:{name}", "weight": 2.0} for name in ("compute_score", "silent")]
    beside = [{"use": f"{mine}:bonus"}, {"use": "gsm8k_flexible"}]
    config = Config.model_validate({"rewards": {"functions": trained}, "evaluation": {"rewards": beside}})
    tokens = np.array([3, 4], np.int32)
    completion = Completion(tokens, np.zeros(2, np.float32), (VersionSpan(0, 0, 2),), FinishReason.STOP)
    prompt = Prompt(0, 0, tokens, {"answer": "w3 w4"})

    async def run() -> list[Score]:
        scorer = Scorer(config, config.all_rewards, model)
        try:
            await scorer.start()
            return [await scorer.score(prompt, Episode(completion), evaluating=held_out) for held_out in (False, True)]
        finally:
            await scorer.close()

    scored, evaluated = asyncio.run(run())
    assert scored.rewards == {"mine:compute_score": 1.0, "mine:silent": None}
    assert evaluated.rewards == scored.rewards | {"mine:bonus": 5.0, "gsm8k_flexible": 0.0}
    assert scored.reward == evaluated.reward == 2.0
    assert scored.answers == {}, "nobody votes on what is trained"
    assert evaluated.answers == {"mine:compute_score": "w3 w4", "gsm8k_flexible": "4"}


def test_results_have_the_runs_names_where_this_host_has_the_code_under_another(tmp_path: Path) -> None:
    model = Path(make_run(tmp_path / "run").model.path)
    (tmp_path / "here.py").write_text(CODE)
    config = Config.model_validate({"rewards": {"functions": [{"use": "/theirs/mine.py:compute_score"}]}})
    tokens = np.array([3, 4], np.int32)
    completion = Completion(tokens, np.zeros(2, np.float32), (VersionSpan(0, 0, 2),), FinishReason.STOP)

    async def run() -> Score:
        scorer = Scorer(config, with_files(config.rewards, [f"{tmp_path / 'here.py'}:compute_score"]), model)
        try:
            await scorer.start()
            return await scorer.score(Prompt(0, 0, tokens, {"answer": "w3 w4"}), Episode(completion), evaluating=True)
        finally:
            await scorer.close()

    made = asyncio.run(run())
    assert (made.rewards, made.metrics) == ({"mine:compute_score": 1.0}, {"mine:compute_score/words": 2.0})
    assert set(made.answers) == {"mine:compute_score"}


def test_the_step_that_a_function_of_trl_sees_is_the_version_that_wrote_the_end(tmp_path: Path) -> None:
    assert score(tmp_path / "run", {"use": "mine.py:version"}).rewards == {"mine:version": 3.0}
