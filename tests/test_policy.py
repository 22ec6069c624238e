"""One rank: ZeRO stages against plain torch, packing against single sequences, steps that must change nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from learner.batches import MicroBatch, Row, pack
from learner.deepspeed_engine import OWNED, engine_config
from learner.losses import LossAndSums
from learner.model import PolicyModel, load
from learner.policy import Policy
from learner.ranks import Ranks
from protocol.algorithm import AlgorithmConfig
from protocol.errors import ConfigError
from protocol.sections import LearnerConfig
from tests.learning import (
    BUDGETS,
    RATE,
    STEPS,
    assert_trained_alike,
    config,
    gradient,
    largest_difference,
    largest_relative_difference,
    logprobs_one_by_one,
    loss_of,
    model_folder,
    open_policy,
    sampled_steps,
    slow_loss,
    train_step,
    weights,
    whole_state,
)
from tests.rows import random_rows

STAGES = [0, 1, 2, 3]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model"), tied=request.param)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("tied"))


def plain_training(
    path: str, steps: list[list[Row]], temperature: float = 1.0
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same steps in plain torch: no DeepSpeed, no packing, no chunks, no micro-batches, a loss written anew."""
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.AdamW(lm.parameters(), lr=RATE, weight_decay=0.01)
    norms = []
    for rows in steps:
        losses = []
        for row in rows:
            losses.append(slow_loss(logprobs_one_by_one(lm, row, temperature), row))
        torch.cat(losses).mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in lm.named_parameters()}, norms


@pytest.mark.parametrize("zero", STAGES)
def test_every_zero_stage_trains_like_plain_torch(model: str, ranks: Ranks, zero: int) -> None:
    steps = sampled_steps(model)
    wanted, norms = plain_training(model, steps)
    policy = open_policy(model, ranks, zero)
    updates = [train_step(policy, ranks, rows, learning_rate=RATE) for rows in steps]
    assert max(update.num_micro_batches for update in updates) > 2
    assert all(update.applied for update in updates)
    assert [update.grad_norm for update in updates] == pytest.approx(norms, rel=1e-4)
    assert_trained_alike(weights(policy), wanted)


def test_zero_0_equals_torch_bit_for_bit(model: str, ranks: Ranks) -> None:
    settings = config()
    module = PolicyModel(load(model, torch.float32, CPU, False), 16, False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.01)
    policy = open_policy(model, ranks)
    norms = []
    for rows in sampled_steps(model):
        loss = loss_of(settings.algorithm, rows, ranks)
        for batch in pack(rows, 64):
            arguments = (batch.input_ids, batch.position_ids, batch.cuts, batch.positions, batch.targets, 1.0)
            loss(*module(*arguments), batch)[0].backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        assert train_step(policy, ranks, rows, learning_rate=RATE).grad_norm == norms[-1]
    assert max(norms) > 1.0, "clipping was never at work"
    assert largest_difference(weights(policy), dict(module.lm.named_parameters())) == 0.0


def test_packed_logprobs_are_those_of_each_sequence_alone_at_the_sampling_temperature(model: str, ranks: Ranks) -> None:
    policy = open_policy(model, ranks, temperature=0.7)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    rows = [row for row in random_rows(5, 12) if len(row.kept)]
    (batch,) = pack(rows, 10_000)
    for temperature in (None, 1.0):
        (packed,) = policy.logprobs([batch], temperature)
        ordered = sorted(rows, key=lambda row: -row.num_inputs)
        with torch.no_grad():
            single = torch.cat([logprobs_one_by_one(lm, row, temperature or 0.7) for row in ordered])
        assert not packed.requires_grad
        torch.testing.assert_close(packed, single, atol=2e-5, rtol=0)


def test_the_temperature_of_sampling_is_that_of_training(tied: str, ranks: Ranks) -> None:
    steps = sampled_steps(tied, 0.7)
    wanted, norms = plain_training(tied, steps, temperature=0.7)
    policy = open_policy(tied, ranks, temperature=0.7)
    assert [train_step(policy, ranks, rows, learning_rate=RATE).grad_norm for rows in steps] == pytest.approx(
        norms, rel=1e-4
    )
    assert_trained_alike(weights(policy), wanted)


@pytest.mark.parametrize("aggregation", get_args(AlgorithmConfig.model_fields["aggregation"].annotation))
def test_no_budget_of_micro_batches_changes_loss_or_gradient(tied: str, ranks: Ranks, aggregation: str) -> None:
    rows, policy = random_rows(2, 13), open_policy(tied, ranks, clip_grad=0.0)
    wanted, update = gradient(policy, ranks, rows, BUDGETS[0], aggregation)
    seen = (update.sums["loss"], update.grad_norm, update.sums["entropy"])
    for budget in BUDGETS[1:]:
        found, update = gradient(policy, ranks, rows, budget, aggregation)
        assert (update.sums["loss"], update.grad_norm, update.sums["entropy"]) == pytest.approx(seen, rel=1e-5)
        assert largest_relative_difference(found, wanted) < 1e-5


def test_chunks_of_the_head_change_neither_values_nor_gradients(tied: str) -> None:
    (batch,) = pack(random_rows(4, 10), 10_000)
    results = []
    for chunk in (1, 7, 100_000):
        module = PolicyModel(load(tied, torch.float32, CPU, False), chunk, False)
        logprobs, entropies = module(
            batch.input_ids, batch.position_ids, batch.cuts, batch.positions, batch.targets, 1.3
        )
        (logprobs * torch.arange(len(logprobs))).mean().backward()
        results.append((logprobs, entropies, torch.cat([p.grad.flatten() for p in module.parameters()])))
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)


def test_entropies_are_those_of_the_whole_distribution(tied: str, ranks: Ranks) -> None:
    (batch,) = pack(random_rows(4, 1), 10_000)
    lm = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    with torch.no_grad():
        distribution = torch.distributions.Categorical(logits=lm(batch.input_ids).logits[0, batch.positions])
    seen: list[torch.Tensor] = []

    def loss(logprobs: torch.Tensor, entropies: torch.Tensor, batch: MicroBatch) -> LossAndSums:
        seen.append(entropies)
        return logprobs.sum() * 0.0, {}

    open_policy(tied, ranks).update([batch], loss, 0.0)
    torch.testing.assert_close(seen[0], distribution.entropy(), atol=1e-4, rtol=1e-5)


def test_entropies_have_the_gradient_of_the_whole_distribution_where_a_bonus_asks_for_it(tied: str) -> None:
    (batch,) = pack(random_rows(4, 1), 10_000)
    inputs = (batch.input_ids, batch.position_ids, batch.cuts, batch.positions, batch.targets, 0.7)
    whole = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    logits = whole(batch.input_ids).logits[0, batch.positions] / 0.7
    slope = torch.linspace(-1.0, 1.0, len(batch.positions))
    (torch.distributions.Categorical(logits=logits).entropy() * slope).sum().backward()
    module = PolicyModel(load(tied, torch.float32, CPU, False), 7, False, entropy_gradient=True)
    (module(*inputs)[1] * slope).sum().backward()
    wanted = dict(whole.named_parameters())
    for name, parameter in module.lm.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-5, rtol=1e-3)
    assert not PolicyModel(load(tied, torch.float32, CPU, False), 7, False)(*inputs)[1].requires_grad


def test_gradient_checkpointing_changes_no_number(tied: str, ranks: Ranks) -> None:
    plain, saving = open_policy(tied, ranks), open_policy(tied, ranks, gradient_checkpointing=True)
    for seed, number in STEPS[:2]:
        for policy in (plain, saving):
            train_step(policy, ranks, random_rows(seed, number))
    assert largest_difference(weights(plain), weights(saving)) == 0.0


@pytest.mark.parametrize("kind", ["infinite loss", "nan gradient"])
@pytest.mark.parametrize(
    ("zero", "dtype"), [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (0, "bfloat16")]
)
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_is_fine(
    tied: str, ranks: Ranks, zero: int, dtype: str, kind: str
) -> None:
    policy = open_policy(tied, ranks, zero, dtype=dtype)
    train_step(policy, ranks, random_rows(1, 8))
    before, applied = whole_state(policy), policy.num_applied
    batches = pack(random_rows(2, 8), 64)
    calls = []

    def loss(logprobs: torch.Tensor, entropies: torch.Tensor, batch: MicroBatch) -> LossAndSums:
        calls.append(batch)
        value = logprobs.sum() * 0.01
        if len(calls) == 2:  # the others are fine
            if kind == "infinite loss":
                value = value + math.inf  # its gradient is finite
            else:
                value = value + (logprobs - logprobs.detach()).abs().sqrt().sum()  # 0, with a gradient of inf * 0
        return value, {}

    update = policy.update(batches, loss, 1e-3)
    assert len(calls) == len(batches) > 2
    assert not update.applied
    assert math.isfinite(update.sums["loss"]) == (kind == "nan gradient")
    after = whole_state(policy)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert policy.num_applied == applied == 1
    assert train_step(policy, ranks, random_rows(3, 8)).applied
    assert policy.num_applied == 2
    assert largest_difference(before, whole_state(policy)) > 0.0


@pytest.mark.parametrize("zero", STAGES)
def test_logprobs_between_updates_disturb_nothing(tied: str, ranks: Ranks, zero: int) -> None:
    alone, watched = open_policy(tied, ranks, zero), open_policy(tied, ranks, zero)
    for seed, number in STEPS[:2]:
        train_step(alone, ranks, random_rows(seed, number))
        watched.logprobs(pack(random_rows(99, 5), 64))
        train_step(watched, ranks, random_rows(seed, number))
    assert largest_difference(weights(alone), weights(watched)) < (1e-5 if zero == 3 else 1e-9)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_bfloat16_follows_float32(tied: str, ranks: Ranks, zero: int) -> None:
    half, full = open_policy(tied, ranks, zero, dtype="bfloat16"), open_policy(tied, ranks)
    assert half.zero_stage == max(1, zero)
    for rows in sampled_steps(tied):
        norms = [train_step(policy, ranks, rows, learning_rate=RATE).grad_norm for policy in (half, full)]
        assert norms[0] == pytest.approx(norms[1], rel=0.05)
    assert 0.0 < largest_difference(weights(half), weights(full)) < 5e-3
    assert {dtype for _, dtype, _ in half.layout()} == {"bfloat16"}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_many_micro_batches_in_bfloat16_are_summed_in_float32(tied: str, ranks: Ranks, zero: int) -> None:
    """64 equal rows count 1/64 each, so every number but the sum is a power of two off: only the sum could round."""
    row = random_rows(3, 1)[0]
    policy = open_policy(tied, ranks, zero, dtype="bfloat16", clip_grad=0.0)
    wanted, _ = gradient(policy, ranks, [row], 1)
    found, update = gradient(policy, ranks, [row] * 64, 1)
    assert update.num_micro_batches == 64
    assert largest_relative_difference(found, wanted) < 1e-6


@pytest.mark.parametrize("zero", STAGES)
def test_a_reset_optimizer_steps_like_a_new_one(tied: str, ranks: Ranks, zero: int) -> None:
    policy = open_policy(tied, ranks, zero)
    first = train_step(policy, ranks, random_rows(1, 6), learning_rate=0.0)  # moments, and weights as they were
    policy.reset_optimizer()
    fresh = open_policy(tied, ranks, zero)
    second, wanted = train_step(policy, ranks, random_rows(2, 6)), train_step(fresh, ranks, random_rows(2, 6))
    assert first.applied
    assert second.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)
    assert largest_difference(whole_state(policy), whole_state(fresh)) < (1e-5 if zero == 3 else 1e-9)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_saved_folder_gives_the_same_logprobs_in_transformers(
    model: str, ranks: Ranks, tmp_path: Path, zero: int
) -> None:
    policy = open_policy(model, ranks, zero)
    train_step(policy, ranks, random_rows(1, 8))
    policy.save_pretrained(tmp_path / "hf")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    again = open_policy(str(tmp_path / "hf"), ranks)
    batches = pack(random_rows(2, 5), 10_000)
    assert torch.equal(again.logprobs(batches)[0], policy.logprobs(batches)[0])
    assert largest_difference(dict(lm.named_parameters()), weights(policy)) == 0.0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (Path(model) / name).read_bytes()


def test_a_model_with_a_sliding_window_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    Qwen2ForCausalLM(tiny_config(**window)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="sliding window"):
        open_policy(str(tmp_path), ranks)


def test_a_model_that_transforms_its_logits_is_refused(
    ranks: Ranks, tied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Qwen2ForCausalLM.forward

    def capped(self: Qwen2ForCausalLM, *arguments: Any, **named: Any) -> Any:
        output = original(self, *arguments, **named)
        output.logits = 2.0 * torch.tanh(output.logits / 2.0)
        return output

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", capped)
    with pytest.raises(ConfigError, match=r"scales, caps or biases its logits"):
        open_policy(tied, ranks)


def test_a_folder_without_a_model_is_an_error_with_words(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no causal language model can be loaded from .*set model.path"):
        open_policy(str(tmp_path), ranks)


def tiny_config(**changes: Any) -> Qwen2Config:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return Qwen2Config(**sizes, num_key_value_heads=1, **changes)


@pytest.mark.parametrize("key", OWNED)
def test_a_passthrough_key_that_is_ours_is_refused_with_what_to_set(key: str) -> None:
    section, _, name = key.rpartition(".")
    passthrough: dict[str, Any] = {section: {name: 1}} if section else {name: 1}
    with pytest.raises(ConfigError, match=f"deepspeed.{key} is decided by the learner; "):
        engine_config(LearnerConfig(), torch.float32, passthrough)


def test_the_passthrough_is_merged_into_the_config() -> None:
    passthrough = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "wall_clock_breakdown": True}
    built = engine_config(LearnerConfig(zero=2), torch.float32, passthrough)
    assert built["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert (built["zero_optimization"]["stage"], built["wall_clock_breakdown"]) == (2, True)
    with pytest.raises(ConfigError, match=r"deepspeed.optimizer has no effect under ZeRO 0"):
        engine_config(LearnerConfig(), torch.float32, {"optimizer": {"type": "AdamW"}})


@pytest.mark.parametrize("zero", [2, 3])
def test_an_optimizer_offloaded_to_the_host_trains_the_same(tied: str, ranks: Ranks, zero: int) -> None:
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    policy, usual = open_policy(tied, ranks, zero, deepspeed=offload), open_policy(tied, ranks, zero)
    for seed, number in STEPS[:2]:
        for each in (policy, usual):
            train_step(each, ranks, random_rows(seed, number))
    assert largest_difference(weights(policy), weights(usual)) < 2e-5


def test_a_policy_knows_its_vocabulary_and_layout(model: str, ranks: Ranks) -> None:
    policy: Policy = open_policy(model, ranks, 3)
    lm = AutoModelForCausalLM.from_pretrained(model)
    assert policy.layout() == [(name, "float32", tuple(p.shape)) for name, p in lm.named_parameters()]
    assert policy.vocab_size == lm.config.vocab_size == policy.model_config.vocab_size
