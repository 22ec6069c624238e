"""What the broker says of a finished evaluation: its numbers for the learner's curves, its completions for people.

The completions of some prompts lie in evaluations/version_<n>.jsonl of the run's folder, in the form of samples/, so
that `tools/samples.py` shows both; failed ones say why.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from broker.evaluation import EvaluationResult
from broker.metrics import reward_means
from broker.run_state import RunState
from broker.scores import ALL, score_table
from protocol.messages import Evaluation
from protocol.reward_model import REWARD_MODEL
from protocol.rewards import names_in_evaluation
from protocol.types import Trajectory

log = logging.getLogger("tether.broker")

NUM_SAMPLES = 8  # answers of an evaluation that go to the learner as text
FOLDER, PREFIX = "evaluations", "version_"


def evaluation_summary(run: RunState, result: EvaluationResult, now: float) -> dict[str, Any]:
    """What the learner logs of an evaluation (`Evaluation`)."""
    k = run.config.evaluation.samples
    groups = [(run.source.evaluation_sources[found[0].prompt], found) for found in result.by_prompt]
    functions = names_in_evaluation(run.config)
    table = score_table(groups, functions)
    answered = [trajectory for trajectory in result.trajectories if trajectory.completion is not None]
    lengths = [len(trajectory.completion.tokens) for trajectory in answered if trajectory.completion is not None]
    firsts = [trajectory for trajectory in answered if trajectory.sample == 0]
    summary = Evaluation(
        version=result.version,
        num_prompts=len(groups),
        samples_per_prompt=k,
        accuracy=accuracy(table, functions[0], k),
        rewards={name.removeprefix("reward/"): value for name, value in reward_means(answered).items()},
        scores=table,
        length_mean=float(np.mean(lengths)) if lengths else 0.0,
        errors=len(result.trajectories) - len(answered),
        duration_s=now - run.evaluation_started_at,
        samples=[_as_text(run, trajectory) for trajectory in firsts[:NUM_SAMPLES]],
    )
    return summary.model_dump()


def accuracy(table: Sequence[Mapping[str, Any]], function: str, k: int) -> float | None:
    """mean@k of a function over all sources; None if nothing was scored, or by a reward model, which knows no right."""
    decides = next(row for row in table if (row["source"], row["function"]) == (ALL, function))
    value: float | None = decides["metrics"].get(f"mean@{k}")
    return None if function == REWARD_MODEL else value


def write_completions(run: RunState, result: EvaluationResult) -> None:
    """Those of the first prompts, which are spread over the sources; an evaluation that is made again replaces it.

    A disk that is full costs the texts, and not the run.
    """
    wanted = run.config.evaluation.prompts_written
    if not wanted:
        return
    lines = [_line(run, result.version, one, found) for found in result.by_prompt[:wanted] for one in found]
    path = run.run_dir / FOLDER / f"{PREFIX}{result.version:06}.jsonl"
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        aside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        log.error("the completions of the evaluation of version %d are not in %s: %s", result.version, path, error)


def _line(run: RunState, version: int, one: Trajectory, group: Sequence[Trajectory]) -> dict[str, Any]:
    prompt, completion = run.source.evaluation[one.prompt], one.completion
    fields = {
        "step": version,
        "prompt_number": one.prompt,
        "source": run.source.evaluation_sources[one.prompt],
        "sample": one.sample,
        "prompt": run.source.decode(prompt.tokens, skip_special_tokens=False),
        "reference": prompt.columns.get("answer"),
        "group_rewards": [other.reward for other in group if not other.error],
        "prompt_tokens": len(prompt.tokens),
    }
    if completion is None:
        return fields | {"error": one.error}
    return fields | {
        "completion": run.source.decode(completion.tokens, skip_special_tokens=False),
        "reward": one.reward,
        "rewards": dict(one.rewards),
        "answers": dict(one.answers),
        "completion_tokens": len(completion.tokens),
        "observed_tokens": 0 if completion.observed is None else int(completion.observed.sum()),
        "finish_reason": completion.finish_reason.value,
        "versions": [list(span) for span in completion.spans],
    }


def _as_text(run: RunState, trajectory: Trajectory) -> dict[str, Any]:
    assert trajectory.completion is not None
    prompt = run.source.evaluation[trajectory.prompt]
    return {
        "prompt": run.source.decode(prompt.tokens)[-2000:],
        "completion": run.source.decode(trajectory.completion.tokens)[:4000],
        "answer": str(prompt.columns.get("answer", ""))[:2000],
        "reward": trajectory.reward,
    }
