"""The training loop: take, update, publish, advance.

Runs in every learner rank. Step k trains on policy version k and yields version k + 1. The order is a contract:

    take      the same batch on all ranks: its identity is compared before anything is computed from it
    update    what the batch needs first (`Preparation.prepare`), then one optimizer step for each mini-batch of it,
              of critic and policy; of the critic alone while it warms up
    publish   copy the new weights to shared memory; everything else of it happens beside the next step
    advance   told to the broker only after the snapshot exists and has its digests

Versions count batches, in however many optimizer steps each is trained. An optimizer step whose loss or gradient is not
finite is skipped on every rank and written down; three in a row end the run. A batch of which nothing was applied is a
skipped step.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from learner.announcer import Announcer
from learner.curves import batch_maxima, batch_sums, critic_curves, reward_curves, token_curves, update_curves
from learner.link import Link, Taken
from learner.mismatch import mismatch_curves
from learner.models import Models
from learner.policy import Update
from learner.preparation import Preparation, Prepared
from learner.ranks import Ranks
from learner.recorder import Recorder
from learner.reference import Reference
from learner.schedule import critic_warmup_steps, learning_rates
from learner.skips import Skips
from learner.states import State, StateClock
from learner.trained_model import OptimizerStep
from protocol.config import Config
from protocol.errors import NoProgress
from protocol.messages import Finished

log = logging.getLogger("tether.trainer")


@dataclass(frozen=True, slots=True)
class Ended:
    """Why the loop ended, and at which version."""

    version: int
    complete: bool  # False: it can be resumed


class Trainer:
    """One rank's loop. `recorder` writes curves, samples and checkpoints; on ranks other than 0 it only takes part."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        models: Models,
        link: Link,
        announcer: Announcer,
        recorder: Recorder,
        clock: StateClock,
        version: int,
    ) -> None:
        self._config, self._ranks, self._models, self._link = config, ranks, models, link
        self._preparation = Preparation(config, ranks, models)
        self._announcer, self._recorder, self._clock = announcer, recorder, clock
        self._version = version
        self._num_steps = link.num_steps
        self._skips = Skips(ranks, recorder)

    def run(self) -> Ended:
        """Train until the last step, or until the run is asked to end.

        Raises NumericError, NoProgress or PeerTimeout.
        """
        self._clock.enter(State.PUBLISHING, f"version {self._version}")
        self._announcer.announce(self._version, first=True)
        while True:
            taken = self._take(self._version)
            if isinstance(taken, Finished):
                return self._end(taken)
            applied, curves = self._update(taken)
            self._version += 1
            self._clock.enter(State.PUBLISHING, f"version {self._version}")
            self._announcer.announce(self._version, skipped=not applied)
            self._record(taken, curves, skipped=not applied)

    def _take(self, step: int) -> Taken | Finished:
        """This rank's share of the batch that all ranks agree on; asked again until they do."""
        while True:
            self._clock.enter(State.WAITING_FOR_TRAJECTORIES, f"of step {step}")
            taken = self._link.take(step, self._announcer.check)
            share = None if isinstance(taken, Finished) else taken.share
            identity = (
                (0, 0, 0) if share is None else (share.epoch, share.step, int.from_bytes(share.batch_digest, "little"))
            )
            self._clock.enter(State.WAITING_FOR_RANKS, f"at step {step}")
            if self._ranks.same_everywhere(identity):
                if isinstance(taken, Taken):
                    self._link.agreed(taken)
                return taken
            log.warning(
                "step %d: the ranks hold different batches, the broker was restarted in between; asking again", step
            )

    def _update(self, taken: Taken) -> tuple[bool, dict[str, float]]:
        """The optimizer steps of one batch: whether any was applied, and the curves of all ranks together."""
        share, policy, critic = taken.share, self._models.policy, self._models.critic
        self._clock.enter(State.TRAINING, f"step {share.step}, {len(share.items)} completions")
        rate, critic_rate = learning_rates(self._config, share.step, self._num_steps)
        prepared = self._preparation.prepare(share)
        updates: list[Update] = []
        critic_updates: list[OptimizerStep] = []
        for number, mini_batch in enumerate(prepared.mini_batches):
            batches = mini_batch.micro_batches
            if critic is not None:
                step = critic.update(batches, self._preparation.value_loss(mini_batch), critic_rate)
                self._skips.count("critic", step, number, mini_batch, share)
                critic_updates.append(step)
            if share.step >= critic_warmup_steps(self._config):
                update = policy.update(batches, self._preparation.loss(mini_batch), rate)
                self._skips.count("policy", update, number, mini_batch, share)
                updates.append(update)
        applied = any(update.applied for update in [*updates, *critic_updates])
        curves = {
            **reward_curves(share),
            **token_curves(self._ranks.sum_across(batch_sums(share, self._config.staleness.max))),
            **self._ranks.max_across(batch_maxima(share)),
            **update_curves(updates),
            **mismatch_curves(self._mismatch(prepared, updates, share.step)),
            "policy/lr": rate,
            "policy/skipped_steps": float(self._skips.total["policy"]),
            "mismatch/missing_logprobs": prepared.missing_logprobs,
            **taken.numbers,
        }
        if critic is not None:
            skipped = float(self._skips.total["critic"])
            curves |= {**critic_curves(critic_updates), "critic/lr": critic_rate, "critic/skipped_steps": skipped}
        if updates:
            self._follow(prepared, curves)
        return applied, curves

    def _mismatch(self, prepared: Prepared, updates: list[Update], step: int) -> dict[str, float]:
        if prepared.mismatch is not None:
            return prepared.mismatch
        (mini_batch,), (update,) = prepared.mini_batches, updates
        return self._preparation.mismatch(mini_batch.micro_batches, update.logprobs, step)

    def _follow(self, prepared: Prepared, curves: dict[str, float]) -> None:
        """What moves with the policy, where there is a reference: the KL's coefficient, and slowly the reference."""
        settings, models = self._config.kl, self._models
        if models.reference is None:
            return
        if prepared.reward_kl is not None:
            curves["policy/kl_reference"] = prepared.reward_kl
        curves["policy/kl_coef"] = models.kl.value
        models.kl.update(curves["policy/kl_reference"], int(curves["completion/count"]))
        every = settings.reference_update_every
        if every and (self._version + 1) % every == 0:
            assert isinstance(models.reference, Reference), "with adapters this setting is refused"
            models.reference.follow(models.policy, settings.reference_update_rate, seed=self._version + 1)

    def _record(self, taken: Taken, curves: dict[str, float], *, skipped: bool) -> None:
        shares, step_s = self._clock.shares()
        self._clock.enter(State.RECORDING)
        self._recorder.step(taken, curves | shares, step_s, skipped=skipped)
        if self._recorder.checkpoint_is_due(self._version):
            self._clock.enter(State.CHECKPOINTING, f"version {self._version}")
            self._recorder.checkpoint(self._version)

    def _end(self, finished: Finished) -> Ended:
        self._announcer.wait()
        self._clock.enter(State.CHECKPOINTING, f"version {self._version}")
        self._recorder.checkpoint(self._version)
        if self._ranks.is_first:
            self._link.refresh()
            self._recorder.evaluations()
        if finished.kind == "verdict":
            raise NoProgress(finished.reason)
        return Ended(self._version, finished.kind == "complete")
