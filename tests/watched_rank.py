"""One learner rank that trains from a broker, wired as `learner/session.py` does it, and what was seen of it.

All of it is the product's own: link, policy, trainer, publisher, recorder. Two of them also write down what went
through their hands.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learner.announcer import Announcer
from learner.batches import MicroBatch
from learner.kl import AdaptiveKl
from learner.link import Link, Standing, Taken
from learner.models import Models
from learner.policy import Loss, Policy, Update
from learner.publisher import Publisher
from learner.ranks import Ranks
from learner.recorder import Recorder
from learner.states import StateClock
from learner.trainer import Ended, Trainer
from protocol import settings
from protocol.addresses import Addresses
from protocol.config import Config
from protocol.keys import read_client_key

WAIT_S = 60.0  # of every question to the broker


class WatchedPolicy(Policy):
    """Keeps (target, behavior log-probability, advantage) of every token in each update's loss."""

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: Loss,
        learning_rate: float,
        temperature: float | None = None,
    ) -> Update:
        columns = [[b.targets.tolist(), b.behavior_logprobs.tolist(), b.advantages.tolist()] for b in micro_batches]
        self.tokens.append([token for column in columns for token in zip(*column, strict=True)])
        return super().update(micro_batches, loss, learning_rate, temperature)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tokens: list[list[tuple[int, float, float]]] = []  # by step


class WatchedRecorder(Recorder):
    """Keeps the identity, the completions and the curves of every trained batch; on each rank, of its own share."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: list[dict[str, Any]] = []
        self.curves: list[dict[str, float]] = []

    def step(self, taken: Taken, curves: dict[str, float], step_s: float, *, skipped: bool) -> None:
        share = taken.share
        self.steps.append(
            {
                "identity": [share.epoch, share.step, share.batch_digest.hex()],
                "completions": [[item.prompt, item.sample] for item in share.items],
                "rewards": share.rewards.tobytes().hex() + share.baseline_rewards.tobytes().hex(),
                "loss": curves.get("policy/loss"),  # none while a critic learns alone
                "grad_norm": curves.get("policy/grad_norm"),
                "at": time.monotonic(),
            }
        )
        self.curves.append(dict(curves))
        super().step(taken, curves, step_s, skipped=skipped)


def train_watched(run_dir: Path, ranks: Ranks) -> dict[str, Any]:
    """Train until the broker says that the run is over; what this rank saw, as plain data for JSON."""
    config = settings.load(run_dir / "config.yaml")
    policy = WatchedPolicy.open(config, config.model.path, ranks)
    assert isinstance(policy, WatchedPolicy)
    ended, recorder = train_models(run_dir, config, Models(policy, None, None, AdaptiveKl(0.0, 0.0, 1), {}), ranks)
    return {"complete": ended.complete, "steps": recorder.steps, "tokens": policy.tokens}


def train_models(run_dir: Path, config: Config, models: Models, ranks: Ranks) -> tuple[Ended, WatchedRecorder]:
    """The loop of one rank with these models. Raises what ends it."""
    standing = Standing(0, -1, b"")
    link = Link(
        Addresses.read(run_dir),
        read_client_key(run_dir / "keys" / "learner.key"),
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
        standing=standing,
        settings_digest=config.result_digest(),
        wait_s=WAIT_S,
    )
    clock = StateClock(link.say)
    announcer = Announcer(Publisher(run_dir / "snapshots", models.policy, ranks), link, ranks, lambda version: False)
    recorder = WatchedRecorder(config, run_dir, ranks, models, link, announcer, config.model.path, standing)
    try:
        ended = Trainer(config, ranks, models, link, announcer, recorder, clock, standing.version).run()
    finally:
        recorder.close()
        link.close("the test is over")
    return ended, recorder
