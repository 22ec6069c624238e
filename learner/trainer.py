"""The training loop: take, update, publish, advance.

Runs in every learner rank. Step k trains on policy version k and yields version k + 1. The order is a contract:

    take      the same batch on all ranks: its identity is compared before anything is computed from it
    update    advantages from the whole batch's rewards, then forward and backward over this rank's completions
    publish   copy the new weights to shared memory; everything else of it happens beside the next step
    advance   told to the broker only after the snapshot exists and has its digests

Staleness is asserted where it is used (`_rows`): a token older than S in the loss is a bug and stops the run. A step
whose loss or gradient is not finite is skipped on every rank; three in a row end the run.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from learner.advantages import group_advantages
from learner.announcer import Announcer
from learner.batches import Row, counts, pack, share_rows
from learner.curves import batch_maxima, batch_sums, reward_curves, token_curves
from learner.link import Link, Taken
from learner.losses import GrpoLoss, Totals, averages
from learner.policy import Policy, Update
from learner.ranks import Ranks
from learner.recorder import Recorder
from learner.schedule import learning_rate
from learner.states import State, StateClock
from protocol.config import Config
from protocol.errors import NoProgress, NumericError
from protocol.messages import Finished

log = logging.getLogger("tether.trainer")

MAX_SKIPPED_IN_A_ROW = 3


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
        policy: Policy,
        link: Link,
        announcer: Announcer,
        recorder: Recorder,
        clock: StateClock,
        version: int,
    ) -> None:
        self._config, self._ranks, self._policy, self._link = config, ranks, policy, link
        self._announcer, self._recorder, self._clock = announcer, recorder, clock
        self._version = version
        self._num_steps = link.num_steps
        self._skipped = 0
        self._skipped_in_a_row = 0

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
            update, curves = self._update(taken)
            self._version += 1
            self._clock.enter(State.PUBLISHING, f"version {self._version}")
            self._announcer.announce(self._version, skipped=not update.applied)
            self._record(taken, curves, skipped=not update.applied)

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

    def _update(self, taken: Taken) -> tuple[Update, dict[str, float]]:
        """One optimizer step on the batch; its curves are those of all ranks together."""
        config, share = self._config, taken.share
        self._clock.enter(State.TRAINING, f"step {share.step}, {len(share.items)} completions")
        advantages = group_advantages(share.rewards, share.baseline_rewards, config.algorithm.scale)
        rows = self._rows(taken, advantages)
        totals = self._ranks.sum_across(counts(rows))
        micro_batches = pack(rows, config.learner.micro_batch_tokens)
        loss = GrpoLoss(config.algorithm, Totals(totals["tokens"], totals["sequences"]))
        rate = learning_rate(
            share.step,
            self._num_steps,
            config.learner.learning_rate,
            config.learner.schedule,
            config.learner.warmup_steps,
            config.learner.min_learning_rate,
        )
        update = self._policy.update(micro_batches, loss, rate)
        self._count_skipped(update, share.step)
        curves = {
            **reward_curves(share),
            **token_curves(self._ranks.sum_across(batch_sums(share, config.staleness.max))),
            **self._ranks.max_across(batch_maxima(share)),
            **averages(update.sums),
            "policy/grad_norm": update.grad_norm,
            "policy/lr": rate,
            "policy/skipped_steps": float(self._skipped),
            "policy/micro_batches": float(update.num_micro_batches),
            "mismatch/missing_logprobs": totals["missing_logprobs"],
            **taken.numbers,
        }
        return update, curves

    def _rows(self, taken: Taken, advantages: np.ndarray) -> list[Row]:
        """Rows of this rank's share, with tokens older than S left out where a remainder brings them."""
        share, bound = taken.share, self._config.staleness.max
        left_out = []
        for item in share.items:
            stale = [span for span in item.completion.spans if share.step - span.version > bound]
            mask = np.zeros(len(item.completion.tokens), np.bool_)
            for span in stale:
                mask[span.start : span.end] = True
            left_out.append(mask if stale and item.group in share.remainder_groups else None)
        rows = share_rows(share, advantages, left_out)
        for row in rows:
            oldest = row.versions[row.kept].min(initial=share.step)
            assert share.step - oldest <= bound, (
                f"step {share.step}: a token of version {oldest} is in the loss, S is {bound}"
            )
        return rows

    def _count_skipped(self, update: Update, step: int) -> None:
        self._skipped += not update.applied
        self._skipped_in_a_row = 0 if update.applied else self._skipped_in_a_row + 1
        if self._skipped_in_a_row:
            log.error("step %d was skipped: loss or gradient is not finite (gradient norm %s)", step, update.grad_norm)
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NumericError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a non-finite loss or gradient, the last was step {step}; "
                "weights are unchanged since. Lower learner.learning_rate, or resume from an older checkpoint"
            )

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
