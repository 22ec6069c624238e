"""From a share to updates: what is computed before a batch, what each token counts, and that ranks agree on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.batches import MicroBatch, Row, pack
from learner.entropy import entropy_histogram, entropy_threshold
from learner.mini_batches import loss_rows
from learner.mismatch import mismatch_curves
from learner.models import Models
from learner.preparation import Preparation
from learner.ranks import Ranks
from protocol.config import Config
from protocol.types import FinishReason, Share
from tests.batch_shares import STEP, random_share
from tests.critics import give_head, slow_values
from tests.learning import config as small_config
from tests.learning import logprobs_one_by_one, model_folder, padded_rows_gradient
from tests.prepared import SETTINGS, prepared
from tests.rank_worlds import World

BUDGET = 64
GROUP = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model"), tied=True)


def settings(model: str, **sections: dict[str, Any]) -> Config:
    base = small_config(micro_batch_tokens=BUDGET, clip_grad=0.0).model_dump()
    base["model"]["path"] = model
    for name, values in sections.items():
        base[name] = base[name] | values
    return Config.model_validate(base)


def opened(model: str, ranks: Ranks, **sections: dict[str, Any]) -> tuple[Models, Preparation]:
    config = settings(model, **sections)
    models = Models.open(config, ranks)
    return models, Preparation(config, ranks, models)


def near(share: Share, model: str) -> Share:
    """The share with log-probabilities as if a policy near the model had sampled it: ratios on both sides of 2."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    rng, items = np.random.default_rng(0), []
    for item, row in zip(share.items, loss_rows(share, 2, False), strict=True):
        logprobs = item.completion.behavior_logprobs.copy()
        with torch.no_grad():
            logprobs[row.kept] = logprobs_one_by_one(lm, row, 1.0).numpy()
        logprobs += rng.normal(0.0, 0.8, len(logprobs)).astype(np.float32)
        items.append(replace(item, completion=replace(item.completion, behavior_logprobs=logprobs)))
    return replace(share, items=tuple(items))


@pytest.fixture(scope="module")
def share(model: str) -> Share:
    return near(random_share(1), model)


def all_columns(prepared_rows: list[MicroBatch], name: str) -> list[float]:
    return [value for batch in prepared_rows for value in getattr(batch, name).tolist()]


def slow_rows(share: Share) -> list[tuple[Row, float]]:
    """The rows with GRPO's advantages, from plain Python floats."""
    found = []
    for row in loss_rows(share, 2, False):
        group = [float(r) for r in share.rewards[row.place // GROUP] if not np.isnan(r)]
        mean = sum(group) / len(group)
        std = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
        reward = float(share.rewards.flat[row.place])
        found.append((row, 0.0 if len(set(group)) == 1 else (reward - mean) / (std + 1e-6)))
    return found


def test_the_default_step_is_decoupled_ppo_in_one_pass(model: str, ranks: Ranks, share: Share) -> None:
    """-min(pi / mu, 2) A grad log pi, averaged over tokens: without a clip, because nothing has moved yet."""
    models, preparation = opened(model, ranks)
    prepared = preparation.prepare(share)
    (mini_batch,) = prepared.mini_batches
    assert prepared.mismatch is None
    assert all_columns(mini_batch.micro_batches, "proximal_logprobs") != []
    assert np.isnan(all_columns(mini_batch.micro_batches, "proximal_logprobs")).all(), "no pass was made for them"
    update = models.policy.update(mini_batch.micro_batches, preparation.loss(mini_batch), 0.0)

    ratios: list[float] = []

    def slow(logprobs: torch.Tensor, row: Row, advantage: float) -> torch.Tensor:
        ratio = (logprobs.detach() - torch.from_numpy(row.behavior_logprobs[row.kept])).exp()
        ratios.extend(ratio.tolist())
        return -ratio.clamp(max=2.0) * advantage * (logprobs - logprobs.detach()).exp()

    loss, gradient = padded_rows_gradient(model, slow_rows(share), slow)
    assert min(ratios) < 1.0 < 2.0 < max(ratios)
    assert update.sums["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-7)
    norm = sum(float(value.square().sum()) for value in gradient.values()) ** 0.5
    assert update.grad_norm == pytest.approx(norm, rel=1e-5)
    curves = mismatch_curves(preparation.mismatch(mini_batch.micro_batches, update.logprobs, STEP))
    assert curves["mismatch/ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert curves["mismatch/outside_frac"] == pytest.approx(np.mean(np.array(ratios) > 2.0), rel=1e-6)


def test_what_a_tool_said_has_no_part_in_loss_gradient_or_curves(model: str, ranks: Ranks, share: Share) -> None:
    """Whatever log-probability or version its tokens carry; they are read as context all the same."""
    rng = np.random.default_rng(0)
    items, others, changed = [], [], []
    for item in share.items:
        made = item.completion
        observed = np.arange(len(made.tokens)) % 3 == 1
        noise = np.where(observed, rng.normal(-9.0, 5.0, len(observed)), made.behavior_logprobs).astype(np.float32)
        unknown = np.where(observed, np.nan, made.behavior_logprobs).astype(np.float32)
        tokens = np.where(observed, 3, made.tokens).astype(np.int32)
        items.append(replace(item, completion=replace(made, observed=observed, behavior_logprobs=unknown)))
        others.append(replace(item, completion=replace(made, observed=observed, behavior_logprobs=noise)))
        changed.append(replace(item, completion=replace(made, observed=observed, tokens=tokens)))
    models, preparation = opened(model, ranks, algorithm={"advantage": "reinforce_plus_plus"}, kl={"coef": 0.1})
    seen = []
    for of_share in (items, others, changed):
        (mini_batch,) = preparation.prepare(replace(share, items=tuple(of_share))).mini_batches
        update = models.policy.update(mini_batch.micro_batches, preparation.loss(mini_batch), 0.0)
        sums = preparation.mismatch(mini_batch.micro_batches, update.logprobs, STEP)
        seen.append([mini_batch.totals.tokens, update.sums["loss"], update.grad_norm, *mismatch_curves(sums).values()])
    num_sampled = sum(int((~item.completion.observed).sum()) for item in items)  # type: ignore[operator]
    assert seen[0][0] == num_sampled
    assert seen[0] == pytest.approx(seen[1], rel=1e-6, abs=1e-8)
    assert seen[0][2] != pytest.approx(seen[2][2], rel=1e-3), "other context, other gradient"


@pytest.mark.parametrize(
    "corrections",
    [
        {},
        {"weight": "sequence", "sequence_ratio": "geometric_mean", "bound": "mask", "low": 0.8, "high": 1.3},
        {"weight": "none", "negative_kl_mask": 0.01},
    ],
)
def test_a_pass_before_the_only_update_would_change_nothing(
    model: str, ranks: Ranks, share: Share, corrections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for forced in (False, True):
        if forced:
            monkeypatch.setattr(Preparation, "_needs_proximal", property(lambda self: True))
        models, preparation = opened(model, ranks, corrections=corrections)
        prepared = preparation.prepare(share)
        (mini_batch,) = prepared.mini_batches
        update = models.policy.update(mini_batch.micro_batches, preparation.loss(mini_batch), 0.0)
        sums = prepared.mismatch or preparation.mismatch(mini_batch.micro_batches, update.logprobs, STEP)
        seen.append([update.sums["loss"], update.grad_norm, *mismatch_curves(sums).values()])
    assert seen[0] == pytest.approx(seen[1], rel=1e-6, abs=1e-8)


def test_several_updates_start_from_one_proximal_policy(model: str, ranks: Ranks, share: Share) -> None:
    algorithm = {"updates_per_batch": 2, "epochs_per_batch": 3}
    models, preparation = opened(model, ranks, algorithm=algorithm)
    before = models.policy.logprobs(pack(loss_rows(share, 2, False), 10_000))[0].sum().item()
    prepared = preparation.prepare(share)
    assert len(prepared.mini_batches) == 6
    for epoch in range(3):
        own = prepared.mini_batches[2 * epoch : 2 * epoch + 2]
        columns = [all_columns(mini_batch.micro_batches, "proximal_logprobs") for mini_batch in own]
        assert sum(sum(column) for column in columns) == pytest.approx(before, rel=1e-5)
        assert [mini_batch.totals.tokens for mini_batch in own] == [float(len(column)) for column in columns]
    updates = [models.policy.update(m.micro_batches, preparation.loss(m), 1e-3) for m in prepared.mini_batches]
    assert all(update.applied for update in updates)
    assert models.policy.num_applied == 6
    ratio = [update.sums["ratio"] / update.sums["tokens"] for update in updates]
    assert ratio[0] == pytest.approx(1.0, abs=1e-5)
    assert abs(ratio[-1] - 1.0) > 1e-4, "the policy has moved from the proximal one"


def test_top_entropy_keeps_the_tokens_of_highest_entropy_and_the_denominator(
    model: str, ranks: Ranks, share: Share
) -> None:
    models, preparation = opened(model, ranks, algorithm={"top_entropy_frac": 0.25}, corrections={"weight": "none"})
    (mini_batch,) = preparation.prepare(share).mini_batches
    entropies = [entropy for _, entropy in models.policy.logprobs_and_entropies(mini_batch.micro_batches)]
    every = torch.cat(entropies).numpy()
    threshold = entropy_threshold(entropy_histogram(every), 0.25)
    kept = torch.cat([batch.corrections for batch in mini_batch.micro_batches]).numpy()
    np.testing.assert_array_equal(kept, (every >= threshold).astype(np.float32))
    assert 0.25 <= kept.mean() < 0.5, "the tokens of one bin of the threshold's histogram stay together"
    assert mini_batch.totals.tokens == len(kept)


def test_kl_in_the_reward_is_taken_off_token_by_token(model: str, ranks: Ranks, share: Share, tmp_path: Path) -> None:
    models, preparation = opened(
        model,
        ranks,
        algorithm={"advantage": "reinforce_plus_plus", "gamma": 0.9},
        kl={"coef": 0.5, "place": "reward"},
    )
    other = Models.open(settings(model_folder(tmp_path, tied=True, seed=1)), ranks)
    assert models.reference is not None
    models.reference.follow(other.policy, 1.0)
    prepared = preparation.prepare(share)
    (mini_batch,) = prepared.mini_batches
    rows = [row for row in loss_rows(share, 2, False) if len(row.kept)]
    batches = pack(rows, 10_000)
    logprobs, reference = models.policy.logprobs(batches)[0], other.policy.logprobs(batches)[0]
    kl = (logprobs - reference).double().tolist()
    assert prepared.reward_kl == pytest.approx(sum(kl) / len(kl), rel=1e-5)
    assert abs(prepared.reward_kl or 0.0) > 0.01
    returns, start = {}, 0
    for index in batches[0].rows:
        row, running, of_row = rows[index], 0.0, []
        for place in reversed(range(len(row.kept))):
            reward = float(share.rewards.flat[row.place]) if place == len(row.kept) - 1 else 0.0
            running = reward - 0.5 * kl[start + place] + 0.9 * running
            of_row.append(running)
        returns[row.place] = of_row[::-1]
        start += len(row.kept)
    every = [value for of_row in returns.values() for value in of_row]
    mean = sum(every) / len(every)
    std = (sum((value - mean) ** 2 for value in every) / (len(every) - 1) + 1e-8) ** 0.5
    wanted = sorted((value - mean) / std for value in every)
    assert sorted(all_columns(mini_batch.micro_batches, "advantages")) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_batch_without_a_token_in_the_loss_has_no_kl_to_the_reference(model: str, ranks: Ranks, share: Share) -> None:
    """A 0 would lower an adaptive coefficient."""
    cut_off = [replace(item.completion, finish_reason=FinishReason.LENGTH) for item in share.items]
    items = tuple(replace(item, completion=completion) for item, completion in zip(share.items, cut_off, strict=True))
    algorithm = {"advantage": "reinforce_plus_plus", "overlong": "mask"}
    _, preparation = opened(model, ranks, algorithm=algorithm, kl={"coef": 0.5, "place": "reward"})
    prepared = preparation.prepare(replace(share, items=items))
    assert prepared.reward_kl is not None
    assert np.isnan(prepared.reward_kl)


def test_kl_in_the_loss_reads_the_reference_and_its_coefficient(model: str, ranks: Ranks, share: Share) -> None:
    models, preparation = opened(model, ranks, kl={"coef": 0.5, "form": "k2", "target": 1.0, "horizon": 10})
    other, plain = opened(model, ranks)
    (mini_batch,) = preparation.prepare(share).mini_batches
    (without,) = plain.prepare(share).mini_batches
    first = models.policy.update(mini_batch.micro_batches, preparation.loss(mini_batch), 0.0)
    assert first.sums["kl_reference"] == pytest.approx(0.0, abs=1e-6), "the policy is the reference"
    base = other.policy.update(without.micro_batches, plain.loss(without), 0.0)
    assert first.sums["loss"] == pytest.approx(base.sums["loss"], abs=1e-6)
    models.policy.update(mini_batch.micro_batches, preparation.loss(mini_batch), 1e-2)
    losses = []
    for coefficient in (0.5, 1.5):
        models.kl.value = coefficient
        losses.append(models.policy.update(mini_batch.micro_batches, preparation.loss(mini_batch), 0.0).sums)
    per_token = losses[0]["kl_reference"] / losses[0]["tokens"]
    assert per_token > 1e-4
    assert losses[1]["loss"] - losses[0]["loss"] == pytest.approx(per_token, rel=1e-3)


def test_only_the_completions_of_a_function_without_signal_lose_it_in_gdpo(
    model: str, ranks: Ranks, share: Share
) -> None:
    functions = [{"use": "gsm8k", "weight": 1.0}, {"use": "gsm8k_flexible", "weight": 0.5}]
    _, preparation = opened(model, ranks, algorithm={"advantage": "gdpo"}, rewards={"functions": functions})
    (mini_batch,) = preparation.prepare(share).mini_batches
    advantages = np.array(all_columns(mini_batch.micro_batches, "advantages"))
    assert advantages.mean() == pytest.approx(0.0, abs=1e-5)
    assert advantages.std(ddof=1) == pytest.approx(1.0, rel=1e-4)


def test_remax_compares_with_the_greedy_completion(model: str, ranks: Ranks, share: Share) -> None:
    _, preparation = opened(model, ranks, algorithm={"advantage": "remax"})
    (mini_batch,) = preparation.prepare(share).mini_batches
    wanted = {
        round(float(share.rewards[item.group, item.sample] - share.greedy_rewards[item.group]), 5)
        for item, row in zip(share.items, loss_rows(share, 2, False), strict=True)
        if len(row.kept)
    }
    assert {round(value, 5) for value in all_columns(mini_batch.micro_batches, "advantages")} == wanted


def test_values_come_from_before_the_batch_and_make_advantages_and_returns(
    model: str, ranks: Ranks, share: Share
) -> None:
    algorithm = {"advantage": "gae", "gamma": 0.9, "lam": 0.8, "updates_per_batch": 2}
    models, preparation = opened(model, ranks, algorithm=algorithm)
    assert models.critic is not None
    give_head(models.critic)
    rows = [row for row in loss_rows(share, 2, False) if len(row.kept)]
    wanted: list[list[float]] = []
    for row, values in zip(rows, slow_values(model, rows), strict=True):
        value, advantage, of_row = values.tolist(), 0.0, []
        for place in reversed(range(len(value))):
            last = place == len(value) - 1
            reward, after = (float(share.rewards.flat[row.place]), 0.0) if last else (0.0, value[place + 1])
            advantage = reward + 0.9 * after - value[place] + 0.9 * 0.8 * advantage
            of_row.append([value[place], advantage + value[place], advantage])
        wanted += of_row
    raw = [advantage for _, _, advantage in wanted]
    mean = sum(raw) / len(raw)
    std = (sum((advantage - mean) ** 2 for advantage in raw) / (len(raw) - 1) + 1e-8) ** 0.5
    prepared = preparation.prepare(share)
    assert len(prepared.mini_batches) == 2
    batches = [batch for mini_batch in prepared.mini_batches for batch in mini_batch.micro_batches]
    found = zip(*(all_columns(batches, name) for name in ("values", "returns", "advantages")), strict=True)
    whitened = sorted([value, goal, (advantage - mean) / std] for value, goal, advantage in wanted)
    for got, expected in zip(sorted(map(list, found)), whitened, strict=True):
        assert got == pytest.approx(expected, rel=1e-4, abs=5e-5)
    for mini_batch in prepared.mini_batches:
        own = mini_batch.micro_batches
        pairs = zip(all_columns(own, "values"), all_columns(own, "returns"), strict=True)
        squares = [(value - goal) ** 2 / 2 for value, goal in pairs]
        step = models.critic.update(own, preparation.value_loss(mini_batch), 0.0)
        assert step.sums["loss"] == pytest.approx(sum(squares) / len(squares), rel=1e-5)


@pytest.fixture(scope="module")
def by_one_rank(two_ranks: World, ranks: Ranks) -> dict[str, Any]:
    return prepared(str(two_ranks.folder / "untied"), ranks)


@pytest.mark.timeout(300)  # waits for a whole world of ranks
@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_prepare_one_batch_as_one_rank_does(name: str, two_ranks: World, by_one_rank: dict[str, Any]) -> None:
    alone = by_one_rank[name]
    of_ranks = [rank["prepared"][name] for rank in two_ranks.seen]
    for seen in of_ranks:
        assert (seen["places"], seen["totals"]) == (alone["places"], alone["totals"])
        for numbers in ("losses", "norms", "critic_losses", "critic_norms"):
            assert seen[numbers] == pytest.approx(alone[numbers], rel=1e-4, abs=1e-6)
        assert seen["mismatch"] == pytest.approx(alone["mismatch"], rel=1e-5, abs=1e-4)
        assert seen["reward_kl"] == pytest.approx(alone["reward_kl"], abs=1e-6)
    together = sorted(tuple(token) for seen in of_ranks for token in seen["tokens"])
    assert len(together) == len(alone["tokens"]) > max(len(seen["tokens"]) for seen in of_ranks) > 0
    for got, wanted in zip(together, sorted(alone["tokens"]), strict=True):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)
