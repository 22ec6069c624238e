"""The models of a learner rank: the policy, and what stands beside it where the settings ask for it.

Runs in every learner rank; opened together, and together in the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner import checkpoint
from learner.critic import Critic
from learner.kl import AdaptiveKl
from learner.policy import Policy
from learner.ranks import Ranks
from learner.reference import BaseReference, Reference
from protocol.algorithm import LoraConfig
from protocol.config import Config


@dataclass(frozen=True, eq=False)
class Models:
    """Made by `Models.open`."""

    policy: Policy
    reference: Reference | BaseReference | None  # None where `kl.coef` is 0
    critic: Critic | None  # None where `algorithm.advantage` is not gae
    kl: AdaptiveKl  # the coefficient of the KL to the reference
    beside: dict[str, checkpoint.Model]  # what else a checkpoint holds, by name

    @classmethod
    def open(cls, config: Config, ranks: Ranks) -> Models:
        """Load what the settings ask for; collective. Raises ConfigError if it cannot be used."""
        policy = Policy.open(config, config.model.path, ranks)
        reference: Reference | BaseReference | None = None
        if config.kl.coef:
            reference = BaseReference(policy) if policy.base else Reference.open(config, config.model.path, ranks)
        critic = Critic.open(config, ranks) if config.algorithm.advantage == "gae" else None
        kl = AdaptiveKl(config.kl.coef, config.kl.target, config.kl.horizon)
        beside: dict[str, checkpoint.Model] = {}
        is_model_path = not (config.kl.reference_update_every or config.warmup.steps)
        if isinstance(reference, Reference) and not is_model_path:
            beside["reference"] = reference
        if critic:
            beside["critic"] = critic
        return cls(policy, reference, critic, kl, beside)

    def policy_to_warm(self, config: Config, ranks: Ranks) -> Policy:
        """What the supervised warm start trains: all weights, also in a run that then trains adapters; collective.

        In such a run it is a policy of its own, in memory beside the other until `warmed_up`.
        """
        if self.policy.base is None:
            return self.policy
        return Policy.open(config.model_copy(update={"lora": LoraConfig()}), config.model.path, ranks)

    def warmed_up(self, policy: Policy, config: Config) -> None:
        """The warm start is over: `policy` is what reinforcement learning starts from.

        The reference begins as it, and so does a critic without `critic.path`.
        """
        if self.policy.base is not None:
            self.policy.base.take(policy)
        if isinstance(self.reference, Reference):
            self.reference.follow(policy, rate=1.0)
        if self.critic is not None and not config.critic.path:
            self.critic.start_from(policy)
        if policy is not self.policy:
            policy.close()

    def save(self, folder: Path, version: int, extras: dict[str, Any], keep: int, ranks: Ranks) -> Path:
        """Write a checkpoint; collective."""
        return checkpoint.save(folder, version, self.policy, extras | {"kl": self.kl.state()}, keep, ranks, self.beside)

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint; returns the extras. Collective."""
        extras = checkpoint.load(path, self.policy, self.beside)
        if self.policy.base is not None and (path / "base").is_dir():
            self.policy.base.restore(path / "base")
        self.kl.restore(extras["kl"])
        return extras
