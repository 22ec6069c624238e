"""Short runs of every algorithm on the easy task, and what their curves must show; one line of `CASES` is one run.

Together they take every value that `algorithm`, `kl` and `corrections` know: `test_algorithm_runs.py` looks.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any, Literal, NamedTuple

import pytest

from launch.flags import parse
from protocol.config import Config
from protocol.settings import build
from tests.cluster_process import flags, ledger_of
from tests.easy_task import MAX_TOKENS

NUM_STEPS = 14

Flags = dict[str, str | int | float]


class Run(NamedTuple):
    """A run that is over."""

    config: Config
    steps: list[dict[str, Any]]  # lines of metrics.jsonl

    def curve(self, name: str) -> list[float]:
        return [row[name] for row in self.steps]

    def mean(self, name: str) -> float:
        return fmean(self.curve(name))


class Case(NamedTuple):
    """Settings of a run, and what its curves must show beside a reward that rises."""

    settings: Flags
    shows: Callable[[Run], bool]
    engine: Literal["vllm", "transformers"] = "transformers"

    @property
    def flags(self) -> list[str]:
        """The command's."""
        wanted: Flags = {
            "reward": "reward.py:odd",
            "generators.engine": self.engine,
            "steps": NUM_STEPS,
            "sampling.max_tokens": MAX_TOKENS,
            "learner.learning_rate": 0.005,
            "checkpoint.every": 0,
        }
        return flags(**(wanted | self.settings))

    @property
    def config(self) -> Config:
        """What the command makes of them."""
        return build(parse(self.flags).values).config


def clips(run: Run) -> bool:
    return run.mean("policy/clip_frac_low") + run.mean("policy/clip_frac_high") > 0


def grpo(run: Run) -> bool:
    """Nothing is asked for: one pass, no reference, weights cut off at 2 and nowhere 0."""
    one_pass = not clips(run) and set(run.curve("policy/ratio_mean")) == {1.0}
    return one_pass and run.mean("staleness/mean") > 0.5 and run.mean("mismatch/rejected_frac") == 0


def ppo(run: Run) -> bool:
    """The critic learns by itself first, and comes to know what a state is worth."""
    loss, warmup = run.curve("critic/loss"), run.config.critic.warmup_steps
    alone = run.curve("policy/updates")[:warmup] == [0] * warmup and run.curve("critic/lr")[0] > 0
    knows = fmean(loss[-3:]) < 0.2 * loss[0] and run.curve("critic/explained_variance")[0] == 0
    return alone and knows and run.mean("critic/clip_frac") > 0


def lora(run: Run) -> bool:
    """Versions are smaller than the base; the reference is the base, and the policy leaves it."""
    distances = run.curve("policy/kl_reference")
    return abs(distances[0]) < 1e-6 < distances[-1] and run.curve("weights/bytes")[-1] < 50_000


def dapo(run: Run) -> bool:
    punished = run.curve("reward/overlong")
    return clips(run) and min(punished) < -0.2 and run.curve("reward/mean")[0] < run.curve("reward/reward:odd")[0]


def dr_grpo(run: Run) -> bool:
    coefficients = run.curve("policy/kl_coef")
    return clips(run) and run.mean("policy/clip_frac_dual") > 0 and coefficients[-1] > coefficients[0] == 0.002


def rloo(run: Run) -> bool:
    ledger = ledger_of(run.steps[-1])
    reasons = ledger["filtered"] == run.steps[-1]["ledger/filtered/equal_rewards"] > 0
    whole = run.mean("reward/equal_group_frac") == 0
    return reasons and whole and run.mean("mismatch/outside_frac") > 0 == run.mean("mismatch/rejected_frac")


def reinforce_plus_plus(run: Run) -> bool:
    return run.curve("policy/kl_coef")[-1] != 0.02


def reinforce_plus_plus_baseline(run: Run) -> bool:
    """After every fourth step the reference comes half as near."""
    distances = run.curve("policy/kl_reference")
    return all(distances[step] < 0.7 * distances[step - 1] for step in (4, 8, 12))


def gspo(run: Run) -> bool:
    return clips(run) and run.mean("mismatch/rejected_frac") > 0


def cispo(run: Run) -> bool:
    parts = zip(run.curve("reward/reward:odd"), run.curve("reward/reward:low"), run.curve("reward/mean"), strict=True)
    weighed = all(odd + 0.5 * low == pytest.approx(mean, abs=1e-5) for odd, low, mean in parts)
    masked = run.mean("completion/truncated_frac") > 0 < run.mean("mismatch/rejected_frac")
    return weighed and clips(run) and masked


def dppo_tv(run: Run) -> bool:
    return clips(run) and run.mean("policy/clip_frac_dual") == 0


def dppo_kl(run: Run) -> bool:
    return clips(run) and run.mean("mismatch/negative_masked_frac") > 0


TWO_REWARDS = "[{use: 'reward.py:odd'}, {use: 'reward.py:low', weight: 0.5}]"
CASES = {
    "grpo": Case({}, grpo, engine="vllm"),
    "ppo": Case(
        {
            "prompts-per-step": 16,
            "group-size": 1,
            "algorithm.advantage": "gae",
            "algorithm.lam": 0.95,
            "algorithm.updates_per_batch": 2,
            "critic.path": "model",
            "critic.learning_rate": 0.005,
            "critic.clip": 0.1,
            "critic.loss": "huber",
            "critic.warmup_steps": 2,
        },
        ppo,
        engine="vllm",
    ),
    "lora": Case(
        {
            "lora.rank": 4,
            "lora.alpha": 16,
            "lora.targets": "q_proj,v_proj,gate_proj,up_proj,down_proj",
            "lora.dropout": 0.05,
            "learner.learning_rate": 0.03,
            "kl.coef": 0.001,
        },
        lora,
        engine="vllm",
    ),
    "dapo": Case(
        {
            "algorithm.clip_high": 0.28,
            "algorithm.updates_per_batch": 2,
            "algorithm.overlong": "punish",
            "algorithm.overlong_buffer_tokens": 4,
            "kl.coef": 0.01,
            "kl.form": "k2",
        },
        dapo,
    ),
    "dr_grpo": Case(
        {
            "algorithm.scale": "none",
            "algorithm.aggregation": "sequence_mean_token_sum_norm",
            "algorithm.aggregation_length": 8,
            "algorithm.clip_low": 0.1,
            "algorithm.dual_clip": 1.2,
            "algorithm.ratio": "behavior",
            "corrections.weight": "none",
            "algorithm.updates_per_batch": 2,
            "algorithm.epochs_per_batch": 2,
            "kl.coef": 0.002,
            "kl.target": 0.002,
            "kl.horizon": 64,
        },
        dr_grpo,
    ),
    "rloo": Case(
        {
            "prompts-per-step": 8,
            "group-size": 2,
            "algorithm.advantage": "rloo",
            "algorithm.loss": "reinforce",
            "algorithm.aggregation": "sequence_mean_token_sum",
            "algorithm.filter_equal_groups": "true",
            "corrections.weight": "sequence",
            "corrections.low": 0.5,
            "corrections.high": 1.5,
            "kl.coef": 0.01,
            "kl.form": "k1",
            "kl.straight_through": "true",
        },
        rloo,
    ),
    "reinforce_plus_plus": Case(
        {
            "algorithm.advantage": "reinforce_plus_plus",
            "algorithm.gamma": 0.97,
            "algorithm.top_entropy_frac": 0.7,
            "kl.coef": 0.02,
            "kl.place": "reward",
            "kl.target": 0.002,
            "kl.horizon": 64,
        },
        reinforce_plus_plus,
    ),
    "reinforce_plus_plus_baseline": Case(
        {
            "algorithm.advantage": "reinforce_plus_plus_baseline",
            "algorithm.loss": "sapo",
            "algorithm.sapo_tau_positive": 1.5,
            "algorithm.sapo_tau_negative": 2.0,
            "algorithm.entropy_coef": 0.003,
            "kl.coef": 0.01,
            "kl.form": "k2",
            "kl.straight_through": "true",
            "kl.reference_update_every": 4,
            "kl.reference_update_rate": 0.5,
        },
        reinforce_plus_plus_baseline,
    ),
    "gspo": Case(
        {
            "algorithm.loss": "gspo",
            "algorithm.scale": "batch",
            "algorithm.aggregation": "sequence_mean_token_mean",
            "algorithm.clip_low": 0.01,
            "algorithm.clip_high": 0.01,
            "algorithm.updates_per_batch": 2,
            "corrections.weight": "sequence",
            "corrections.sequence_ratio": "geometric_mean",
            "corrections.bound": "mask",
            "corrections.high": 1.1,
            "kl.coef": 0.01,
            "kl.form": "abs",
        },
        gspo,
    ),
    "cispo": Case(
        {
            "rewards.functions": TWO_REWARDS,
            "algorithm.advantage": "gdpo",
            "algorithm.loss": "cispo",
            "algorithm.overlong": "mask",
            "algorithm.updates_per_batch": 2,
            "corrections.bound": "mask",
            "corrections.low": 0.5,
            "corrections.high": 1.8,
            "kl.coef": 0.01,
            "kl.straight_through": "true",
            "kl.with_ratio": "true",
        },
        cispo,
    ),
    "dppo_tv": Case(
        {
            "algorithm.advantage": "remax",
            "algorithm.loss": "dppo_tv",
            "algorithm.aggregation": "token_sum",
            "algorithm.dppo_bound": 0.1,
            "algorithm.updates_per_batch": 2,
            "kl.coef": 0.01,
            "kl.form": "abs",
            "kl.straight_through": "true",
        },
        dppo_tv,
    ),
    "dppo_kl": Case(
        {
            "algorithm.loss": "dppo_kl",
            "algorithm.dppo_bound": 0.02,
            "corrections.weight": "none",
            "corrections.negative_kl_mask": 0.05,
            "kl.coef": 0.01,
            "kl.form": "k1",
        },
        dppo_kl,
    ),
}
