"""One batch, from a rank's share to what its updates need.

Runs in every learner rank between take and update; collective. Every rank has the rewards of the whole batch and only
its own completions; what is made of both is the same on all, because sums go through `Ranks`. `Preparation.prepare` is
the order of things; each of its steps stands in a file of its own.

Legend: L tokens of one completion, K tokens inside the loss of one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.aggregation import Aggregation, Totals
from learner.batches import MicroBatch, Row, counts, pack, spread
from learner.corrections import Corrections, corrections
from learner.credit import Credit, token_kl, with_column
from learner.entropy import entropy_histogram, entropy_threshold
from learner.losses import LossAndSums, PolicyLoss
from learner.mini_batches import MiniBatch, loss_rows, mini_batch_places
from learner.mismatch import SUM_NAMES, mismatch_sums
from learner.models import Models
from learner.policy import Loss
from learner.ranks import Ranks
from learner.schedule import critic_warmup_steps
from learner.value_loss import ValueLoss
from protocol.algorithm import CorrectionsConfig
from protocol.config import Config
from protocol.types import Share


@dataclass(frozen=True, eq=False)
class Prepared:
    """A batch that is ready for its updates."""

    mini_batches: list[MiniBatch]
    missing_logprobs: float  # tokens of all ranks
    reward_kl: float | None  # per token, policy before the batch to reference; None: it is no part of rewards
    mismatch: dict[str, float] | None  # sums of all ranks; None: to be had from the only update's log-probabilities


class Preparation:
    """Makes `Prepared` of shares."""

    def __init__(self, config: Config, ranks: Ranks, models: Models) -> None:
        self._config, self._ranks, self._models = config, ranks, models
        self._credit = Credit(config, ranks)
        self._num_alone = critic_warmup_steps(config)  # steps without an update of the policy
        self._kl_in_reward = models.reference is not None and config.kl.place == "reward"

    def prepare(self, share: Share) -> Prepared:
        """Everything that is known of the batch before its first update."""
        rows = loss_rows(share, self._config.staleness.max, self._config.algorithm.overlong == "mask")
        missing = self._ranks.sum_across(counts(rows))["missing_logprobs"]
        micro_batches = self._pack(rows)
        entropies: list[Tensor] = []
        critic, needs_proximal = self._models.critic, self._needs_proximal or share.step < self._num_alone
        if needs_proximal:
            predicted = self._models.policy.logprobs_and_entropies(micro_batches)
            entropies = [entropy for _, entropy in predicted]
            rows = _spread(rows, micro_batches, "proximal_logprobs", [logprobs for logprobs, _ in predicted])
        if self._models.reference is not None:
            rows = _spread(rows, micro_batches, "reference_logprobs", self._models.reference.logprobs(micro_batches))
        if critic is not None:
            rows = _spread(rows, micro_batches, "values", critic.values(micro_batches))
        rows = self._credit.assign(rows, share, self._models.kl.value if self._kl_in_reward else 0.0)
        mismatch = None
        if needs_proximal:
            rows, mismatch = self._corrected(rows, entropies, share.step)
        kl = self._mean_kl(rows) if self._kl_in_reward else None
        return Prepared(self._mini_batches(rows, share), missing, kl, mismatch)

    def loss(self, mini_batch: MiniBatch) -> Loss:
        """The loss of this mini-batch as `Policy.update` wants it."""
        config = self._config
        loss = PolicyLoss(config.algorithm, config.kl, self._models.kl.value, self._aggregation(mini_batch))
        return loss if self._needs_proximal else OnlyUpdate(loss, config.corrections)

    def value_loss(self, mini_batch: MiniBatch) -> ValueLoss:
        """The loss of this mini-batch as `Critic.update` wants it."""
        return ValueLoss(self._config.critic, self._aggregation(mini_batch))

    def mismatch(self, micro_batches: Sequence[MicroBatch], proximal: Sequence[Tensor], step: int) -> dict[str, float]:
        """Sums over all ranks for `mismatch_curves`; `proximal` [K] of each micro-batch are from before the batch."""
        settings, device = self._config.corrections, self._ranks.device
        total = torch.zeros(len(SUM_NAMES), dtype=torch.float64, device=device)
        for packed, logprobs in zip(micro_batches, proximal, strict=True):
            batch = packed.to(device)
            corrected, ages = _corrections(settings, batch, logprobs), step - batch.versions.long()
            total += mismatch_sums(
                settings, corrected, batch.behavior_logprobs, logprobs, ages, batch.sequence_ids, batch.num_sequences
            )
        return self._ranks.sum_across(dict(zip(SUM_NAMES, total.tolist(), strict=True)))

    def _aggregation(self, mini_batch: MiniBatch) -> Aggregation:
        return Aggregation(self._config.algorithm, self._config.sampling.max_tokens, mini_batch.totals)

    @property
    def _needs_proximal(self) -> bool:
        """Whether log-probabilities from before the batch are needed before its first update.

        If not, there is only one, and its own forward pass gives them (`OnlyUpdate`): a pass less. Where there is none,
        because the critic learns alone, they are needed for the mismatch.
        """
        algorithm, lora = self._config.algorithm, self._config.lora
        one_update = algorithm.updates_per_batch * algorithm.epochs_per_batch == 1
        drops = bool(lora.rank) and lora.dropout > 0  # its pass is then of another function
        return not one_update or drops or algorithm.top_entropy_frac < 1 or self._kl_in_reward

    def _corrected(self, rows: list[Row], entropies: Sequence[Tensor], step: int) -> tuple[list[Row], dict[str, float]]:
        """The rows with the weight of each token, which is 0 below the batch's entropy threshold, and the mismatch."""
        threshold = self._entropy_threshold(entropies)
        micro_batches = self._pack(rows)  # as they were for the entropies
        proximal = [batch.proximal_logprobs.to(self._ranks.device) for batch in micro_batches]
        weights = [
            _corrections(self._config.corrections, batch, batch.proximal_logprobs).weights.masked_fill(
                entropy.cpu() < threshold, 0.0
            )
            for batch, entropy in zip(micro_batches, entropies, strict=True)
        ]
        return _spread(rows, micro_batches, "corrections", weights), self.mismatch(micro_batches, proximal, step)

    def _entropy_threshold(self, entropies: Sequence[Tensor]) -> float:
        """That of all ranks' tokens."""
        fraction = self._config.algorithm.top_entropy_frac
        if fraction == 1:
            return -np.inf
        histogram = entropy_histogram(np.concatenate([np.zeros(0, np.float32), *map(_numpy, entropies)]))
        return entropy_threshold(self._ranks.sum_array(histogram), fraction)

    def _mean_kl(self, rows: Sequence[Row]) -> float:
        sums = self._ranks.sum_across({"kl": float(sum(token_kl(row).sum() for row in rows))} | counts(rows))
        return sums["kl"] / sums["tokens"] if sums["tokens"] else math.nan

    def _mini_batches(self, rows: Sequence[Row], share: Share) -> list[MiniBatch]:
        algorithm, seed = self._config.algorithm, (self._config.run.seed, share.step)
        present = ~np.isnan(share.rewards)
        made = []
        for places in mini_batch_places(present, algorithm.updates_per_batch, algorithm.epochs_per_batch, seed):
            of_all = set(places.tolist())
            mine = [row for row in rows if row.place in of_all]
            totals = self._ranks.sum_across(counts(mine))
            made.append(MiniBatch(self._pack(mine), Totals(totals["tokens"], totals["sequences"]), places))
        return made

    def _pack(self, rows: Sequence[Row]) -> list[MicroBatch]:
        return pack(rows, self._config.learner.micro_batch_tokens)


class OnlyUpdate:
    """The loss of a batch's only update: the log-probabilities of its own forward pass are the proximal ones, too."""

    def __init__(self, loss: PolicyLoss, settings: CorrectionsConfig) -> None:
        self._loss = loss
        self._settings = settings

    def __call__(self, logprobs: Tensor, entropies: Tensor, batch: MicroBatch) -> LossAndSums:
        proximal = logprobs.detach()
        weights = _corrections(self._settings, batch, proximal).weights
        return self._loss(logprobs, entropies, replace(batch, proximal_logprobs=proximal, corrections=weights))


def _corrections(settings: CorrectionsConfig, batch: MicroBatch, proximal: Tensor) -> Corrections:
    return corrections(
        settings, batch.behavior_logprobs, proximal, batch.advantages, batch.sequence_ids, batch.num_sequences
    )


def _spread(
    rows: Sequence[Row], micro_batches: Sequence[MicroBatch], name: str, per_token: Sequence[Tensor]
) -> list[Row]:
    """The rows with a column [L] of what was computed for each micro-batch [K]."""
    return with_column(rows, name, spread(rows, micro_batches, [*map(_numpy, per_token)]))


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.cpu().numpy()
