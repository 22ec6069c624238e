"""What the broker does for the learner: cut batches into shares, take versions, collect evaluations.

The same question gets the same answer until `Advance`: the pages of a cut batch are kept by (step, rank). The ledger
travels with page 0 of rank 0, as of the cut, so what a checkpoint holds is exactly what was trained.
"""

from __future__ import annotations

import logging

import msgpack

from broker.batches import TakenGroup
from broker.metrics import batch_numbers
from broker.outcome import Later
from broker.outlook import learner_waits_for
from broker.run_state import RunState
from broker.shares import cut_shares
from protocol.errors import ProtocolError, SnapshotError
from protocol.fields import MAX_NAME, MAX_TEXT
from protocol.messages import Advance, Done, Evaluate, Finished, Publish, Role, SharePage, Take, VersionHint, Wait
from protocol.rewards import weighted_functions
from protocol.shares import split_pages
from protocol.types import Group, Prompt

log = logging.getLogger("tether.broker")


class LearnerDesk:
    """Answers Take, Publish, Advance and Evaluate."""

    def __init__(self, run: RunState) -> None:
        self._run = run

    def take(self, question: Take, now: float) -> SharePage | Finished | Later:
        run, scheduler = self._run, self._run.scheduler
        if scheduler is None:
            return Later(Wait(reason="rank 0 of the learner has not said hello yet"))
        if question.num_ranks != run.num_ranks or question.rank >= run.num_ranks:
            raise ProtocolError(
                "ranks", f"rank {question.rank} of {question.num_ranks} asks, the learner has {run.num_ranks} ranks"
            )
        pages = run.pages.get((question.step, question.rank))
        if pages is None:
            if run.verdict or scheduler.verdict:
                return Finished(kind="verdict", reason=(run.verdict or scheduler.verdict)[:MAX_TEXT])
            if scheduler.done:
                return Finished(kind="complete")
            if run.draining:
                return Finished(kind="drained", reason=run.draining)
            if question.step != scheduler.next_step or not scheduler.ready:
                return Later(Wait(reason=self._waits_for(question)[:MAX_NAME]))
            self._cut(now)
            pages = run.pages[question.step, question.rank]
        if question.page >= len(pages):
            raise ProtocolError(
                "page", f"the share of step {question.step} has {len(pages)} pages, page {question.page} was asked for"
            )
        return pages[question.page]

    def publish(self, message: Publish, now: float) -> Done:
        oldest_useful = self._run.scheduler_now().next_step - self._run.config.staleness.max
        shelf = self._run.shelf
        try:
            if message.is_base:
                shelf.put_base(message)
            else:
                shelf.put(message, oldest_useful)
                self._announce()
        except LookupError as error:
            raise ProtocolError("base", str(error)) from None
        except (SnapshotError, ValueError) as error:
            raise ProtocolError("manifest", str(error)) from None
        self._run.progress_at = now
        self._run.changed = True
        return Done()

    def advance(self, message: Advance, now: float) -> Done:
        """Repeated after a reconnect: the second one finds its version reached."""
        run, scheduler = self._run, self._run.scheduler_now()
        if message.version == scheduler.version:
            return Done()
        if run.shelf.version(message.version) is None:
            raise ProtocolError("order", f"version {message.version} must be published before it is announced")
        if scheduler.training is None or message.version != scheduler.version + 1:
            raise ProtocolError("order", f"version {message.version} cannot follow {scheduler.version} now")
        scheduler.advanced(message.version, now, message.skipped)
        run.pages = {place: pages for place, pages in run.pages.items() if place[0] >= message.version}
        run.progress_at = now
        run.changed = True
        self._announce()
        return Done()

    def evaluate(self, message: Evaluate, now: float) -> Done:
        """An evaluation of the newest version; one that is asked for while another runs starts when that one ends."""
        run = self._run
        run.evaluation_wanted = True
        self.start_evaluation(now)
        return Done()

    def start_evaluation(self, now: float) -> None:
        """One that was asked for, or the last one: after the last step, which may come sooner than anybody counted."""
        run, scheduler = self._run, self._run.scheduler
        if scheduler is None or scheduler.evaluation is not None:
            return
        if run.evaluation_wanted or (scheduler.trained_out and not scheduler.done):
            run.evaluation_wanted = False
            if scheduler.evaluated_version != scheduler.version:
                scheduler.evaluate(range(len(run.source.evaluation)), samples=run.config.evaluation.samples)
                run.evaluation_started_at = now
                run.changed = True

    def _cut(self, now: float) -> None:
        run, scheduler = self._run, self._run.scheduler_now()
        batch = scheduler.take(now)
        groups = [self._group(taken) for taken in batch.groups]
        ledger = msgpack.packb(scheduler.ledger.snapshot())
        numbers = batch_numbers(run, batch, now)
        config = run.config
        names = [name for name, _ in weighted_functions(config)]
        for share in cut_shares(
            run.epoch,
            batch.step,
            groups,
            run.num_ranks,
            config.batch.group_size,
            config.staleness.max,
            names,
            has_greedy=config.algorithm.advantage == "remax",
        ):
            pages = split_pages(share)
            if share.rank == 0:
                pages[0] = pages[0].model_copy(update={"ledger": ledger, "numbers": numbers})
            run.pages[batch.step, share.rank] = pages
        run.progress_at = now
        run.changed = True

    def _group(self, taken: TakenGroup) -> Group:
        prompt = self._run.source.prompt(taken.prompt)
        assert isinstance(prompt, Prompt), f"prompt {taken.prompt} was leased, so it fits"
        return Group(prompt, taken.version, taken.trajectories, taken.baseline_rewards, taken.remainder)

    def _waits_for(self, question: Take) -> str:
        scheduler = self._run.scheduler_now()
        if question.step != scheduler.next_step:
            return f"version {question.step} is not announced yet"
        return "the last evaluation" if scheduler.trained_out else learner_waits_for(scheduler)

    def _announce(self) -> None:
        """Generators hear of a version only once it is published and announced: never before the snapshot exists."""
        newest = self._run.announced
        if newest is not None:
            hint = VersionHint(version=newest.version, digest=newest.digest)
            self._run.hints += [(peer.route, hint) for peer in self._run.peers.of_role(Role.GENERATOR) if peer.route]
