"""The real scheduler, watched: after every event it is held to what the design promises.

Used by simulations only. What is asserted here: the staleness of every token, that nothing accepted is missing from
its batch, and that every group ends as it must. What holds at every moment stands in `invariants.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from broker.batches import Batch, ScheduleSettings, TakenGroup
from broker.evaluation import EvaluationResult
from broker.groups import BATCHES_WITHOUT_SIGNAL, UNUSABLE_IN_A_ROW
from broker.leases import Grant, OpenLease, ResultStatus, Wait
from broker.ledger import MAX_FAILURES, QUARANTINED_FLOOR, QUARANTINED_SHARE, Ledger
from broker.scheduler import CRASHES_UNTIL_ALONE, Scheduler
from protocol.sections import AtBound
from protocol.types import LeaseKind, Trajectory
from tests.simulation.books import Books, Record
from tests.simulation.invariants import check_bound, check_ledger, check_memory, check_prompts
from tests.simulation.seen import Seen


@dataclass(eq=False, slots=True)
class WatchedLease:
    """A lease as its watcher knows it, whatever the scheduler's tables say."""

    grant: Grant
    accepted: dict[int, Trajectory] = field(default_factory=dict)  # by sample
    in_first_part: frozenset[int] = frozenset()  # samples that a batch took; the others are a remainder


class WatchedScheduler(Scheduler):
    """Everything that the service calls, with its promises checked."""

    def __init__(
        self,
        settings: ScheduleSettings,
        ledger: Ledger,
        version: int = 0,
        training: int | None = None,
        *,
        books: Books,
        record: Record,
    ) -> None:
        super().__init__(settings, ledger, version, training)
        self.books, self.record, self.seen = books, record, record.seen
        self.taken_back: set[int] = set()  # attempts that were lost, given up or handed back
        self.answered: set[int] = set()  # attempts with a verdict on every sample
        self._num_filtered_in_a_row = 0
        self._unusable: set[int] = set()  # of this life of the broker
        self._watched: dict[int, WatchedLease] = {}  # by attempt: training leases that a batch may still take from
        self._failures: Counter[int] = Counter(dict(books.failures))
        self._crashes: Counter[int] = Counter(dict(books.crashes))
        self._has_no_prompt = False  # that could be used
        self._has_ended = False  # with a verdict
        self.last_batch: Batch | None = None
        self.last_expired: list[OpenLease] = []
        self.check()
        self._check_every_prompt()

    # --- Leases

    def pull(self, session: str, version: int, room: int, now: float, newer_available: bool) -> list[Grant] | Wait:
        given = super().pull(session, version, room, now, newer_available)
        if isinstance(given, Wait):
            self.seen[given.reason] += 1
            return given
        settled = self.books.settled
        for grant in given:
            assert grant.version == version, f"{grant} for a generator of version {version}"
            if grant.kind is LeaseKind.EVALUATE:
                continue
            assert grant.prompt not in settled, f"{grant} of a settled prompt"
            assert self.next_step <= grant.deadline <= grant.version + self.settings.max_staleness, f"{grant}"
            assert grant.deadline < self.settings.steps, f"{grant} after the last step"
            assert grant.failures == self._failures[grant.prompt], f"{grant}: {self._failures[grant.prompt]} failures"
            assert grant.alone == (self._crashes[grant.prompt] >= CRASHES_UNTIL_ALONE), f"{grant}"
            if grant.alone:
                self.seen[Seen.LEASE_ALONE] += 1
                running = self.leases.generators[session].running
                assert list(running) == [grant.attempt], f"{grant} does not run alone: {list(running)}"
            self._watched[grant.attempt] = WatchedLease(grant)
        assert sum(grant.samples for grant in given) <= max(room, self.settings.group_size), f"{room}: {given}"
        self.check()
        return given

    def finished(self, trajectory: Trajectory, now: float) -> ResultStatus:
        attempt = trajectory.attempt
        lease, was_ready = self.leases.find(attempt), self.ready
        status = super().finished(trajectory, now)
        watched = self._watched.get(attempt)
        if lease is not None and lease.complete:
            self.answered.add(attempt)
        if self.ready and not was_ready:
            assert lease is not None
            assert self.may_answer_others(lease), f"the learner is not told that {trajectory} made its batch ready"
        if status is ResultStatus.ACCEPTED and watched is not None:
            assert trajectory.sample not in watched.accepted, f"{trajectory} was accepted twice"
            watched.accepted[trajectory.sample] = trajectory
            if len(watched.accepted) == watched.grant.samples:
                self._ended(watched, crashed=False)
        return status

    def failed(self, attempt: int, reason: str, now: float) -> None:
        super().failed(attempt, reason, now)
        self.taken_back.add(attempt)
        if (watched := self._watched.get(attempt)) is not None:
            for sample in set(range(watched.grant.samples)) - set(watched.accepted):
                watched.accepted[sample] = Trajectory(watched.grant.prompt, attempt, sample, None, error=reason)
            self._ended(watched, crashed=False)

    def filtered(self, attempt: int, reason: str) -> None:
        super().filtered(attempt, reason)
        prompt = self._watched.pop(attempt).grant.prompt
        self.books = replace(self.books, filtered=self.books.filtered | {prompt})
        self._forget(prompt)
        self._unusable.add(prompt)
        self.seen[Seen.UNUSABLE] += 1
        limit = min(UNUSABLE_IN_A_ROW, self.settings.num_prompts or UNUSABLE_IN_A_ROW)
        self._has_no_prompt |= self._unusable.issuperset(range(prompt - limit + 1, prompt + 1))
        self.check()

    def released(self, attempt: int) -> None:
        lease = self.leases.find(attempt)
        super().released(attempt)
        if lease is not None and not lease.complete:
            self._lost(attempt, crashed=False)
            self.check()

    def holder_lost(self, session: str, crashed: bool) -> list[OpenLease]:
        generator, evaluation = self.leases.generators.get(session), self.evaluation
        held = evaluation is not None and generator is not None and generator.version == evaluation.version
        lost = super().holder_lost(session, crashed)
        for lease in lost:
            self._lost(lease.grant.attempt, crashed)
        if held and evaluation is not None and evaluation.num_missing:
            others = {other.version for other in self.leases.generators.values()}
            self.seen[Seen.LAST_HOLDER_DIED] += evaluation.version not in others
        self.check()
        return lost

    def expire(self, now: float) -> list[OpenLease]:
        lost = super().expire(now)
        for lease in lost:
            if lease.grant.attempt not in self.taken_back:  # by `holder_lost`
                self._lost(lease.grant.attempt, crashed=False)
        for generator in self.leases.generators.values():
            assert generator.heard_at > now - self.settings.lease_ttl_s, (
                f"{generator.session} is silent, and not given up"
            )
        if lost:
            self.check()
        self.last_expired = lost
        return lost

    def _lost(self, attempt: int, crashed: bool) -> None:
        """A lease ended without its answer."""
        self.taken_back.add(attempt)
        watched = self._watched.get(attempt)
        if watched is not None and len(watched.accepted) < watched.grant.samples:
            self._ended(watched, crashed)

    def _ended(self, watched: WatchedLease, crashed: bool) -> None:
        """Compares what should become of the prompt of an ended lease with what the scheduler made of it."""
        grant, accepted = watched.grant, watched.accepted
        prompt, good = grant.prompt, [one for one in accepted.values() if not one.error]
        complete = len(accepted) == grant.samples
        if watched.in_first_part:
            self.seen[Seen.REMAINDER_LOST] += not complete
            if all(one.sample in watched.in_first_part for one in good):
                del self._watched[grant.attempt]  # nothing is left to train
            return
        if complete and len(good) >= min(2, grant.samples):
            if self.settings.filter_equal_rewards and len({one.reward for one in good}) == 1:
                fate, self.books = "filtered", replace(self.books, filtered=self.books.filtered | {prompt})
                self.seen[Seen.FILTERED] += 1
                self._num_filtered_in_a_row += 1
                self._forget(prompt)
            else:
                fate, self._num_filtered_in_a_row = "finished", 0
        else:
            is_failure = complete or (crashed and grant.alone)
            self._crashes[prompt] += crashed and not is_failure
            self._failures[prompt] += is_failure
            fate = "queued"
            if self._failures[prompt] == MAX_FAILURES:
                fate, self.books = "failed", replace(self.books, quarantined=self.books.quarantined | {prompt})
                self.seen[Seen.QUARANTINED] += 1
                self._forget(prompt)
        if fate != "finished":
            del self._watched[grant.attempt]
        assert (grant.attempt in self.leases.open) == (fate == "finished"), f"{grant} should be {fate}"
        assert (prompt in self.ledger.queue) == (fate == "queued"), f"{grant} should be {fate}"
        self.check()

    # --- Batches and versions

    def take(self, now: float) -> Batch:
        step = self.next_step
        batch = super().take(now)
        full = [group for group in batch.groups if not group.remainder]
        remainders = [group for group in batch.groups if group.remainder]
        prompts = frozenset(group.prompt for group in full)
        assert batch.step == step < self.settings.steps, f"step {batch.step} of {self.settings.steps}"
        assert len(prompts) == len(full) <= self.settings.prompts_per_step, f"{len(full)} groups in a batch"
        assert not prompts & self.books.settled, f"{sorted(prompts & self.books.settled)} are trained twice"
        assert not remainders or self.settings.at_bound is AtBound.SPLIT, "a remainder where groups wait"
        if len(full) < self.settings.prompts_per_step:
            self.seen[Seen.SHORT_BATCH] += 1
            assert len(self.leases.open) + self.num_to_offer == 0, "a short batch, but prompts are left"
        for group in full:
            self._take_group(group, step)
        for group in remainders:
            self._take_remainder(group, step)
        self.books = self.books.cut(prompts, self._failures, self._crashes)
        self.seen[Seen.TRAINED] += len(full)
        self.check()
        self._check_every_prompt()
        self.last_batch = batch
        return batch

    def _take_group(self, group: TakenGroup, step: int) -> None:
        attempt = group.trajectories[0].attempt
        watched = self._watched[attempt]
        good = sorted(sample for sample, one in watched.accepted.items() if not one.error)
        assert (group.prompt, group.version) == (watched.grant.prompt, watched.grant.version), f"{watched.grant}"
        assert [one.sample for one in group.trajectories] == good, f"prompt {group.prompt} should bring samples {good}"
        assert len(good) >= min(2, watched.grant.samples), (
            f"{len(good)} samples of prompt {group.prompt} have no baseline"
        )
        if len(watched.accepted) == watched.grant.samples:
            del self._watched[attempt]
        else:
            assert self.settings.at_bound is AtBound.SPLIT, f"prompt {group.prompt} still runs and is trained"
            assert watched.grant.deadline == step, f"prompt {group.prompt} is split before its deadline"
            watched.in_first_part = frozenset(watched.accepted)
            self.seen[Seen.SPLIT] += 1
        self._forget(group.prompt)
        self._count_tokens(group, step, num_left_out=0)

    def _take_remainder(self, group: TakenGroup, step: int) -> None:
        watched = self._watched.pop(group.trajectories[0].attempt)
        good = {sample: one for sample, one in sorted(watched.accepted.items()) if not one.error}
        late = [sample for sample in good if sample not in watched.in_first_part]
        assert watched.in_first_part, f"the remainder of prompt {group.prompt} comes before its first part"
        assert [one.sample for one in group.trajectories] == late, f"a remainder should bring samples {late}"
        assert group.baseline_rewards == tuple(one.reward for one in good.values()), f"{group.baseline_rewards}"
        self.seen[Seen.REMAINDER_TRAINED] += 1
        left_out = sum(
            span.end - span.start
            for one in group.trajectories
            if one.completion
            for span in one.completion.spans
            if step - span.version > self.settings.max_staleness
        )
        self._count_tokens(group, step, left_out)

    def _count_tokens(self, group: TakenGroup, step: int, num_left_out: int) -> None:
        """Notes the staleness of every token; only a remainder may leave some out."""
        bound, num_beyond = self.settings.max_staleness, 0
        for one in group.trajectories:
            assert one.completion is not None, f"a failed sample of prompt {group.prompt} is trained"
            for span in one.completion.spans:
                staleness, num_tokens = step - span.version, span.end - span.start
                assert staleness >= 0, f"step {step} trains {span} of prompt {group.prompt}"
                if staleness > bound:
                    num_beyond += num_tokens
                else:
                    self.record.staleness += [staleness] * num_tokens
        assert num_beyond == num_left_out, f"step {step}: {num_beyond} tokens of prompt {group.prompt} are too stale"
        self.record.num_left_out += num_beyond
        self.seen[Seen.TOKENS_LEFT_OUT] += num_beyond

    def advanced(self, version: int, now: float, skipped: bool = False) -> None:
        super().advanced(version, now, skipped)
        if skipped:
            self.books = self.books.skip()
            self.seen[Seen.STEP_SKIPPED] += 1
        self.check()

    def take_evaluation(self) -> EvaluationResult | None:
        result = super().take_evaluation()
        if result is not None:
            self.seen[Seen.EVALUATED] += 1
            self.record.evaluated.append(result.version)
            spans = [span for one in result.trajectories if one.completion for span in one.completion.spans]
            assert {span.version for span in spans} <= {result.version}, f"evaluation {result.version}: {spans}"
        return result

    def _restart_evaluation_if_unanswerable(self) -> None:
        before = self.evaluation.version if self.evaluation else None
        super()._restart_evaluation_if_unanswerable()
        self.seen[Seen.EVALUATION_RESTARTED] += self.evaluation is not None and self.evaluation.version != before

    def check(self) -> None:
        """What holds after every event."""
        check_ledger(self, self.books)
        check_bound(self)
        check_memory(self)
        if not self._has_ended:
            bad, num_settled = len(self.books.quarantined), self.books.num_settled
            limit = BATCHES_WITHOUT_SIGNAL * self.settings.prompts_per_step
            has_no_signal = self._num_filtered_in_a_row >= min(limit, self.settings.num_prompts or limit)
            has_no_signal |= self._has_no_prompt
            self._has_ended = has_no_signal or bad > max(QUARANTINED_FLOOR, QUARANTINED_SHARE * num_settled)
            assert bool(self.verdict) == self._has_ended, (
                f"{self.verdict!r} with {self._num_filtered_in_a_row} filtered in a row, {bad} bad of {num_settled}"
            )

    def _check_every_prompt(self) -> None:
        check_prompts(self.ledger.snapshot(), self.books, self._failures, self._crashes)
        ended = {one.trajectories[0].attempt for one in self.groups.ended_remainders}
        known = {*self.leases.open, *ended, *(one.grant.attempt for one in self.leases.remainders)}
        assert set(self._watched) == known, f"leases {set(self._watched) ^ known} came or went unseen"

    def _forget(self, prompt: int) -> None:
        self._failures.pop(prompt, None)
        self._crashes.pop(prompt, None)
