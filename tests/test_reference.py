"""The reference model stays where it is, follows where it is told to, and comes back from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.batches import pack
from learner.models import Models
from learner.ranks import Ranks
from learner.reference import Reference, rounded_by_chance
from protocol.checkpoints import latest_valid
from protocol.config import Config
from protocol.errors import ConfigError
from tests.learning import config, model_folder, train_step
from tests.rows import random_rows

STAGES = [0, 1, 3]
BATCHES = pack(random_rows(3, 8), 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model"), tied=True)


def settings(model: str, zero: int, dtype: str = "float32", **sections: dict[str, Any]) -> Config:
    base = config(zero, dtype=dtype, temperature=0.8).model_dump()
    base["model"]["path"] = model
    for name, values in ({"kl": {"coef": 0.1, "reference_update_every": 1}} | sections).items():
        base[name] = base[name] | values
    return Config.model_validate(base)


def opened(model: str, ranks: Ranks, zero: int, **changes: Any) -> tuple[Models, Reference]:
    models = Models.open(settings(model, zero, **changes), ranks)
    assert models.reference is not None
    return models, models.reference


def weights_of(reference: Reference) -> dict[str, torch.Tensor]:
    return {name: state["fp32"].clone() for name, state in reference.training_state()}


@pytest.mark.parametrize("zero", STAGES)
def test_it_is_the_model_that_training_starts_from_and_training_leaves_it_alone(
    model: str, ranks: Ranks, zero: int
) -> None:
    models, reference = opened(model, ranks, zero)
    before = models.policy.logprobs(BATCHES)
    for of_policy, of_reference in zip(before, reference.logprobs(BATCHES), strict=True):
        torch.testing.assert_close(of_reference, of_policy, atol=1e-6, rtol=0)
        assert not of_reference.requires_grad
    train_step(models.policy, ranks, random_rows(1, 8))
    for first, again in zip(before, reference.logprobs(BATCHES), strict=True):
        torch.testing.assert_close(again, first, atol=1e-6, rtol=0)
    lm = dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters())
    assert all(torch.equal(value, lm[name]) for name, value in weights_of(reference).items())


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_it_follows_the_policy_by_the_rate_and_computes_with_what_it_became(
    model: str, ranks: Ranks, zero: int, rate: float
) -> None:
    models, reference = opened(model, ranks, zero)
    old = weights_of(reference)
    reference.logprobs(BATCHES)
    train_step(models.policy, ranks, random_rows(1, 8), learning_rate=1e-2)
    reference.follow(models.policy, rate)
    new, policy = weights_of(reference), {name: w.clone() for name, w in models.policy.whole_weights()}
    for name, value in new.items():
        assert (policy[name] - old[name]).abs().max() > 1e-3
        torch.testing.assert_close(value, rate * policy[name] + (1.0 - rate) * old[name], atol=1e-6, rtol=0)
    if rate == 1.0:
        for ours, theirs in zip(reference.logprobs(BATCHES), models.policy.logprobs(BATCHES), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_in_bfloat16_it_moves_by_chance_and_in_the_mean_by_the_rate() -> None:
    """Between the neighbours 1 and 1 + 2^-7 the nearest number would be the same one for ever."""
    step, chance = 2.0**-7, torch.Generator().manual_seed(3)
    for share in (0.1, 0.5, 0.9):
        for sign in (1.0, -1.0):
            rounded = rounded_by_chance(torch.full((20_000,), sign * (1.0 + share * step)), chance)
            assert rounded.dtype == torch.bfloat16
            assert set(rounded.tolist()) == {sign, sign * (1.0 + step)}
            assert (rounded.float().abs().mean().item() - 1.0) / step == pytest.approx(share, abs=0.02)
    exact = torch.randn(1000, generator=chance).bfloat16()
    assert torch.equal(rounded_by_chance(exact.float(), chance), exact)


def test_all_ranks_round_alike(model: str, ranks: Ranks) -> None:
    moved = []
    for seed in (1, 1, 2):
        models = Models.open(settings(model, 0, dtype="bfloat16"), ranks)
        assert models.reference is not None
        train_step(models.policy, ranks, random_rows(1, 8), learning_rate=1e-2)
        models.reference.follow(models.policy, 0.3, seed)
        moved.append(torch.cat([value.flatten() for value in weights_of(models.reference).values()]))
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])


@pytest.mark.parametrize(("saved", "loaded", "dtype"), [(0, 3, "float32"), (3, 1, "float32"), (1, 1, "bfloat16")])
def test_one_that_moved_comes_back_from_a_checkpoint_with_the_coefficient(
    model: str, ranks: Ranks, tmp_path: Path, saved: int, loaded: int, dtype: str
) -> None:
    adaptive = {"coef": 0.1, "reference_update_every": 1, "target": 0.01, "horizon": 10}
    models, reference = opened(model, ranks, saved, dtype=dtype, kl=adaptive)
    train_step(models.policy, ranks, random_rows(1, 8), learning_rate=1e-2)
    reference.follow(models.policy, 0.5)
    models.kl.update(1.0, 5)
    path = models.save(tmp_path, 1, {"version": 1}, 1, ranks)
    assert latest_valid(tmp_path).path == path
    others, other = opened(model, ranks, loaded, dtype=dtype, kl=adaptive)
    extras = others.load(path)
    assert extras["version"] == 1
    assert others.kl.value == models.kl.value != 0.1
    wanted = weights_of(reference)
    assert all(torch.equal(value, wanted[name]) for name, value in weights_of(other).items())
    torch.testing.assert_close(other.logprobs(BATCHES)[0], reference.logprobs(BATCHES)[0], atol=1e-5, rtol=0)


def test_one_that_stays_is_in_no_checkpoint_but_one_that_a_warm_start_made_is(model: str, ranks: Ranks) -> None:
    plain = Models.open(settings(model, 0, kl={"coef": 0.1, "reference_update_every": 0}), ranks)
    warmed = Models.open(settings(model, 0, kl={"coef": 0.1, "reference_update_every": 0}, warmup={"steps": 3}), ranks)
    assert (list(plain.beside), list(warmed.beside)) == ([], ["reference"])
    train_step(warmed.policy, ranks, random_rows(1, 8), learning_rate=1e-2)
    warmed.warmed_up(warmed.policy, settings(model, 0))
    assert warmed.reference is not None
    ours, theirs = warmed.reference.logprobs(BATCHES), warmed.policy.logprobs(BATCHES)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_without_a_kl_there_is_none(model: str, ranks: Ranks) -> None:
    assert Models.open(settings(model, 0, kl={"coef": 0.0}), ranks).reference is None


def test_a_checkpoint_without_the_model_that_is_asked_for_is_refused(model: str, ranks: Ranks, tmp_path: Path) -> None:
    plain = Models.open(settings(model, 0, kl={"coef": 0.0}), ranks)
    path = plain.save(tmp_path, 1, {}, 1, ranks)
    models, _ = opened(model, ranks, 0)
    with pytest.raises(ConfigError, match=r"has no reference model, which the run has; resume with the settings"):
        models.load(path)
