"""The models of a learner rank: the policy, and what stands beside it where the settings ask for it.

Runs in every learner rank; opened together, and together in the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner import checkpoint
from learner.kl import AdaptiveKl
from learner.policy import Policy
from learner.ranks import Ranks
from learner.reference import Reference
from protocol.config import Config


@dataclass(frozen=True, eq=False)
class Models:
    """Made by `Models.open`."""

    policy: Policy
    reference: Reference | None  # None where `kl.coef` is 0
    kl: AdaptiveKl  # the coefficient of the KL to the reference
    beside: dict[str, checkpoint.Model]  # what else a checkpoint holds, by name

    @classmethod
    def open(cls, config: Config, ranks: Ranks) -> Models:
        """Load what the settings ask for; collective. Raises ConfigError if it cannot be used."""
        policy = Policy.open(config, config.model.path, ranks)
        reference = Reference.open(config, config.model.path, ranks) if config.kl.coef else None
        kl = AdaptiveKl(config.kl.coef, config.kl.target, config.kl.horizon)
        beside: dict[str, checkpoint.Model] = {}
        if reference and (config.kl.reference_update_every or config.warmup.steps):  # else it is that of model.path
            beside["reference"] = reference
        return cls(policy, reference, kl, beside)

    def warmed_up(self) -> None:
        """The supervised warm start is over: the policy is now what the reference shall be."""
        if self.reference is not None:
            self.reference.follow(self.policy, rate=1.0)

    def save(self, folder: Path, version: int, extras: dict[str, Any], keep: int, ranks: Ranks) -> Path:
        """Write a checkpoint; collective."""
        return checkpoint.save(folder, version, self.policy, extras | {"kl": self.kl.state()}, keep, ranks, self.beside)

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint; returns the extras. Collective."""
        extras = checkpoint.load(path, self.policy, self.beside)
        self.kl.restore(extras["kl"])
        return extras
