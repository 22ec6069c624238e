"""The critic: whose value a token has, what it learns from it, and that nothing of it gets lost."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from learner.batches import MicroBatch, pack, spread
from learner.critic import Critic
from learner.losses import LossAndSums
from learner.models import Models
from learner.ranks import Ranks
from protocol.checkpoints import latest_valid
from protocol.errors import ConfigError
from tests.critics import (
    critic_config,
    critic_gradient,
    critic_state,
    critic_step,
    give_head,
    open_critic,
    padded_value_gradient,
    slow_values,
    valued_rows,
)
from tests.learning import (
    BUDGETS,
    assert_trained_alike,
    largest_relative_difference,
    model_folder,
    train_step,
    weights,
)
from tests.rows import random_rows

STAGES = [0, 1, 2, 3]
ROWS = valued_rows()
SAME = 1e-5  # relative, in float32


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model"), tied=request.param)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("tied"))


@pytest.mark.parametrize("zero", [0, 3])
def test_a_tokens_value_is_that_of_the_state_before_it(tied: str, ranks: Ranks, zero: int) -> None:
    critic, every = open_critic(tied, ranks, zero), slow_values(tied, ROWS)
    for budget in BUDGETS:
        batches = pack(ROWS, budget)
        columns = spread(ROWS, batches, [values.numpy() for values in critic.values(batches)])
        for row, column, wanted in zip(ROWS, columns, every, strict=True):
            torch.testing.assert_close(torch.from_numpy(column[row.kept]), wanted, atol=1e-5, rtol=0)
    assert any(len(row.kept) < len(row.completion_tokens) for row in ROWS), "no hole was passed over"


def test_the_first_values_are_zero_and_the_backbone_waits_for_the_head(tied: str, ranks: Ranks) -> None:
    critic = Critic.open(critic_config(tied), ranks)
    (values,) = critic.values(pack(ROWS, 100_000))
    assert values.dtype == torch.float32
    assert not values.any()
    assert not values.requires_grad
    found, _ = critic_gradient(critic, ranks, ROWS, 64)
    assert {name for name, gradient in found.items() if gradient.any()} == {"score.weight", "score.bias"}


@pytest.mark.parametrize("zero", STAGES)
def test_loss_and_gradient_are_those_of_a_padded_batch(model: str, ranks: Ranks, zero: int) -> None:
    loss, wanted, clipped = padded_value_gradient(model, ROWS)
    assert 0.1 < clipped < 0.9
    critic = open_critic(model, ranks, zero, clip_grad=0.0)
    for budget in BUDGETS:
        found, step = critic_gradient(critic, ranks, ROWS, budget)
        assert step.sums["loss"] == pytest.approx(loss, rel=SAME)
        assert step.sums["clipped"] / step.sums["tokens"] == pytest.approx(clipped, rel=1e-6)
        assert largest_relative_difference(found, wanted) < SAME


def test_gradient_checkpointing_changes_no_number(tied: str, ranks: Ranks) -> None:
    plain, saving = open_critic(tied, ranks), open_critic(tied, ranks, gradient_checkpointing=True)
    for critic in (plain, saving):
        critic_step(critic, ranks, ROWS)
    ours, theirs = critic_state(plain), critic_state(saving)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["infinite loss", "nan gradient"])
@pytest.mark.parametrize("zero", STAGES)
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_is_fine(
    tied: str, ranks: Ranks, zero: int, kind: str
) -> None:
    critic = open_critic(tied, ranks, zero)
    critic_step(critic, ranks, ROWS)
    before = critic_state(critic)

    def loss(values: torch.Tensor, batch: MicroBatch) -> LossAndSums:
        bad = math.inf if kind == "infinite loss" else (values - values.detach()).abs().sqrt().sum()
        return values.sum() * 0.01 + bad, {}

    step = critic.update(pack(ROWS, 64), loss, 1e-3)
    assert not step.applied
    after = critic_state(critic)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert critic_step(critic, ranks, ROWS).applied
    assert critic.num_applied == 2
    moved = critic_state(critic)
    assert not all(torch.equal(before[name], moved[name]) for name in before)


def learned(models: Models, ranks: Ranks, seeds: range) -> None:
    """Steps of both models, one after the other as in a run."""
    assert models.critic is not None
    for seed in seeds:
        models.critic.values(pack(ROWS, 64))
        critic_step(models.critic, ranks, ROWS[seed % 3 :])
        train_step(models.policy, ranks, random_rows(seed, 6))


@pytest.mark.parametrize("zero", STAGES)
def test_a_resumed_critic_goes_on_bit_for_bit(tied: str, ranks: Ranks, tmp_path: Path, zero: int) -> None:
    config = critic_config(tied, zero)
    models, resumed = Models.open(config, ranks), Models.open(config, ranks)
    learned(models, ranks, range(3))
    path = models.save(tmp_path, 3, {"version": 3}, 1, ranks)
    assert latest_valid(tmp_path).path == path
    assert resumed.load(path)["version"] == 3
    assert models.critic is not None
    assert resumed.critic is not None
    saved, loaded = critic_state(models.critic), critic_state(resumed.critic)
    assert len(saved) == 3 * len(models.critic.layout())
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    for each in (models, resumed):
        learned(each, ranks, range(3, 5))
    ours, theirs = critic_state(models.critic), critic_state(resumed.critic)
    if zero == 3:  # never bit-equal even to itself
        keys = [name for name in ours if name.startswith("fp32/")]
        assert_trained_alike({name: ours[name] for name in keys}, {name: theirs[name] for name in keys})
    else:
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert resumed.critic.num_applied == models.critic.num_applied == 5


@pytest.mark.parametrize(("saved", "loaded"), [(0, 3), (3, 1)])
def test_a_checkpoint_loads_at_another_stage_without_a_difference(
    tied: str, ranks: Ranks, tmp_path: Path, saved: int, loaded: int
) -> None:
    models = Models.open(critic_config(tied, saved), ranks)
    learned(models, ranks, range(2))
    other = Models.open(critic_config(tied, loaded), ranks)
    other.load(models.save(tmp_path, 2, {}, 1, ranks))
    assert models.critic is not None
    assert other.critic is not None
    ours, theirs = critic_state(models.critic), critic_state(other.critic)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("zero", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "float32")])
def test_it_starts_from_the_supervised_warm_start(ranks: Ranks, tmp_path: Path, zero: int, dtype: str) -> None:
    model = model_folder(tmp_path / "untied", tied=False)
    config = critic_config(model, zero, dtype=dtype)
    models = Models.open(config, ranks)
    assert models.critic is not None
    give_head(models.critic)
    train_step(models.policy, ranks, random_rows(1, 8), learning_rate=1e-2)
    models.policy.save_pretrained(tmp_path / "hf")
    models.warmed_up(models.policy, config)
    of_policy = {name: weight.float() for name, weight in models.policy.whole_weights()}
    of_critic = {name: state["fp32"] for name, state in models.critic.training_state()}
    assert of_critic.keys() - {"score.weight", "score.bias"} == of_policy.keys() - {"lm_head.weight"}
    batches = pack(ROWS, 100_000)
    (values,) = models.critic.values(batches)
    wanted = slow_values(str(tmp_path / "hf"), [ROWS[index] for index in batches[0].rows])
    before = slow_values(model, [ROWS[index] for index in batches[0].rows])
    assert (torch.cat(before) - torch.cat(wanted)).abs().mean() > 0.1
    assert (values - torch.cat(wanted)).abs().mean() < (1e-5 if dtype == "float32" else 0.05)
    critic_step(models.critic, ranks, ROWS)
    assert models.critic.num_applied == 1


def test_one_with_a_model_of_its_own_starts_from_that(tied: str, ranks: Ranks, tmp_path: Path) -> None:
    own = model_folder(tmp_path / "own", tied=False, seed=1)
    config = critic_config(tied, critic={"path": own})
    models = Models.open(config, ranks)
    train_step(models.policy, ranks, random_rows(1, 8))
    models.warmed_up(models.policy, config)
    assert models.critic is not None
    wanted = AutoModel.from_pretrained(own, dtype=torch.float32).state_dict()
    found = {name: state["fp32"] for name, state in models.critic.training_state()}
    assert found.keys() == {f"model.{name}" for name in wanted} | {"score.weight", "score.bias"}
    assert all(torch.equal(found[f"model.{name}"], value) for name, value in wanted.items())


def test_a_folder_without_a_model_is_an_error_that_names_the_critics_setting(
    tied: str, ranks: Ranks, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no causal language model can be loaded from .*set critic.path"):
        Critic.open(critic_config(tied, critic={"path": str(tmp_path)}), ranks)


def test_a_critic_and_its_policy_do_not_disturb_each_other(tied: str, ranks: Ranks) -> None:
    config = critic_config(tied)
    models, alone = Models.open(config, ranks), Models.open(config, ranks)
    learned(models, ranks, range(2))
    for seed in range(2):
        train_step(alone.policy, ranks, random_rows(seed, 6))
    ours, theirs = weights(models.policy), weights(alone.policy)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    lm: Any = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    assert not any(torch.equal(ours[name], value) for name, value in lm.named_parameters()), "nothing was trained"


def test_values_that_are_not_finite_reach_the_loss(tied: str, ranks: Ranks) -> None:
    """So a critic that broke skips updates, of which there is a count, and no token learns from it."""
    rows = [replace(row, values=None) for row in ROWS]
    assert not critic_step(open_critic(tied, ranks), ranks, rows).applied


def test_without_gae_there_is_none(tied: str, ranks: Ranks) -> None:
    config = critic_config(tied)
    plain = config.model_copy(update={"algorithm": config.algorithm.model_copy(update={"advantage": "grpo"})})
    models = Models.open(plain, ranks)
    assert models.critic is None
    assert "critic" not in models.beside
