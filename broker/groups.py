"""What becomes of a leased group: kept, filtered, failed or lost; and of the remainder of a split one.

Owned by the scheduler, in the broker process; pure. That three failures end a prompt and bad luck does not rests on
`lose` and `_count_failure`. That leases and ledger never disagree rests on every function here closing the lease and
moving the prompt together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from broker.batches import ScheduleSettings, TakenGroup
from broker.leases import LeaseTable, OpenLease
from broker.ledger import MAX_FAILURES, Ledger
from broker.pacing import Pace
from protocol.types import Trajectory

BATCHES_WITHOUT_SIGNAL = 4  # so many batches' worth of groups of equal rewards in a row end the run
UNUSABLE_IN_A_ROW = 100  # so many prompts that cannot be used, one after the other, end it too
EQUAL_REWARDS = "equal_rewards"  # why a group is filtered that no gradient comes from


def equal_rewards(trajectories: Sequence[Trajectory]) -> bool:
    """Whether all have the same reward as the learner sees it, in float32: 0.1 + 0.2 is 0.3 there."""
    return len({np.float32(trajectory.reward) for trajectory in trajectories}) == 1


class Groups:
    """The end of every training lease that does not end in a batch."""

    def __init__(self, settings: ScheduleSettings, ledger: Ledger, leases: LeaseTable, pace: Pace) -> None:
        self.verdict = ""  # why the run cannot go on
        self.quarantined: list[tuple[int, str]] = []  # (prompt, reason), for the server to write down and clear
        self.ended_remainders: list[TakenGroup] = []  # for the next batch
        self.num_lost_samples = 0  # of remainders: the one thing that is not generated again
        self._settings = settings
        self._ledger = ledger
        self._leases = leases
        self._pace = pace
        self._equal_in_a_row = 0
        self._unusable_in_a_row = 0
        self._last_unusable = -1

    def complete(self, lease: OpenLease, latency_s: float) -> None:
        """Every sample is in, good or failed."""
        good = lease.good
        if lease.handed_over:
            self.end_remainder(lease)
        elif len(good) < min(2, self._settings.group_size) or self._lacks_baseline(lease):
            self._count_failure(lease, lease.errors[0])
        else:
            has_signal = not self._settings.filter_equal_rewards or not equal_rewards(good)
            self._pace.latency_s.add(latency_s)
            if has_signal:
                self._ledger.finish(lease.grant.prompt)
                self._equal_in_a_row = 0
            else:
                self._filter_equal(lease)

    def lose(self, lease: OpenLease, crashed: bool) -> None:
        """A lease ends without its answer, and its prompt goes out again; a remainder keeps what it has."""
        if lease.handed_over:
            self.end_remainder(lease)
        elif crashed and lease.grant.alone:
            self._count_failure(lease, "its generator crashed while it ran alone")
        else:
            self._leases.close(lease)
            self._ledger.requeue(lease.grant.prompt, crashed)

    def filter_unusable(self, lease: OpenLease, reason: str) -> None:
        """Settles a prompt that cannot be used. Too many in a row, or all there are, and nothing can be trained."""
        prompt, settings = lease.grant.prompt, self._settings
        self._leases.close(lease)
        self._ledger.filter(prompt, reason)
        self._unusable_in_a_row = self._unusable_in_a_row + 1 if prompt == self._last_unusable + 1 else 1
        self._last_unusable = prompt
        if self._unusable_in_a_row >= min(UNUSABLE_IN_A_ROW, settings.num_prompts or UNUSABLE_IN_A_ROW):
            self.verdict = f"no usable prompt: {self._unusable_in_a_row} in a row were filtered, the last one: {reason}"

    def _filter_equal(self, lease: OpenLease) -> None:
        """Settles a prompt that no gradient comes from. Too many in a row, or all there are: the run has no signal."""
        self._leases.close(lease)
        self._ledger.filter(lease.grant.prompt, EQUAL_REWARDS)
        self._equal_in_a_row += 1
        limit = BATCHES_WITHOUT_SIGNAL * self._settings.prompts_per_step
        if self._equal_in_a_row >= min(limit, self._settings.num_prompts or limit):
            self.verdict = f"no signal: {self._equal_in_a_row} groups in a row had equal rewards and were filtered"

    def _lacks_baseline(self, lease: OpenLease) -> bool:
        sample = self._settings.baseline_sample
        return sample is not None and bool(lease.results[sample].error)

    def end_remainder(self, lease: OpenLease) -> None:
        """What a remainder has goes into the next batch; its prompt is settled, so what it lost is not made again."""
        self._leases.close(lease)
        self.num_lost_samples += lease.grant.samples - len(lease.results)
        remainder = TakenGroup.remainder_of(lease)
        if remainder.trajectories:
            self.ended_remainders.append(remainder)

    def _count_failure(self, lease: OpenLease, reason: str) -> None:
        """A prompt that failed goes out again, until it is quarantined for good."""
        prompt = lease.grant.prompt
        self._leases.close(lease)
        if self._ledger.count_failure(prompt) < MAX_FAILURES:
            self._ledger.requeue(prompt)
            return
        self._ledger.quarantine(prompt)
        self.quarantined.append((prompt, reason))
        if self._ledger.too_many_quarantined:
            of_all = f"{self._ledger.num_quarantined} of {self._ledger.num_settled} prompts"
            self.verdict = f"{of_all} failed {MAX_FAILURES} times each; the last one, prompt {prompt}: {reason}"
