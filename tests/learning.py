"""Small policies and their steps, for tests of the learner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from learner.aggregation import Aggregation, Totals
from learner.batches import Row, counts, pack
from learner.losses import PolicyLoss
from learner.policy import Policy, Update
from learner.ranks import Ranks
from protocol.algorithm import AlgorithmConfig, KlConfig
from protocol.config import Config
from protocol.examples import Example
from protocol.sections import LearnerConfig, WarmupConfig
from tests.models import make_tiny_qwen2
from tests.rows import VOCAB, random_rows

STEPS = [(11, 9), (12, 1), (13, 14), (14, 6)]  # seed and number of rows
RATE = 1e-4
BUDGETS = (1, 64, 100_000)  # of a micro-batch: one sequence each, some packed, all in one


def model_folder(folder: Path, tied: bool = True, seed: int = 0) -> str:
    """A tiny model with weights and tokenizer, by path. Its logits are of size 1: rounding stays small."""
    lm = make_tiny_qwen2(folder, tied, VOCAB, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08 + ("norm" in name))
    lm.save_pretrained(folder)
    return str(folder)


def config(zero: int = 0, **learner: Any) -> Config:
    settings = {"learning_rate": 1e-3, "zero": zero, "logprob_chunk_tokens": 16, "clip_grad": 1.0} | learner
    dtype = settings.pop("dtype", "float32")
    passthrough = settings.pop("deepspeed", {})
    temperature = settings.pop("temperature", 1.0)
    lora = settings.pop("lora", {})
    return Config.model_validate(
        {
            "learner": settings,
            "model": {"dtype": dtype},
            "deepspeed": passthrough,
            "sampling": {"temperature": temperature},
            "lora": lora,
        }
    )


def open_policy(model_path: str, ranks: Ranks, zero: int = 0, **learner: Any) -> Policy:
    return Policy.open(config(zero, **learner), model_path, ranks)


def logprobs_one_by_one(lm: Qwen2ForCausalLM, row: Row, temperature: float) -> torch.Tensor:
    """Log-probabilities of a row's kept tokens, by transformers' own forward with whole logits."""
    ids = torch.tensor([*row.prompt_tokens.tolist(), *row.completion_tokens.tolist()])
    logprobs = (lm(ids[None]).logits[0] / temperature).log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
    return logprobs[len(row.prompt_tokens) - 1 + torch.from_numpy(row.kept)]


def padded_gradient(path: str, rows: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of `slow_loss`, averaged over tokens."""
    return padded_rows_gradient(path, [(row, 0.0) for row in rows], lambda logprobs, row, _: slow_loss(logprobs, row))


def padded_rows_gradient(
    path: str, rows: list[tuple[Row, float]], loss_of_row: Callable[[torch.Tensor, Row, float], torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient in plain torch: one padded batch with an attention mask, whole logits, a loss written anew.

    `loss_of_row`: (log-probabilities of the row's kept tokens, row, its number) -> losses of these tokens.
    """
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    sequences = [torch.tensor([*row.prompt_tokens.tolist(), *row.completion_tokens.tolist()]) for row, _ in rows]
    ids = pad_sequence(sequences, batch_first=True)
    mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    logprobs = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    losses = []
    for (row, number), sequence, of_row in zip(rows, sequences, logprobs, strict=True):
        predicted_at = len(row.prompt_tokens) - 1 + torch.from_numpy(row.kept)
        losses.append(loss_of_row(of_row[predicted_at, sequence[predicted_at + 1]], row, number))
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}


def slow_loss(logprobs: torch.Tensor, row: Row) -> torch.Tensor:
    """The default loss of a row's kept tokens, written anew; ratios are those to its proximal log-probabilities."""
    assert row.proximal_logprobs is not None
    assert row.advantages is not None
    assert row.corrections is not None
    columns = (row.proximal_logprobs, row.advantages, row.corrections)
    proximal, advantages, weights = (torch.from_numpy(column[row.kept]) for column in columns)
    ratio = (logprobs - proximal).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * weights


def loss_of(settings: AlgorithmConfig, rows: list[Row], ranks: Ranks) -> PolicyLoss:
    """The policy loss of the batch that all ranks' rows make."""
    totals = ranks.sum_across(counts(rows))
    aggregation = Aggregation(settings, 30, Totals(totals["tokens"], totals["sequences"]))
    return PolicyLoss(settings, KlConfig(), 0.0, aggregation)


def sampled_batch(path: str) -> list[Row]:
    """Seven rows of `sampled_steps`: neither two ranks nor three have equal numbers of them."""
    return max(sampled_steps(path), key=len)[:7]


def gradient(
    policy: Policy, ranks: Ranks, rows: list[Row], budget_tokens: int, aggregation: str = "token_mean"
) -> tuple[dict[str, torch.Tensor], Update]:
    """The gradient by name that AdamW was given, summed over micro-batches and ranks; weights stay as they are.

    Taken from the first moment after one step, which is (1 - beta1) times it: read where checkpoints read, alike at
    every ZeRO stage, and after everything that could go wrong with it. The policy must not clip.
    """
    policy.reset_optimizer()
    update = train_step(policy, ranks, rows, budget_tokens, 0.0, aggregation)
    share_of_gradient = 1.0 - LearnerConfig().betas[0]
    return {name: state["exp_avg"] / share_of_gradient for name, state in policy.training_state()}, update


@torch.no_grad()
def sampled_steps(path: str, temperature: float = 1.0) -> list[list[Row]]:
    """The rows of `STEPS` as if a policy near the model had sampled them: ratios on both sides of the clips."""
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    steps = []
    for seed, number in STEPS:
        rng = np.random.default_rng(seed)
        rows = [row for row in random_rows(seed, number) if len(row.kept)]
        for row in rows:
            row.behavior_logprobs[row.kept] = logprobs_one_by_one(lm, row, temperature).numpy()
            row.behavior_logprobs[row.kept] += rng.normal(0.0, 0.2, len(row.kept)).astype(np.float32)
        steps.append([replace(row, proximal_logprobs=row.behavior_logprobs) for row in rows])
    return steps


def train_step(
    policy: Policy,
    ranks: Ranks,
    rows: list[Row],
    budget_tokens: int = 64,
    learning_rate: float = 1e-3,
    aggregation: str = "token_mean",
) -> Update:
    """One update on `rows`, of which every rank takes its share, as the trainer does it."""
    mine = rows[ranks.rank :: ranks.num_ranks]
    loss = loss_of(AlgorithmConfig.model_validate({"aggregation": aggregation}), mine, ranks)
    return policy.update(pack(mine, budget_tokens), loss, learning_rate)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    """Float32 master weights by name."""
    return {name: state["fp32"].clone() for name, state in policy.training_state()}


def whole_state(policy: Policy) -> dict[str, torch.Tensor]:
    """Master weights and moments by key and name."""
    return {f"{key}/{name}": value.clone() for name, state in policy.training_state() for key, value in state.items()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def largest_relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over norm, of the parameter where it is largest."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in b)


def assert_trained_alike(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Weights after some steps at `RATE` are equal but for rounding.

    Of a gradient that is almost zero, whose sign is rounding, Adam makes a whole learning rate; such elements are few.
    So the model as a whole must agree to 1e-5 of its norm, each parameter to 1e-4, and all but one of ten thousand
    elements to 1e-6, which is 1e-5 of a weight. An advantage that is 1% off in one row of one step fails all but the
    second.
    """
    assert a.keys() == b.keys()
    differences = torch.cat([(a[name] - b[name]).flatten() for name in b])
    assert differences.norm() < 1e-5 * torch.cat([value.flatten() for value in b.values()]).norm()
    assert largest_relative_difference(a, b) < 1e-4
    assert (differences.abs() > 1e-6).float().mean() < 1e-4


def examples(number: int = 12) -> list[Example]:
    """Prompts and answers from one rule, so that they can be learned: the answer repeats the prompt's first token."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 12, int(rng.integers(1, 6))).astype(np.int32) for _ in range(number)]
    return [Example(prompt, np.array([prompt[0], prompt[0], 1], dtype=np.int32)) for prompt in prompts]


def warmup_settings(steps: int) -> WarmupConfig:
    return WarmupConfig(steps=steps, learning_rate=1e-3, batch_size=5)
