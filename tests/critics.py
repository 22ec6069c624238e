"""Small critics and their steps, for tests of the learner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

from learner.aggregation import Aggregation, Totals
from learner.batches import Row, counts, pack
from learner.critic import Critic
from learner.ranks import Ranks
from learner.trained_model import OptimizerStep
from learner.value_loss import ValueLoss
from protocol.algorithm import AlgorithmConfig, CriticConfig
from protocol.config import Config
from tests.learning import config
from tests.rows import random_rows

CLIP = 0.5


def critic_config(model_path: str, zero: int = 0, critic: Mapping[str, Any] | None = None, **learner: Any) -> Config:
    base = config(zero, **learner).model_dump()
    base["model"]["path"] = model_path
    base["algorithm"]["advantage"] = "gae"
    base["critic"] |= critic or {}
    return Config.model_validate(base)


def open_critic(model_path: str, ranks: Ranks, zero: int = 0, **changes: Any) -> Critic:
    """One whose head has weights."""
    critic = Critic.open(critic_config(model_path, zero, **changes), ranks)
    give_head(critic)
    return critic


def random_head(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"score.weight": torch.randn(1, size, generator=generator) * 0.3, "score.bias": torch.tensor([0.25])}


def give_head(critic: Critic) -> None:
    """A head that says something; it starts as zero. For a critic that has not learned yet."""
    state = {name: value["fp32"].clone() for name, value in critic.training_state()}
    state |= random_head(state["score.weight"].shape[1])
    critic.restore(0, lambda name: {"fp32": state[name]})


@torch.no_grad()
def slow_values(path: str, rows: list[Row]) -> list[torch.Tensor]:
    """Values of each row's kept tokens, each from a forward pass over nothing but what stands before the token."""
    backbone = AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    head = random_head(backbone.config.hidden_size)
    found = []
    for row in rows:
        ids = torch.tensor([*row.prompt_tokens.tolist(), *row.completion_tokens.tolist()])
        prefixes = [ids[None, : len(row.prompt_tokens) + place] for place in row.kept]
        last = torch.stack([backbone(prefix).last_hidden_state[0, -1] for prefix in prefixes])
        found.append(last @ head["score.weight"][0] + head["score.bias"])
    return found


def valued_rows() -> list[Row]:
    """Seven rows with values from before the batch and with returns, on both sides of the clip."""
    rng = np.random.default_rng(3)
    rows = [row for row in random_rows(13, 14) if len(row.kept)][:7]
    lengths = [len(row.completion_tokens) for row in rows]
    olds, targets = ([rng.normal(0.2, 0.8, n).astype(np.float32) for n in lengths] for _ in range(2))
    return [replace(row, values=old, returns=goal) for row, old, goal in zip(rows, olds, targets, strict=True)]


def padded_value_gradient(path: str, rows: list[Row]) -> tuple[float, dict[str, torch.Tensor], float]:
    """Loss, gradient and clipped fraction in plain torch: one padded batch, the loss written anew, mean over tokens."""
    backbone = AutoModel.from_pretrained(path, dtype=torch.float32)
    head = {name: value.requires_grad_() for name, value in random_head(backbone.config.hidden_size).items()}
    sequences = [torch.tensor([*row.prompt_tokens.tolist(), *row.completion_tokens.tolist()]) for row in rows]
    ids = pad_sequence(sequences, batch_first=True)
    mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    losses, clipped = [], []
    for row, states in zip(rows, hidden, strict=True):
        assert row.values is not None
        assert row.returns is not None
        now = states[len(row.prompt_tokens) - 1 + torch.from_numpy(row.kept)] @ head["score.weight"][0]
        now = now + head["score.bias"]
        old, target = torch.from_numpy(row.values[row.kept]), torch.from_numpy(row.returns[row.kept])
        free = (now - target) ** 2
        bounded = (torch.minimum(torch.maximum(now, old - CLIP), old + CLIP) - target) ** 2
        losses.append(torch.maximum(free, bounded) / 2)
        clipped.append(bounded > free)
    loss = torch.cat(losses).mean()
    loss.backward()
    named = {f"{backbone.base_model_prefix}.{name}": value for name, value in backbone.named_parameters()} | head
    gradient = {name: value.grad for name, value in named.items() if value.grad is not None}
    return loss.item(), gradient, float(torch.cat(clipped).float().mean())


def value_loss_of(rows: list[Row], ranks: Ranks) -> ValueLoss:
    """That of the batch that all ranks' rows make."""
    totals = ranks.sum_across(counts(rows))
    aggregation = Aggregation(AlgorithmConfig(), 30, Totals(totals["tokens"], totals["sequences"]))
    return ValueLoss(CriticConfig(clip=CLIP), aggregation)


def critic_step(
    critic: Critic, ranks: Ranks, rows: list[Row], budget_tokens: int = 64, learning_rate: float = 1e-3
) -> OptimizerStep:
    """One update on `rows`, of which every rank takes its share, as the trainer does it."""
    mine = rows[ranks.rank :: ranks.num_ranks]
    return critic.update(pack(mine, budget_tokens), value_loss_of(mine, ranks), learning_rate)


def critic_gradient(
    critic: Critic, ranks: Ranks, rows: list[Row], budget_tokens: int
) -> tuple[dict[str, torch.Tensor], OptimizerStep]:
    """As `learning.gradient`: the gradient by name that AdamW was given; weights stay as they are."""
    critic.reset_optimizer()
    step = critic_step(critic, ranks, rows, budget_tokens, learning_rate=0.0)
    share_of_gradient = 1.0 - config().learner.betas[0]
    return {name: state["exp_avg"] / share_of_gradient for name, state in critic.training_state()}, step


def critic_state(critic: Critic) -> dict[str, torch.Tensor]:
    """Master weights and moments by key and name."""
    return {f"{key}/{name}": value.clone() for name, state in critic.training_state() for key, value in state.items()}
