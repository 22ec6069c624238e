"""Adapters in the learner: what they compute and learn, what stays as it is, and what is left behind for others."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.engine import EngineOptions
from actors.transformers_engine import TransformersEngine
from learner import checkpoint
from learner.batches import Row, pack
from learner.models import Models
from learner.policy import Policy
from learner.preparation import Preparation
from learner.publisher import Publisher
from learner.ranks import Ranks
from learner.warmup import warm_up
from protocol.checkpoints import latest_valid
from protocol.config import Config
from protocol.errors import ConfigError
from protocol.types import Completion, SamplingParams
from protocol.weights import Snapshot
from tests.batch_shares import random_share
from tests.engines import begin, until
from tests.learning import (
    RATE,
    assert_trained_alike,
    config,
    examples,
    gradient,
    largest_difference,
    largest_relative_difference,
    logprobs_one_by_one,
    model_folder,
    open_policy,
    padded_gradient,
    sampled_batch,
    sampled_steps,
    train_step,
    warmup_settings,
    weights,
    whole_state,
)
from tests.rank_worlds import World
from tests.rows import random_rows
from tests.test_publisher import tensors

RANK, ALPHA = 4, 12.0
STAGES = [0, 1, 2, 3]
ROWS = random_rows(3, 8)
BATCHES = pack(ROWS, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model"), tied=True)


def settings(model: str, zero: int = 0, dtype: str = "float32", clip_grad: float = 1.0, **sections: Any) -> Config:
    base = config(zero, dtype=dtype, clip_grad=clip_grad).model_dump()
    base["model"]["path"] = model
    sections["lora"] = {"rank": RANK, "alpha": ALPHA} | sections.get("lora", {})
    return Config.model_validate(base | {name: base[name] | values for name, values in sections.items()})


def opened(model: str, ranks: Ranks, zero: int = 0, **changes: Any) -> Policy:
    return Policy.open(settings(model, zero, **changes), model, ranks)


def trained(model: str, ranks: Ranks, zero: int = 0, steps: int = 2, **changes: Any) -> Policy:
    """Both factors of every adapter are far from 0."""
    policy = opened(model, ranks, zero, **changes)
    for seed in range(steps):
        train_step(policy, ranks, random_rows(seed, 6), learning_rate=1e-2)
    return policy


def base_of(policy: Policy) -> dict[str, Tensor]:
    assert policy.base is not None
    return {name: weight.clone() for name, weight in policy.base.whole_weights()}


def assert_same_logprobs(policy: Policy, lm: Any, tolerance: float = 1e-5) -> None:
    """As transformers gives them one by one, of whole logits."""
    batches = pack(ROWS, 1)
    with torch.no_grad():
        for batch, found in zip(batches, policy.logprobs(batches), strict=True):
            torch.testing.assert_close(
                found, logprobs_one_by_one(lm, ROWS[batch.rows[0]], 1.0), atol=tolerance, rtol=0.0
            )


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- What they compute and learn


@pytest.mark.parametrize("zero", STAGES)
def test_a_run_starts_from_its_base_and_trains_the_adapters_alone(model: str, ranks: Ranks, zero: int) -> None:
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy = opened(model, ranks, zero)
    assert_same_logprobs(policy, lm)
    update = train_step(policy, ranks, random_rows(0, 6), learning_rate=1e-2)
    assert update.applied
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name, *_ in policy.layout())
    assert len(policy.layout()) == 2 * 7 * lm.config.num_hidden_layers, "two for each linear layer but the head"
    assert_equal(base_of(policy), dict(lm.named_parameters()))
    again = policy.logprobs(BATCHES)
    assert max((a - b).abs().max() for a, b in zip(again, opened(model, ranks).logprobs(BATCHES), strict=True)) > 0.01


@pytest.mark.parametrize("zero", STAGES)
def test_the_gradient_is_that_of_the_merged_weights_by_the_chain_rule(
    model: str, ranks: Ranks, tmp_path: Path, zero: int
) -> None:
    """W = W0 + alpha / rank * B A, so dB = alpha / rank * dW A' and dA = alpha / rank * B' dW."""
    policy = trained(model, ranks, zero, clip_grad=0.0)
    policy.export(tmp_path)
    factors = weights(policy)
    rows = sampled_batch(model)
    loss, by_weight = padded_gradient(str(tmp_path / "hf"), rows)
    found, update = gradient(policy, ranks, rows, 64)
    wanted = {}
    for name in (name for name in factors if name.endswith(".lora_A.weight")):
        module = name.removesuffix(".lora_A.weight")
        of_weight, a, b = by_weight[f"{module}.weight"], factors[name], factors[f"{module}.lora_B.weight"]
        wanted[name] = ALPHA / RANK * (b.T @ of_weight)
        wanted[f"{module}.lora_B.weight"] = ALPHA / RANK * (of_weight @ a.T)
    assert update.sums["loss"] == pytest.approx(loss, rel=1e-5)
    assert largest_relative_difference(found, wanted) < 1e-4


def test_all_ranks_draw_the_same_adapters_from_the_runs_seed(model: str, ranks: Ranks) -> None:
    policy, same, other = (opened(model, ranks, run={"seed": seed}) for seed in (1, 1, 2))
    assert_equal(weights(policy), weights(same))
    assert largest_difference(weights(policy), weights(other)) > 0.01


def test_three_ranks_train_and_publish_the_same_adapters_as_one(three_ranks: World, ranks: Ranks) -> None:
    model = str(three_ranks.folder / "untied")
    policy = open_policy(model, ranks, lora={"rank": 4})
    updates = [train_step(policy, ranks, rows, learning_rate=RATE) for rows in sampled_steps(model)]
    lm = dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters())
    by_stage = load_file(three_ranks.folder / "adapters.safetensors")
    for zero in ("0", "2", "3"):
        found = {name.removeprefix(f"{zero}/"): value for name, value in by_stage.items() if name.startswith(zero)}
        assert_trained_alike(found, weights(policy))
        for rank in three_ranks.seen:
            assert rank["adapters"][zero] == pytest.approx([update.grad_norm for update in updates], rel=1e-5)
        folder = three_ranks.folder / f"adapters{zero}"
        assert_equal(tensors(Snapshot.open(folder / "v4", 4)), found)
        assert_equal(tensors(Snapshot.open(folder / "base", 0)), lm)


def test_only_the_modules_that_are_named_get_one(model: str, ranks: Ranks) -> None:
    policy = opened(model, ranks, lora={"targets": "q_proj, layers.1.mlp.up_proj"})
    assert {name.rpartition(".lora_")[0] for name, *_ in policy.layout()} == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


@pytest.mark.parametrize("name", ["query", "lm_head", "embed_tokens", "norm"])
def test_a_target_that_is_no_linear_layer_below_the_head_is_refused_with_those_that_are(
    model: str, ranks: Ranks, name: str
) -> None:
    expected = (
        f"lora.targets must be all-linear or name linear layers other than the output head, got '{name}'; "
        "Qwen2ForCausalLM has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    with pytest.raises(ConfigError, match=expected):
        opened(model, ranks, lora={"targets": f"q_proj,{name}"})


# --- Dropout


def test_dropout_acts_in_updates_and_nowhere_else(model: str, ranks: Ranks) -> None:
    policy = trained(model, ranks, lora={"dropout": 0.5})
    before = policy.logprobs(BATCHES)
    update = policy.update(BATCHES, lambda logprobs, *_: (logprobs.sum() * 0.0, {}), 0.0)
    assert max((a - b).abs().max() for a, b in zip(before, update.logprobs, strict=True)) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(before, policy.logprobs(BATCHES), strict=True))


def test_with_dropout_the_logprobs_from_before_a_batch_are_a_pass_of_their_own(model: str, ranks: Ranks) -> None:
    share = random_share(7)
    for dropout, wanted in ((0.0, False), (0.3, True)):
        config = settings(model, lora={"dropout": dropout}, learner={"micro_batch_tokens": 40})
        models = Models.open(config, ranks)
        [mini_batch] = Preparation(config, ranks, models).prepare(share).mini_batches
        proximal = [batch.proximal_logprobs for batch in mini_batch.micro_batches]
        own = models.policy.logprobs(mini_batch.micro_batches)
        assert all(torch.equal(a, b) for a, b in zip(proximal, own, strict=True)) == wanted


# --- The reference


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_the_reference_is_the_base_however_far_the_adapters_are(model: str, ranks: Ranks, zero: int) -> None:
    models = Models.open(settings(model, zero, kl={"coef": 0.1}), ranks)
    assert models.reference is not None
    assert models.beside == {}
    first = models.policy.logprobs(BATCHES)
    for seed in range(2):
        train_step(models.policy, ranks, random_rows(seed, 6), learning_rate=1e-2)
        now = models.policy.logprobs(BATCHES)
        for wanted, found, policy in zip(first, models.reference.logprobs(BATCHES), now, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0.0)
            assert (policy - found).abs().max() > 1e-3
        assert all(torch.equal(a, b) for a, b in zip(now, models.policy.logprobs(BATCHES), strict=True))


def test_a_reference_that_follows_is_refused(model: str) -> None:
    with pytest.raises(
        ValidationError, match=r"the weights below them, which stay .* got kl.reference_update_every 5;"
    ):
        settings(model, kl={"coef": 0.1, "reference_update_every": 5})


# --- Checkpoints


@pytest.mark.parametrize(
    ("zero", "dtype", "dropout"),
    [(0, "float32", 0.3), (1, "float32", 0.0), (2, "float32", 0.3), (3, "float32", 0.0), (1, "bfloat16", 0.3)],
)
def test_a_resumed_run_goes_on_bit_for_bit_from_a_base_that_a_warm_start_made(
    model: str, ranks: Ranks, tmp_path: Path, zero: int, dtype: str, dropout: float
) -> None:
    run = settings(model, zero, dtype=dtype, warmup={"steps": 3}, lora={"dropout": dropout}, kl={"coef": 0.1})
    models = Models.open(run, ranks)
    whole = models.policy_to_warm(run, ranks)
    warm_up(whole, examples(), warmup_settings(3), 3, 64, ranks, lambda step: None)
    warmed = {name: weight.clone() for name, weight in whole.whole_weights()}
    models.warmed_up(whole, run)
    assert_equal(base_of(models.policy), warmed)
    train_step(models.policy, ranks, random_rows(1, 6))
    path = models.save(tmp_path, 1, {"version": 1}, 1, ranks)
    assert latest_valid(tmp_path).path == path
    assert sum(file.stat().st_size for file in path.glob("training-*")) < 200_000, "of adapters alone"

    resumed = Models.open(run, ranks)
    assert resumed.load(path)["version"] == 1
    assert_equal(base_of(resumed.policy), warmed)
    assert_equal(whole_state(resumed.policy), whole_state(models.policy))
    for each in (models, resumed):
        for seed in (7, 8):
            train_step(each.policy, ranks, random_rows(seed, 6))
    if zero == 3:  # never bit-equal even to itself
        assert_trained_alike(weights(models.policy), weights(resumed.policy))
    else:
        assert_equal(whole_state(resumed.policy), whole_state(models.policy))
    assert models.reference is not None
    assert resumed.reference is not None
    for ours, theirs in zip(models.reference.logprobs(BATCHES), resumed.reference.logprobs(BATCHES), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0.0)


def tensor_bytes() -> int:
    """What all tensors of this process hold."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (each.untyped_storage() for each in tensors)}
    return sum(storages.values())


@pytest.mark.parametrize(("zero", "dtype"), [*((zero, "float32") for zero in STAGES), (1, "bfloat16"), (3, "bfloat16")])
def test_what_a_warm_start_needed_is_let_go(model: str, ranks: Ranks, zero: int, dtype: str) -> None:
    run = settings(model, zero, dtype=dtype, warmup={"steps": 3})
    models = Models.open(run, ranks)
    held = tensor_bytes()
    whole = models.policy_to_warm(run, ranks)
    train_step(whole, ranks, random_rows(1, 6))
    states = whole._engine._optimizer.state.values()
    moments = [weakref.ref(value) for state in states for value in state.values() if value.numel() > 1]
    assert len(moments) >= 2
    del states
    models.warmed_up(whole, run)
    del whole
    assert tensor_bytes() < held + 100_000, "a model is 500,000 and more"
    assert [moment() for moment in moments] == [None] * len(moments)
    assert train_step(models.policy, ranks, random_rows(1, 6)).applied


@pytest.mark.parametrize("zero", [0, 3])
def test_a_checkpoint_has_the_merged_model_and_the_adapter_for_others_to_load(
    model: str, ranks: Ranks, tmp_path: Path, zero: int
) -> None:
    policy = trained(model, ranks, zero)
    path = checkpoint.save(tmp_path, 2, policy, {}, 1, ranks)
    assert not (path / "base").exists(), "it is the model of model.path"
    merged = AutoModelForCausalLM.from_pretrained(path / "hf", dtype=torch.float32)
    assert_equal(dict(merged.named_parameters()), dict(policy.whole_weights()))
    assert_same_logprobs(policy, merged)
    below = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert_same_logprobs(policy, PeftModel.from_pretrained(below, path / "adapter"))


def test_after_a_warm_start_the_adapter_goes_on_the_checkpoints_own_base(
    model: str, ranks: Ranks, tmp_path: Path
) -> None:
    policy, other = trained(model, ranks), model_folder(tmp_path / "other", tied=True, seed=5)
    assert policy.base is not None
    policy.base.take(Policy.open(config(), other, ranks))
    path = checkpoint.save(tmp_path, 2, policy, {}, 1, ranks)
    below = AutoModelForCausalLM.from_pretrained(path / "base", dtype=torch.float32)
    assert_same_logprobs(policy, PeftModel.from_pretrained(below, path / "adapter"))
    assert_same_logprobs(policy, AutoModelForCausalLM.from_pretrained(path / "hf", dtype=torch.float32))


def test_a_checkpoint_without_adapters_is_no_checkpoint_of_a_run_with_them(
    model: str, ranks: Ranks, tmp_path: Path
) -> None:
    path = checkpoint.save(tmp_path, 2, Policy.open(config(), model, ranks), {}, 1, ranks)
    with pytest.raises(ConfigError, match=r"of another model: .* set model.path, and lora as it was"):
        checkpoint.load(path, opened(model, ranks))


# --- What travels


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_version_is_the_adapters_alone_and_the_base_is_written_once(
    model: str, ranks: Ranks, tmp_path: Path, zero: int
) -> None:
    policy = opened(model, ranks, zero)
    publisher = Publisher(tmp_path / "snapshots", policy, ranks)
    made = []
    for version in range(4):
        publisher.copy(version)
        made.append(publisher.finish())
        made[-1].verify()
        assert_equal(tensors(made[-1]), {name: weight.clone() for name, weight in weights(policy).items()})
        train_step(policy, ranks, random_rows(version, 6), learning_rate=1e-2)
    [base] = {id(snapshot.base): snapshot.base for snapshot in made}.values()
    assert base is not None
    base.verify()
    assert_equal(tensors(base), dict(AutoModelForCausalLM.from_pretrained(model).named_parameters()))
    assert {snapshot.manifest.base for snapshot in made} == {base.digest}
    assert base.manifest.base == ""
    numbers = sum(weight.numel() for weight in weights(policy).values())
    assert made[0].manifest.total_bytes == 4 * numbers < base.manifest.total_bytes / 4
    assert {path.name for path in (tmp_path / "snapshots").iterdir()} >= {"base", "v3"}


def test_the_oracle_samples_with_the_logprobs_of_the_learner_on_both_sides_of_an_update(
    model: str, ranks: Ranks, tmp_path: Path
) -> None:
    """Its adapters know nothing of peft."""
    policies = [trained(model, ranks, steps=steps) for steps in (1, 3)]
    snapshots = []
    for version, policy in enumerate(policies):
        publisher = Publisher(tmp_path / f"snapshots{version}", policy, ranks)
        publisher.copy(version)
        snapshots.append(publisher.finish())
    question = np.arange(2, 12, dtype=np.int32)

    async def scene() -> list[Completion]:
        engine = TransformersEngine(EngineOptions(Path(model), 256, lora_rank=RANK, lora_alpha=ALPHA))
        await engine.start()
        await engine.load(snapshots[0])
        tasks = begin(engine, [question] * 6, SamplingParams(40))
        await until(lambda: engine.statistics().generated_tokens >= 60, "60 tokens in all")
        await engine.load(replace(snapshots[1], base=None))
        assert engine.held_base == snapshots[0].manifest.base
        completions = await asyncio.gather(*tasks)
        await engine.close()
        return completions

    num_on_both_sides = 0
    for completion in asyncio.run(scene()):
        length = len(completion.tokens)
        in_loss, versions = np.ones(length, np.bool_), np.zeros(length, np.int32)
        row = Row(question, completion.tokens, in_loss, completion.behavior_logprobs, versions)
        by_version = [policy.logprobs(pack([row], 512))[0].numpy() for policy in policies]
        for version, start, end in completion.spans:
            of_tokens = completion.behavior_logprobs[start:end]
            assert np.abs(by_version[version][start:end] - of_tokens).max() < 1e-5
            assert np.abs(by_version[1 - version][start:end] - of_tokens).max() > 1e-3
        num_on_both_sides += len(completion.spans) == 2
    assert num_on_both_sides
