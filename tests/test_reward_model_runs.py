"""A run whose reward is a function's and a model's, with real processes: both reach curves, samples and the sum."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.errors import Exit
from tests.cluster_process import ClusterProcess, flags, lines_of, samples_of, steps_of
from tests.easy_task import MAX_TOKENS, make_easy_task
from tests.reward_models import make_reward_model, plain_score

NUM_STEPS = 2
WEIGHT = 0.5
SPECIAL = ("<unk>", "<eos>")
"""Tokens that rewards do not see."""

pytestmark = pytest.mark.timeout(240)


def test_a_reward_model_is_one_more_column(tmp_path: Path) -> None:
    task = make_easy_task(tmp_path)
    model = make_reward_model(task / "judge")
    wanted: dict[str, str | int | float] = {
        "reward": "reward.py:odd",
        "reward-model": f"judge:{WEIGHT}",
        "rewards.model.batch_size": 4,
        "data.system": "Write words.",
        "data.suffix": "!",
        "sampling.max_tokens": MAX_TOKENS,
        "data.shuffle": "false",
        "run.samples_per_step": 16,
        "run.steps": NUM_STEPS,
        "run-name": "judged",
    }
    with ClusterProcess(task, *flags(**wanted)) as cluster:
        assert cluster.end() == Exit.DONE, cluster.said
    run_dir = task / "runs" / "judged"
    steps, samples = steps_of(run_dir), samples_of(run_dir)
    assert len(steps) == NUM_STEPS
    for row in steps:
        mean = row["reward/reward:odd"] + WEIGHT * row["reward/reward_model"]
        assert row["reward/mean"] == pytest.approx(mean, abs=1e-4)
    assert len(samples) == NUM_STEPS * 16
    rows = lines_of(task / "data" / "train.jsonl")
    for sample in samples[:4]:
        question = rows[sample["prompt_number"]]["question"]
        messages = [{"role": "system", "content": "Write words."}, {"role": "user", "content": f"{question}!"}]
        written = " ".join(word for word in sample["completion"].split() if word not in SPECIAL)
        assert sample["rewards"]["reward_model"] == pytest.approx(plain_score(model, messages, written), abs=1e-5)
