"""Finished evaluations as the learner writes them down: one line of evaluations.jsonl each, and curves.

Runs in learner rank 0. Imports no torch: the process that only shows a model to be evaluated uses it too.
"""

from __future__ import annotations

import logging

from protocol.messages import Evaluation

log = logging.getLogger("tether.evaluations")

EVALUATIONS_FILE = "evaluations.jsonl"


def evaluation_curves(evaluation: Evaluation) -> dict[str, float]:
    """All curves begin with eval/. Of all sources: FUNCTION/METRIC; of each: SOURCE/FUNCTION/METRIC."""
    num_completions = evaluation.num_prompts * evaluation.samples_per_prompt
    curves = {
        "accuracy": float("nan") if evaluation.accuracy is None else evaluation.accuracy,
        "length_mean": evaluation.length_mean,
        "error_frac": evaluation.errors / max(num_completions, 1),
        **evaluation.rewards,
    }
    for row in evaluation.scores:
        place = "/".join(filter(None, (row["source"], row["function"])))
        curves |= {f"{place}/{name}": value for name, value in row["metrics"].items()}
    return {f"eval/{name}": value for name, value in curves.items()}


def log_evaluation(evaluation: Evaluation) -> None:
    accuracy = "none" if evaluation.accuracy is None else f"{evaluation.accuracy:.3f}"
    log.info(
        "evaluation of version %d: accuracy %s of %d prompts, %d completions failed",
        evaluation.version,
        accuracy,
        evaluation.num_prompts,
        evaluation.errors,
    )
