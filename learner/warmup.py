"""Supervised warm start: the policy learns to write given answers before it is rewarded for its own.

Runs in every learner rank, before reinforcement learning and in `tools/sft.py`; packing, engine and numerics are those
of the policy's own updates. Which rows a step has depends on seed and step only, so the number of ranks changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from learner.aggregation import Totals
from learner.batches import Row, counts, pack
from learner.losses import SupervisedLoss
from learner.policy import Policy
from learner.ranks import Ranks
from learner.schedule import learning_rate
from protocol.examples import Example
from protocol.sections import WarmupConfig


class WarmupStep(NamedTuple):
    """What one supervised step was."""

    step: int
    loss: float  # mean negative log-probability of an answer token
    learning_rate: float
    grad_norm: float
    applied: bool


def warm_up(
    policy: Policy,
    examples: Sequence[Example],
    settings: WarmupConfig,
    seed: int,
    micro_batch_tokens: int,
    ranks: Ranks,
    report: Callable[[WarmupStep], None],
) -> None:
    """Train `settings.steps` supervised steps on the answers; afterwards the optimizer starts anew. Collective."""
    for step in range(settings.steps):
        chosen = batch_of_step(len(examples), settings.batch_size, step, seed)
        rows = [_row(examples[index]) for index in chosen[ranks.rank :: ranks.num_ranks]]
        totals = ranks.sum_across(counts(rows))
        loss = SupervisedLoss(Totals(totals["tokens"], totals["sequences"]))
        rate = learning_rate(step, settings.steps, settings.learning_rate, "linear")
        update = policy.update(pack(rows, micro_batch_tokens), loss, rate, temperature=1.0)
        report(WarmupStep(step, update.sums["loss"], rate, update.grad_norm, update.applied))
    policy.reset_optimizer()


def batch_of_step(num_examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Rows of one step: passes over all of them, each in an order of its own."""
    places = range(step * batch_size, (step + 1) * batch_size)
    passes = {place // num_examples for place in places}
    orders = {number: np.random.default_rng((seed, number)).permutation(num_examples) for number in passes}
    return [int(orders[place // num_examples][place % num_examples]) for place in places]


def _row(example: Example) -> Row:
    length = len(example.answer_tokens)
    return Row(
        prompt_tokens=example.prompt_tokens,
        completion_tokens=example.answer_tokens,
        in_loss=np.ones(length, dtype=np.bool_),
        behavior_logprobs=np.zeros(length, dtype=np.float32),
        versions=np.zeros(length, dtype=np.int32),
    )
