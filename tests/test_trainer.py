"""The loop with every algorithm, from a broker and a generator to curves; and updates that are not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.batches import MicroBatch
from learner.critic import Critic
from learner.link import Standing
from learner.losses import LossAndSums
from learner.models import Models
from learner.policy import Loss, Policy, Update
from learner.publisher import Publisher
from learner.ranks import Ranks
from learner.recorder import SKIPPED_FILE, Recorder
from learner.skips import Skips
from learner.trained_model import OptimizerStep
from learner.value_loss import ValueLoss
from protocol.config import Config
from protocol.errors import NumericError
from protocol.weights import Snapshot
from tests.critics import critic_state
from tests.learning import model_folder
from tests.rank_worlds import EngineNearModel
from tests.small_run import FakeGenerator, broker, make_run
from tests.watched_rank import WatchedRecorder, train_models

NUM_STEPS = 2
SEVERAL_UPDATES = {"updates_per_batch": 2, "epochs_per_batch": 2}

ALGORITHMS: dict[str, dict[str, dict[str, Any]]] = {
    "grpo, decoupled": {},
    "grpo scaled by the batch, sequence weights, masked": {
        "algorithm": {"scale": "batch", "dual_clip": 3.0, **SEVERAL_UPDATES},
        "corrections": {"weight": "sequence", "bound": "mask", "low": 0.5, "negative_kl_mask": 0.1},
    },
    "dr. grpo": {"algorithm": {"scale": "none", "aggregation": "sequence_mean_token_sum_norm"}},
    "dapo": {
        "algorithm": {
            "clip_high": 0.28,
            "filter_equal_groups": True,
            "overlong": "punish",
            "overlong_buffer_tokens": 4,
            **SEVERAL_UPDATES,
        }
    },
    "overlong completions masked, bonus for entropy": {"algorithm": {"overlong": "mask", "entropy_coef": 0.01}},
    "rloo, top entropy": {"algorithm": {"advantage": "rloo", "top_entropy_frac": 0.3, "loss": "reinforce"}},
    "reinforce++, kl in the reward": {
        "algorithm": {"advantage": "reinforce_plus_plus", "gamma": 0.99},
        "kl": {"coef": 0.01, "place": "reward", "target": 0.1, "horizon": 100},
    },
    "reinforce++ with baseline, kl in the loss": {
        "algorithm": {"advantage": "reinforce_plus_plus_baseline"},
        "kl": {"coef": 0.01, "form": "k2", "with_ratio": True, "reference_update_every": 1},
    },
    "two policies": {"algorithm": {"ratio": "behavior", **SEVERAL_UPDATES}, "corrections": {"weight": "none"}},
    "gdpo": {"algorithm": {"advantage": "gdpo", "overlong": "punish", "overlong_buffer_tokens": 4}},
    "remax": {"algorithm": {"advantage": "remax"}},
    "ppo with a critic": {
        "algorithm": {"advantage": "gae", "gamma": 0.99, "lam": 0.95, **SEVERAL_UPDATES},
        "critic": {"learning_rate": 1e-2},
    },
    "ppo with a critic, groups of one, kl in the reward": {
        "algorithm": {"advantage": "gae"},
        "batch": {"prompts": 8, "group_size": 1},
        "critic": {"loss": "huber", "clip": 0.0},
        "kl": {"coef": 0.01, "place": "reward"},
    },
    "gspo": {"algorithm": {"loss": "gspo", "aggregation": "sequence_mean_token_mean", **SEVERAL_UPDATES}},
    "cispo": {"algorithm": {"loss": "cispo", **SEVERAL_UPDATES}},
    "sapo": {"algorithm": {"loss": "sapo", "aggregation": "sequence_mean_token_sum", **SEVERAL_UPDATES}},
    "dppo, total variation": {"algorithm": {"loss": "dppo_tv", "dppo_bound": 0.001}},
    "dppo, kl": {"algorithm": {"loss": "dppo_kl", "aggregation": "token_sum"}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model"), tied=True)


def trained(
    folder: Path,
    model: str,
    ranks: Ranks,
    sections: dict[str, dict[str, Any]],
    watch: Callable[[Models], Models] = lambda models: models,
) -> WatchedRecorder:
    """A short run with a real broker and generator, whose engine draws from near the model."""
    config = run_config(folder, model, sections)
    models = watch(Models.open(config, ranks))
    with broker(folder, config), FakeGenerator(folder, config, engine_type=EngineNearModel):
        ended, recorder = train_models(folder, config, models, ranks)
    assert ended.complete
    return recorder


def run_config(folder: Path, model: str, sections: dict[str, dict[str, Any]]) -> Config:
    fixed: dict[str, dict[str, Any]] = {
        "model": {"path": model, "dtype": "float32"},
        "staleness": {"max": 1},
        "sampling": {"max_tokens": 9},
        "learner": {"learning_rate": 1e-3, "micro_batch_tokens": 64, "logprob_chunk_tokens": 16},
        "run": {"steps": NUM_STEPS, "device": "cpu"},
    }
    return make_run(folder, **(fixed | sections))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains_and_has_finite_curves(name: str, model: str, ranks: Ranks, tmp_path: Path) -> None:
    sections = ALGORITHMS[name]
    recorder = trained(tmp_path / "run", model, ranks, sections)
    several = "updates_per_batch" in sections.get("algorithm", {})
    assert len(recorder.curves) == NUM_STEPS
    for curves in recorder.curves:
        assert not [curve for curve, value in curves.items() if not math.isfinite(value)]
        assert curves["policy/updates"] == (4 if several else 1)
        assert curves["policy/grad_norm"] > 0
        assert 0 < curves["mismatch/ess"] <= 1
        assert ("policy/kl_reference" in curves) == ("kl" in sections)
        assert (curves.get("critic/grad_norm", 0.0) > 0) == name.startswith("ppo with a critic")
    assert ("reward/overlong" in recorder.curves[0]) == (sections.get("algorithm", {}).get("overlong") == "punish")


class PoisonedPolicy:
    """A policy of which some updates, by their number in the run, have a loss that is not finite."""

    def __init__(self, policy: Policy, poisoned: Sequence[int]) -> None:
        self._policy, self._poisoned, self._number = policy, poisoned, 0
        self.weights: list[dict[str, torch.Tensor]] = []  # before each update

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def update(self, micro_batches: Sequence[MicroBatch], loss: Loss, learning_rate: float) -> Update:
        def infinite(logprobs: torch.Tensor, entropies: torch.Tensor, batch: MicroBatch) -> LossAndSums:
            value, sums = loss(logprobs, entropies, batch)
            return value * math.inf, sums

        self.weights.append({name: weight.clone() for name, weight in self._policy.whole_weights()})
        is_poisoned = self._number in self._poisoned
        self._number += 1
        return self._policy.update(micro_batches, infinite if is_poisoned else loss, learning_rate)


class PoisonedCritic:
    """A critic of which some updates, by their number in the run, have a loss that is not finite."""

    def __init__(self, critic: Critic, poisoned: Sequence[int]) -> None:
        self._critic, self._poisoned, self._number = critic, poisoned, 0
        self.states: list[dict[str, torch.Tensor]] = []  # before each update, and at last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._critic, name)

    def update(self, micro_batches: Sequence[MicroBatch], loss: ValueLoss, learning_rate: float) -> OptimizerStep:
        def infinite(values: torch.Tensor, batch: MicroBatch) -> LossAndSums:
            value, sums = loss(values, batch)
            return value * math.inf, sums

        self.states.append(critic_state(self._critic))
        is_poisoned = self._number in self._poisoned
        self._number += 1
        return self._critic.update(micro_batches, infinite if is_poisoned else loss, learning_rate)


def poisoned(models: Models, *numbers: int) -> tuple[Models, PoisonedPolicy]:
    policy = PoisonedPolicy(models.policy, numbers)
    return replace(models, policy=policy), policy  # type: ignore[arg-type]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_skipped_update_leaves_the_others_of_its_batch_and_is_written_down(
    model: str, ranks: Ranks, tmp_path: Path
) -> None:
    policies = []

    def watch(models: Models) -> Models:
        watched, policy = poisoned(models, 1, 2, 4)
        policies.append(policy)
        return watched

    several = {"algorithm": {"updates_per_batch": 2, "epochs_per_batch": 2}}
    recorder = trained(tmp_path / "run", model, ranks, several, watch)
    same = [
        all(torch.equal(before[name], after[name]) for name in before)
        for before, after in zip(policies[0].weights, policies[0].weights[1:], strict=False)
    ]
    assert same == [False, True, True, False, True, False, False], "a skipped update changes nothing"
    assert [curves["policy/updates"] for curves in recorder.curves] == [2, 3]
    assert [curves["policy/skipped_steps"] for curves in recorder.curves] == [2, 3]
    assert all(math.isfinite(curves["policy/loss"]) for curves in recorder.curves)
    assert recorder.curves[1]["ledger/trained"] == 8
    assert recorder.curves[1].get("ledger/failed", 0.0) == 0.0, "a batch that was trained in part is trained"
    skipped = lines(tmp_path / "run" / "skipped.jsonl")
    assert [(line["step"], line["update"]) for line in skipped] == [(0, 1), (0, 2), (1, 0)]
    trained_there = {tuple(pair) for pair in recorder.steps[0]["completions"]}
    first, second = ({tuple(pair) for pair in line["completions"]} for line in skipped[:2])
    assert first < trained_there
    assert second < trained_there
    assert len(first) == len(second) == 6


def test_a_batch_of_which_nothing_was_applied_is_a_skipped_step(model: str, ranks: Ranks, tmp_path: Path) -> None:
    recorder = trained(tmp_path / "run", model, ranks, {}, lambda models: poisoned(models, 0)[0])
    assert [curves["policy/updates"] for curves in recorder.curves] == [0, 1]
    assert recorder.curves[1]["ledger/failed/non_finite"] == 4


def test_three_skipped_updates_in_a_row_stop_the_run(model: str, ranks: Ranks, tmp_path: Path) -> None:
    several = {"algorithm": {"updates_per_batch": 2}}
    with pytest.raises(
        NumericError, match=r"3 updates in a row of the policy .* the last of step 1; its weights are unchanged since"
    ):
        trained(tmp_path / "run", model, ranks, several, lambda models: poisoned(models, 1, 2, 3)[0])
    assert len(lines(tmp_path / "run" / "skipped.jsonl")) == 3


def test_a_resumed_run_goes_on_counting_its_skipped_updates(ranks: Ranks, tmp_path: Path) -> None:
    config = make_run(tmp_path)
    skipped = [(0, "policy"), (0, "critic"), (1, "policy"), (2, "policy")]
    lines_of = [json.dumps({"step": step, "update": 0, "model": model}) + "\n" for step, model in skipped]
    (tmp_path / SKIPPED_FILE).write_text("".join(lines_of))
    nobody: Any = None
    standing = Standing(2, -1, b"")
    recorder = Recorder(config, tmp_path, ranks, nobody, nobody, nobody, config.model.path, standing)
    recorder.close()
    assert Skips(ranks, recorder).total == {"policy": 2, "critic": 1}, "step 2 is about to be run again"


def test_a_skipped_update_of_the_critic_leaves_the_policys_and_is_written_down(
    model: str, ranks: Ranks, tmp_path: Path
) -> None:
    critics = []

    def watch(models: Models) -> Models:
        assert models.critic is not None
        critics.append(PoisonedCritic(models.critic, [1]))
        return replace(models, critic=critics[0])  # type: ignore[arg-type]

    sections = {"algorithm": {"advantage": "gae", "updates_per_batch": 2}}
    recorder = trained(tmp_path / "run", model, ranks, sections, watch)
    first, second, third, _ = critics[0].states
    assert all(torch.equal(second[name], third[name]) for name in third)
    assert not all(torch.equal(first[name], second[name]) for name in first)
    assert [curves["critic/skipped_steps"] for curves in recorder.curves] == [1, 1]
    assert [curves["policy/updates"] for curves in recorder.curves] == [2, 2]
    (skipped,) = lines(tmp_path / "run" / "skipped.jsonl")
    assert (skipped["step"], skipped["update"], skipped["model"]) == (0, 1, "critic")
    assert len(skipped["completions"]) == 6


def test_three_skipped_updates_of_the_critic_in_a_row_stop_a_run_whose_policy_is_fine(
    model: str, ranks: Ranks, tmp_path: Path
) -> None:
    def watch(models: Models) -> Models:
        assert models.critic is not None
        return replace(models, critic=PoisonedCritic(models.critic, [1, 2, 3]))  # type: ignore[arg-type]

    sections = {"algorithm": {"advantage": "gae", "updates_per_batch": 2}}
    with pytest.raises(
        NumericError, match=r"of the critic .* the last of step 1; .* Lower critic.learning_rate"
    ) as end:
        trained(tmp_path / "run", model, ranks, sections, watch)
    assert end.value.exit_code == 76


def test_while_the_critic_learns_alone_every_version_is_the_same_policy(
    model: str, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[tuple[int, str]] = []
    finish = Publisher.finish

    def watched(self: Publisher) -> Snapshot:
        snapshot = finish(self)
        published.append((snapshot.version, snapshot.manifest.digest))
        return snapshot

    monkeypatch.setattr(Publisher, "finish", watched)
    sections = {
        "algorithm": {"advantage": "gae"},
        "critic": {"warmup_steps": 2, "learning_rate": 1e-2},
        "run": {"steps": 4, "device": "cpu"},
        "kl": {"coef": 0.01, "target": 0.1, "reference_update_every": 1},
    }
    recorder = trained(tmp_path / "run", model, ranks, sections)
    versions, digests = zip(*published, strict=True)
    assert versions == (0, 1, 2, 3, 4)
    assert len(set(digests[:3])) == 1
    assert len(set(digests)) == 3
    curves = recorder.curves
    assert [of_step["policy/updates"] for of_step in curves] == [0, 0, 1, 1]
    assert [of_step["policy/lr"] for of_step in curves] == [0, 0, 1e-3, 1e-3]
    assert [of_step["critic/lr"] for of_step in curves] == [1e-2] * 4
    assert all(of_step["critic/grad_norm"] > 0 and of_step["mismatch/ess"] > 0 for of_step in curves)
    assert ["policy/kl_coef" in of_step for of_step in curves] == [False, False, True, True]
    assert curves[-1]["ledger/trained"] == 16, "a batch that only the critic learned from is trained"
    assert curves[2]["critic/value_mean"] != 0
