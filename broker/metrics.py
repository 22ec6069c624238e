"""The broker's curves: what it alone knows of a batch, of the ledger and of the generators.

They travel to learner rank 0 with the batch; rank 0 is the one writer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from broker.batches import Batch
from broker.peers import Peer
from broker.run_state import RunState
from protocol.fields import MAX_METRICS
from protocol.messages import Role
from protocol.types import Trajectory

MAX_SINGLE = 64  # generators that have curves of their own: more are not read, and thousands would not fit the message
SHOWN = ("running", "waiting", "kv_usage", "generated_tokens", "apply_s", "pause_s")  # of what generators report


def batch_numbers(run: RunState, batch: Batch, now: float) -> dict[str, float]:
    """Curves of one batch at its cut."""
    scheduler = run.scheduler_now()
    ages = [scheduler.version - lease.grant.version for lease in scheduler.leases.open.values()]
    numbers = {f"ledger/{name}": float(count) for name, count in scheduler.ledger.counts().items()}
    trajectories = [trajectory for group in batch.groups for trajectory in group.trajectories]
    numbers |= reward_means([each for each in trajectories if each.sample < run.config.batch.group_size])
    numbers |= {f"broker/results_{status}": float(count) for status, count in run.num_results.items()}
    numbers["staleness/in_flight"] = float(np.mean(ages)) if ages else 0.0
    numbers["broker/open_groups"] = float(len(scheduler.leases.open))
    numbers["completion/error_frac"] = _error_share(run)
    generators = run.peers.of_role(Role.GENERATOR)
    numbers |= _one_by_one(generators) if len(generators) <= MAX_SINGLE else _together(generators)
    applied = [peer.numbers["apply_s"] for peer in generators if peer.numbers.get("apply_s")]
    if applied:
        numbers["weights/apply_s"] = float(np.mean(applied))
    return numbers


def _one_by_one(generators: Sequence[Peer]) -> dict[str, float]:
    shown = [(peer, name) for peer in generators for name in SHOWN if name in peer.numbers]
    return {f"generator/{peer.name}/{name}": peer.numbers[name] for peer, name in shown}


def _together(generators: Sequence[Peer]) -> dict[str, float]:
    """Least, mean and most over all of them."""
    numbers: dict[str, float] = {}
    for name in SHOWN:
        if values := [peer.numbers[name] for peer in generators if name in peer.numbers]:
            numbers[f"generators/{name}_min"] = min(values)
            numbers[f"generators/{name}_mean"] = float(np.mean(values))
            numbers[f"generators/{name}_max"] = max(values)
    return numbers


def reward_means(trajectories: list[Trajectory]) -> dict[str, float]:
    """Mean of each function over the trajectories on which it had an opinion, and of what it returned beside that."""
    values: dict[str, list[float]] = defaultdict(list)
    metrics: dict[str, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        for name, value in trajectory.rewards.items():
            if value is not None:
                values[name].append(value)
        for name, number in trajectory.metrics.items():
            metrics[name].append(number)
    values |= {name: metrics[name] for name in sorted(metrics)[:MAX_METRICS]}  # keys may differ by completion
    return {f"reward/{name}": float(np.mean(found)) for name, found in values.items()}


def _error_share(run: RunState) -> float:
    total = sum(run.num_results.values())
    return (run.num_results.get("invalid", 0) + run.num_errors) / total if total else 0.0
