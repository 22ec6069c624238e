"""One of several learner ranks over gloo: trains at every ZeRO stage and writes down what it saw.

Started by `tests/rank_processes.py`, with the parts to run in order. What is written is compared with one rank by the
tests.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GATHER_EVERYTHING = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # small parameters, too
DEATH_REPEAT_S = 0.5  # what a dying broker left unanswered is asked again sooner than in life


def main(folder: Path, parts: Sequence[str]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    from learner.ranks import Ranks

    torch.set_num_threads(1)
    ranks = Ranks.open(os.environ, "cpu", timeout_s=60)
    seen: dict[str, Any] = {}
    for part in parts:
        seen |= PARTS[part](folder, ranks)
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(seen))


def gradients(folder: Path, ranks: Any) -> dict[str, Any]:
    """The gradient of one batch at every ZeRO stage and budget, and of a critic; rank 0 writes it down by name."""
    from safetensors.torch import save_file

    from tests.critics import critic_gradient, open_critic, valued_rows
    from tests.learning import BUDGETS, gradient, open_policy, sampled_batch

    found, updates = {}, {}
    rows = sampled_batch(str(folder / "untied"))
    for zero in range(4):
        policy = open_policy(str(folder / "untied"), ranks, zero, clip_grad=0.0, deepspeed=GATHER_EVERYTHING)
        for budget in BUDGETS:
            by_name, update = gradient(policy, ranks, rows, budget)
            found |= {f"{zero}/{budget}/{name}": value for name, value in by_name.items()}
            updates[f"{zero}/{budget}"] = [update.sums["loss"], update.grad_norm, update.num_micro_batches]
        critic = open_critic(str(folder / "untied"), ranks, zero, clip_grad=0.0, deepspeed=GATHER_EVERYTHING)
        by_name, step = critic_gradient(critic, ranks, valued_rows(), BUDGETS[1])
        found |= {f"{zero}/critic/{name}": value for name, value in by_name.items()}
        updates[f"{zero}/critic"] = [step.sums["loss"], step.grad_norm, step.num_micro_batches]
    if ranks.is_first:
        save_file(found, folder / "gradients.safetensors")
    return {"gradients": updates}


def adapters(folder: Path, ranks: Any) -> dict[str, Any]:
    """Train adapters and publish them; rank 0 writes down what they became, by stage and name."""
    from safetensors.torch import save_file

    from learner.publisher import Publisher
    from tests.learning import RATE, open_policy, sampled_steps, train_step, weights

    found, norms, model = {}, {}, str(folder / "untied")
    for zero in (0, 2, 3):
        policy = open_policy(model, ranks, zero, deepspeed=GATHER_EVERYTHING, lora={"rank": 4})
        updates = [train_step(policy, ranks, rows, learning_rate=RATE) for rows in sampled_steps(model)]
        norms[str(zero)] = [update.grad_norm for update in updates]
        found |= {f"{zero}/{name}": value for name, value in weights(policy).items()}
        publisher = Publisher(folder / f"adapters{zero}", policy, ranks)
        publisher.copy(4)
        if ranks.is_first:
            publisher.finish()
    if ranks.is_first:
        save_file(found, folder / "adapters.safetensors")
    return {"adapters": norms}


def prepared(folder: Path, ranks: Any) -> dict[str, Any]:
    from tests.prepared import prepared

    return {"prepared": prepared(str(folder / "untied"), ranks)}


def served(folder: Path, ranks: Any) -> dict[str, Any]:
    from tests.watched_rank import train_watched

    return {"served": train_watched(folder / "served", ranks)}


def bereaved(folder: Path, ranks: Any) -> dict[str, Any]:
    import protocol.channel
    from tests.watched_rank import train_watched

    protocol.channel.REPEAT_S = DEATH_REPEAT_S
    return {"bereaved": train_watched(folder / "bereaved", ranks)}


def alone(folder: Path, ranks: Any) -> dict[str, Any]:
    """All that needs no broker; the ranks part in it, so nothing can follow."""
    seen = collectives(ranks)
    for zero in range(4):
        seen[f"zero{zero}"] = training(folder, ranks, zero)
    seen["restored"] = restoring(folder, ranks)
    seen["supervised"] = supervised(folder, ranks)
    seen["alone"] = waiting_for_a_rank_that_does_not_come(ranks)
    return seen


def collectives(ranks: Any) -> dict[str, Any]:
    last = ranks.num_ranks - 1
    huge = (1 << 127) + 5
    return {
        "equal": ranks.same_everywhere((huge, -1, 7)),
        "unequal": ranks.same_everywhere((huge, -1, 7 + (ranks.rank == last))),
        "sum": ranks.sum_across({"b": ranks.rank, "a": 0.5}),
        "max": ranks.max_across({"b": ranks.rank, "a": -1.0}),
        "any": [ranks.any_true(ranks.rank == last), ranks.any_true(False)],
        "first": ranks.first_rank_says(1000 + ranks.rank),
    }


def training(folder: Path, ranks: Any, zero: int) -> dict[str, Any]:
    import torch

    from learner.batches import pack
    from learner.checkpoint import save
    from learner.publisher import Publisher
    from tests.learning import RATE, open_policy, sampled_steps, train_step, whole_state
    from tests.rows import random_rows

    model = str(folder / ("tied" if zero % 2 else "untied"))
    policy = open_policy(model, ranks, zero)
    updates = [train_step(policy, ranks, rows, learning_rate=RATE) for rows in sampled_steps(model)]
    save(folder / f"checkpoints{zero}", len(updates), policy, {"who": ranks.rank}, 1, ranks)

    publisher = Publisher(folder / f"snapshots{zero}", policy, ranks)
    publisher.copy(4)
    if ranks.is_first:
        publisher.finish()

    before, last = whole_state(policy), ranks.rank == ranks.num_ranks - 1
    rows = random_rows(5, 7)[ranks.rank :: ranks.num_ranks]
    factor = torch.inf if last else 0.01
    skipped = policy.update(pack(rows, 64), lambda logprobs, *_: (logprobs.sum() * 0.01 + (factor - 0.01), {}), RATE)
    after = whole_state(policy)
    return {
        "norms": [update.grad_norm for update in updates],
        "losses": [update.sums["loss"] for update in updates],
        "tokens": [update.sums["tokens"] for update in updates],
        "micro_batches": [update.num_micro_batches for update in updates],
        "skipped": not skipped.applied,
        "unchanged": all(torch.equal(before[name], after[name]) for name in before),
    }


def restoring(folder: Path, ranks: Any) -> dict[str, Any]:
    """Go on from the one-rank checkpoint that the test wrote, at stage 3: slices of unlike lengths."""
    from safetensors.torch import save_file

    from learner.checkpoint import load
    from tests.learning import RATE, open_policy, sampled_steps, train_step, whole_state

    policy = open_policy(str(folder / "tied"), ranks, 3)
    extras = load(folder / "one_rank" / "step_2", policy)
    state = whole_state(policy)
    update = train_step(policy, ranks, sampled_steps(str(folder / "tied"))[2], learning_rate=RATE)
    if ranks.is_first:
        save_file(state, folder / "restored.safetensors")
    return {
        "extras": {name: list(value) for name, value in extras.items()},
        "norm": update.grad_norm,
        "applied": policy.num_applied,
    }


def supervised(folder: Path, ranks: Any) -> list[float]:
    from learner.warmup import warm_up
    from tests.learning import examples, open_policy
    from tests.learning import warmup_settings as settings

    losses: list[float] = []
    policy = open_policy(str(folder / "tied"), ranks, 1)
    warm_up(policy, examples(), settings(steps=4), 3, 64, ranks, lambda step: losses.append(step.loss))
    return losses


def waiting_for_a_rank_that_does_not_come(ranks: Any) -> str:
    from protocol.errors import PeerTimeout

    if not ranks.is_first:
        return ""
    try:
        ranks.barrier("write down nothing", timeout_s=0.5)
    except PeerTimeout as error:
        return str(error)
    return "nobody was missed"


PARTS = {
    "gradients": gradients,
    "prepared": prepared,
    "adapters": adapters,
    "served": served,
    "bereaved": bereaved,
    "alone": alone,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
