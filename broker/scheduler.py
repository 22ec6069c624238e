"""Which generator may start which prompt, and which groups make the next batch.

Owned by the broker process; pure: events and the time go in, decisions come out, the server does everything else.

A group leased at version a may be trained by steps a .. a + S only: the last of them is its *deadline*. N(d) counts
the open groups (leased or finished, not yet in a batch) with deadline <= d. One inequality bounds staleness and
memory:

    a lease is granted iff afterwards, for every d >= next:  N(d) <= (d - next + 1) * P

It is checked at the grant (`batches.admits`); it survives every cut because a batch waits until all that must go can
go (`batches.is_enough`); and a lost group only lowers N. So the bound holds although nothing generated is thrown away,
and `take` asserts it. What became of a prompt stands in `ledger.py`, changed in the same call that decides it.

The constructor serves a fresh run and every recovery alike: the ledger comes back with all open prompts queued again,
and no lease survives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from broker.batches import Batch, ScheduleSettings, TakenGroup, admits, choose, is_enough
from broker.evaluation import Evaluation, EvaluationResult
from broker.groups import Groups
from broker.leases import Generator, Grant, LeaseTable, OpenLease, Refusal, ResultStatus, Wait
from broker.ledger import Ledger
from broker.pacing import Pace
from protocol.sections import AtBound
from protocol.types import LeaseKind, Trajectory

CRASHES_UNTIL_ALONE = 2  # a prompt that was lost in so many crashes is leased alone
PROBE_EVERY_S = 60.0  # a generator that is too slow gets one lease so often, to see whether it still is


class Scheduler:
    """One epoch of a run: from the prompt stream to the batches."""

    def __init__(
        self, settings: ScheduleSettings, ledger: Ledger, version: int = 0, training: int | None = None
    ) -> None:
        assert training in (None, version), f"step {training} cannot be in training at version {version}"
        self.settings = settings
        self.ledger = ledger
        self.version = version  # V: updates applied
        self.training = training  # the step in training, which is V; None: the learner has no batch
        self.leases = LeaseTable(settings.lease_ttl_s)
        self.pace = Pace(settings.prompts_per_step, settings.group_size, settings.pacing_margin)
        self.groups = Groups(settings, ledger, self.leases, self.pace)
        self.evaluation: Evaluation | None = None
        self.evaluated_version: int | None = None  # of the last result that was taken
        self._cut_at: float | None = None
        self._returned_at: float | None = None  # when the learner ended its last step; None while it has a batch

    @property
    def next_step(self) -> int:
        """The first step whose batch is not cut yet."""
        return self.version if self.training is None else self.version + 1

    @property
    def last_deadline(self) -> int:
        """The latest deadline that a group can have now."""
        return min(self.version + self.settings.max_staleness, self.settings.steps - 1)

    @property
    def num_steps_left(self) -> int:
        """Batches still to be cut."""
        return self.settings.steps - self.next_step

    @property
    def num_to_offer(self) -> int:
        """R: prompts that can still be leased; of a stream without end, as many as one batch needs."""
        stream = self.settings.num_prompts
        num_new = self.settings.prompts_per_step if stream is None else stream - self.ledger.offered
        return num_new + len(self.ledger.queue)

    # --- Leases go out ------------------------------------------------------------------------------------------------

    def pull(self, session: str, version: int, room: int, now: float, newer_available: bool) -> list[Grant] | Wait:
        """Leases groups to a generator that holds `version` and has room for `room` completions, or says why not.

        `version`: -1 for none. `newer_available`: it could have the newest weights at once.
        """
        generator = self.leases.generators.setdefault(session, Generator(session))
        is_known = version <= self.version
        generator.pulls(version if is_known else -1, room, now)  # no evaluation waits for weights that nobody made
        self._restart_evaluation_if_unanswerable()
        grants: list[Grant] = []
        answer = self._next_lease(generator, newer_available, now) if is_known else Refusal.UNKNOWN_VERSION
        while isinstance(answer, Grant):
            grants.append(answer)
            answer = self._next_lease(generator, newer_available, now)
        generator.waits_for(answer, now)
        return grants or Wait(answer)

    def _next_lease(self, generator: Generator, newer_available: bool, now: float) -> Grant | Refusal:
        """One more lease for this generator, or the first rule that forbids it."""
        settings, leases, version = self.settings, self.leases, generator.version
        deadline = min(version + settings.max_staleness, settings.steps - 1)
        if self.verdict:
            return Refusal.STOPPED
        if version < 0:
            return Refusal.NO_VERSION
        if generator.runs_alone:
            return Refusal.ALONE
        if self.evaluation and generator.room > 0 and (grant := self.evaluation.lease(generator, now)):
            return grant
        if settings.newest_first and newer_available and version < self.version and not generator.evaluates:
            return Refusal.NEWER_VERSION
        if self.num_steps_left == 0 or self.num_to_offer == 0:
            return Refusal.EVALUATION if self.evaluation else Refusal.END_OF_DATA
        if deadline < self.next_step:
            return Refusal.TOO_OLD
        if not generator.has_room_for(settings.group_size):
            return Refusal.NO_ROOM
        if not admits(leases.num_open, deadline, self.next_step, self.last_deadline, settings.prompts_per_step):
            return Refusal.AT_BOUND
        if len(leases.open) + 1 > self.pace.limit(self.waited_s(now)):
            return Refusal.PACING
        if settings.gate_slow_generators and self._too_slow(generator, deadline, now):
            return Refusal.SLOW
        return self._lease_prompt(generator, deadline, now)

    def _too_slow(self, generator: Generator, deadline: int, now: float) -> bool:
        others = [other for other in self.leases.generators.values() if other is not generator]
        is_slow = self.pace.is_slow(generator, others, num_steps=deadline - self.next_step + 1)
        return is_slow and now - generator.leased_at < PROBE_EVERY_S

    def _lease_prompt(self, generator: Generator, deadline: int, now: float) -> Grant | Refusal:
        """Leases a queued prompt, or else the next one of the stream.

        A prompt that runs alone needs an empty generator: for each such prompt one generator takes nothing more.
        """
        ledger, others = self.ledger, self.leases.generators.values()
        alone = ledger.queued_after_crashes(CRASHES_UNTIL_ALONE)
        runs_alone = bool(alone) and len(alone) > sum(other.emptying for other in others if other is not generator)
        if runs_alone and generator.running:
            generator.emptying = True
            return Refusal.ALONE
        queued = alone if runs_alone else (n for n in ledger.queue if ledger.crashes(n) < CRASHES_UNTIL_ALONE)
        prompt = next(iter(queued), None)
        if prompt is not None:
            ledger.lease_again(prompt)
        elif ledger.offered != self.settings.num_prompts:
            prompt = ledger.offer()
        else:
            return Refusal.ALONE
        attempt, failures = self.leases.new_attempt(), ledger.failures(prompt)
        samples, version = self.settings.group_size, generator.version
        grant = Grant(LeaseKind.TRAIN, prompt, attempt, samples, version, deadline, failures, runs_alone)
        return self.leases.hand_out(grant, generator, now)

    # --- Results come in, or do not -----------------------------------------------------------------------------------

    def finished(self, trajectory: Trajectory, now: float) -> ResultStatus:
        """Takes one result, good or failed. What the server finds malformed comes as a failed one."""
        lease = self.leases.find(trajectory.attempt)
        if lease is None or lease.grant.prompt != trajectory.prompt:
            return ResultStatus.LATE
        if trajectory.sample in lease.results:
            return ResultStatus.DUPLICATE
        if not 0 <= trajectory.sample < lease.grant.samples:
            self.failed(trajectory.attempt, f"sample {trajectory.sample} of {lease.grant.samples}", now)
            return ResultStatus.INVALID
        fault = lease.grant.fault_of(trajectory, newest_version=self.version)
        lease.results[trajectory.sample] = replace(trajectory, completion=None, error=fault) if fault else trajectory
        self.leases.renew(lease, now)
        if lease.complete:
            self._complete(lease, now)
        return ResultStatus.INVALID if fault else ResultStatus.ACCEPTED

    def may_answer_others(self, lease: OpenLease) -> bool:
        """Whether who waits may have an answer since the last result of this lease came.

        Most results change only how much of their group is there. A group that may be split is there with two.
        """
        may_split = self.settings.at_bound is AtBound.SPLIT and lease.grant.deadline == self.next_step
        return lease.complete or may_split

    def failed(self, attempt: int, reason: str, now: float) -> None:
        """A generator gives a lease up: the samples that it still owes have failed."""
        lease = self.leases.find(attempt)
        if lease is not None and not lease.complete:
            for sample in set(range(lease.grant.samples)) - set(lease.results):
                lease.results[sample] = Trajectory(lease.grant.prompt, attempt, sample, completion=None, error=reason)
            self._complete(lease, now)

    def filtered(self, attempt: int, reason: str) -> None:
        """The server cannot use the prompt of this new lease (it is too long, say): settled, and counted by reason."""
        self.groups.filter_unusable(self.leases.open[attempt], reason)

    def released(self, attempt: int) -> None:
        """A lease comes back unanswered, drained or revoked: nobody's fault."""
        lease = self.leases.find(attempt)
        if lease is not None and not lease.complete:
            self._lose(lease, crashed=False)

    def renew(self, attempt: int, num_tokens: int, now: float) -> bool:
        """Keeps a lease alive; False if there is no such lease any more and the work for it is in vain."""
        lease = self.leases.find(attempt)
        if lease is not None:
            lease.num_tokens = num_tokens
            self.leases.renew(lease, now)
        return lease is not None

    def holder_lost(self, session: str, crashed: bool) -> list[OpenLease]:
        """A generator died, or left: all that it ran goes out again."""
        generator = self.leases.generators.get(session)
        lost = list(generator.running.values()) if generator else []
        for lease in lost:
            self._lose(lease, crashed)
        self.leases.generators.pop(session, None)
        self._restart_evaluation_if_unanswerable()
        return lost

    def expire(self, now: float) -> list[OpenLease]:
        """Takes back what was not renewed in time.

        A generator that is altogether silent counts as crashed; one that is heard without a lease never got it.
        """
        silent = self.leases.silent(now)
        lost = [lease for generator in silent for lease in self.holder_lost(generator.session, crashed=True)]
        unknown = self.leases.expired(now)
        for lease in unknown:
            self._lose(lease, crashed=False)
        return lost + unknown

    def _complete(self, lease: OpenLease, now: float) -> None:
        self.leases.answered(lease, now)
        if self.evaluation and lease.grant.kind is LeaseKind.EVALUATE:
            self.evaluation.answered(lease)
        else:
            self.groups.complete(lease, latency_s=now - lease.granted_at)

    def _lose(self, lease: OpenLease, crashed: bool) -> None:
        if self.evaluation and lease.grant.kind is LeaseKind.EVALUATE:
            self.evaluation.lost(lease)
        else:
            self.groups.lose(lease, crashed)

    # --- Batches are cut, versions come back --------------------------------------------------------------------------

    @property
    def num_groups(self) -> int:
        """Of the next batch. Remainders that have ended come on top."""
        return min(self.settings.prompts_per_step, len(self.leases.open) + self.num_to_offer)

    @property
    def ready(self) -> bool:
        """Whether the next batch can be cut; if not, the learner has to wait."""
        leases, step, num_groups = self.leases, self.next_step, self.num_groups
        is_last = self.num_steps_left == 1 or num_groups == 0
        if self.training is not None or self.num_steps_left == 0 or (is_last and leases.remainders):
            return False
        if num_groups == 0:
            return bool(self.groups.ended_remainders)
        num_ready = leases.num_finished + Counter(lease.grant.deadline for lease in self._splittable())
        size = self.settings.prompts_per_step
        return is_enough(leases.num_open, num_ready, step, self.last_deadline, size, num_groups)

    def take(self, now: float) -> Batch:
        """Cuts the batch of the next step and settles its prompts. Only when `ready`."""
        step = self.next_step
        assert self.ready, f"the batch of step {step} cannot be cut now"
        finished = [lease for lease in self.leases.open.values() if lease.complete]
        leases = choose(finished + self._splittable(), self.num_groups)
        for lease in leases:
            staleness = step - lease.grant.version
            assert 0 <= staleness <= self.settings.max_staleness, f"step {step} cannot train {lease.grant}"
            if lease.complete:
                self.leases.close(lease)
            else:
                self.leases.set_aside(lease)
        self.ledger.train([lease.grant.prompt for lease in leases])
        self.ledger.check()
        groups = [TakenGroup.of(lease) for lease in leases] + self.groups.ended_remainders
        self.groups.ended_remainders = []
        self.training, self._cut_at, self._returned_at = step, now, None
        return Batch(step, tuple(groups))

    def _splittable(self) -> list[OpenLease]:
        """Groups that still run at their deadline and may hand over what they have, as a group with its own baseline.

        None in the last step, because no later one would train the remainder.
        """
        if self.settings.at_bound is AtBound.WAIT or self.num_steps_left == 1:
            return []
        opened = self.leases.open.values()
        due = [lease for lease in opened if lease.grant.deadline == self.next_step and not lease.complete]
        has_room = len(due) + len(self.leases.remainders) <= self.settings.prompts_per_step
        return [lease for lease in due if len(lease.good) >= 2] if has_room else []

    def advanced(self, version: int, now: float, skipped: bool = False) -> None:
        """The learner announced `version`; `skipped`: its step was not finite and changed nothing."""
        assert self.training is not None, f"version {version} without a step in training"
        assert version == self.version + 1, f"version {version} after {self.version}"
        if skipped:
            self.ledger.skip_step()
        if self._cut_at is not None:
            num_running = self.leases.num_open.total() - self.leases.num_finished.total()
            self.pace.step_ended(now - self._cut_at, num_running)
        self.version, self.training, self._cut_at, self._returned_at = version, None, None, now
        self._restart_evaluation_if_unanswerable()

    # --- Evaluation, and the end --------------------------------------------------------------------------------------

    def evaluate(self, numbers: Sequence[int], samples: int = 1) -> None:
        """Has each prompt answered so often by the newest version. Only while there is no other evaluation."""
        assert self.evaluation is None, f"version {self.evaluation.version} is being evaluated"
        self.evaluation = Evaluation(self.leases, numbers, samples, self.version)

    def take_evaluation(self) -> EvaluationResult | None:
        """The answers to the evaluation, once, when all are there."""
        if self.evaluation is None or self.evaluation.num_missing:
            return None
        result, self.evaluation = self.evaluation.result(), None
        self.evaluated_version = result.version
        return result

    def _restart_evaluation_if_unanswerable(self) -> None:
        if self.evaluation:
            self.evaluation.restart_if_unanswerable(self.version)

    @property
    def trained_out(self) -> bool:
        """Nothing is left to train, and nothing is in training."""
        has_ended = self.num_steps_left == 0 or self.num_to_offer == 0
        is_idle = not (self.leases.open or self.leases.remainders or self.groups.ended_remainders)
        return has_ended and is_idle and self.training is None

    @property
    def done(self) -> bool:
        """The run is complete: trained out, and evaluated as far as asked for."""
        is_evaluated = not self.settings.evaluate_at_end or self.evaluated_version == self.version
        return self.trained_out and is_evaluated and self.evaluation is None

    @property
    def verdict(self) -> str:
        """Why the run cannot go on; "" while it can."""
        return self.groups.verdict

    @property
    def quarantined(self) -> list[tuple[int, str]]:
        """(prompt, reason) of those given up, for the server to write down and clear."""
        return self.groups.quarantined

    def waited_s(self, now: float) -> float:
        """How long the learner has been waiting for a batch that cannot be cut yet."""
        return 0.0 if self._returned_at is None or self.ready else now - self._returned_at
