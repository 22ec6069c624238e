"""The learner of a simulated cluster: take, update, publish, advance, as `learner/trainer.py` and `learner/link.py` do.

Used by simulations only. What it knows of the run is a value, `Learned`, so that a checkpoint is nothing else; and the
number of its weights is a new one after every step, so that no two histories are taken for one another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from broker.batches import Batch
from protocol.messages import Role
from tests.simulation.broker import Cut, Refused, Replaced, SimulatedBroker, Standing
from tests.simulation.seen import Seen

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

Answer = TypeVar("Answer")
RETRY_S = 0.5
WAITING, TRAINING, PUBLISHING = Seen.LEARNER_DIED_WAITING, Seen.LEARNER_DIED_TRAINING, Seen.LEARNER_DIED_PUBLISHING


@dataclass(frozen=True, slots=True)
class Learned:
    """Everything that a checkpoint holds."""

    standing: Standing = field(default_factory=lambda: Standing(0))
    weights: tuple[int, ...] = (0,)  # by version
    trained: tuple[int, ...] = ()  # prompts that the weights have seen, without remainders
    samples: frozenset[tuple[int, int]] = frozenset()  # (prompt, sample) that the weights have seen

    @property
    def version(self) -> int:
        return self.standing.version

    def check(self, batch: Batch) -> None:
        """A batch for these weights: sampled by them and their ancestors, and never seen before."""
        assert batch.step == self.version, f"step {batch.step} comes at version {self.version}"
        for group in batch.groups:
            for one in group.trajectories:
                assert (one.prompt, one.sample) not in self.samples, f"prompt {one.prompt} is trained twice"
                assert one.completion is not None, f"a failed sample of prompt {one.prompt} is trained"
                versions = [span.version for span in one.completion.spans for _ in range(span.start, span.end)]
                assert one.completion.tokens.tolist() == [self.weights[version] for version in versions], (
                    f"step {batch.step}: prompt {one.prompt} has tokens of another history"
                )


class SimulatedLearner:
    """One process: started from a checkpoint, ended by a crash, by its successor, or with the run."""

    def __init__(self, cluster: Cluster, learned: Learned) -> None:
        self.learned = learned
        self.alive = True
        self.ended = ""  # what the broker said at the end of the run
        self.doing = PUBLISHING
        self.waits_since = cluster.world.now
        self._cluster, self._world = cluster, cluster.world
        self._incarnation = self._world.number()
        self._session, self._epoch = 0, 0
        self._standing = self._told = learned.standing  # what is so, and what the last hello said
        self._batch_epoch = 0  # of the batch in training
        self._published: int | None = None  # version
        self._evaluates = False  # the version that is published
        self._after(0.0, self._announce_first)

    @property
    def _broker(self) -> SimulatedBroker:
        return self._cluster.broker

    # --- Take

    def play(self) -> None:
        """Asks for the next batch if it waits for one."""
        if self.alive and self.doing is WAITING and self._broker.is_up:
            self._or_end(self._take)

    def _take(self) -> None:
        answer = self._asked(lambda: self._broker.take(self._session, self._epoch, self.learned.version))
        if isinstance(answer, Cut):
            self._cluster.waited_s += self._world.now - self.waits_since
            self.doing = TRAINING
            self._cluster.faults.broker_dies_at(Seen.BROKER_DIED_CUT)
            self._after(self._world.load.share_s, self._receive, answer)
        elif answer:
            self.ended = answer

    def _receive(self, cut: Cut) -> None:
        """The batch is here, unless the broker died on the way; and the next heartbeat may have met another broker."""
        if cut.epoch != self._broker.epoch:
            if self._world.chance(0.5):
                self._world.seen[Seen.SHARE_LOST] += 1
                self._wait()
                return
            self._world.seen[Seen.SHARE_OUTLIVED] += 1
            if self._world.chance(0.5):
                self.beat()
        self.learned.check(cut.batch)
        prompts = {group.prompt for group in cut.batch.groups if not group.remainder}
        assert cut.books.trained == prompts | set(self.learned.trained), f"{cut.books}, trained: {self.learned.trained}"
        self._standing = Standing(self.learned.version, cut.batch.step, cut.ledger, cut.books)
        self._batch_epoch = cut.epoch
        self._insist()
        self._after(self._world.load.step_s, self._update, cut)

    def _insist(self) -> None:
        """A broker that was restored before this batch was agreed on is restored once more."""
        is_known = self._epoch == self._batch_epoch or self._told.training == self._standing.training
        if self._standing.training is not None and not is_known and self._broker.is_up:
            self._world.seen[Seen.BROKER_TOLD_AGAIN] += 1
            self._incarnation = self._world.number()
            self._greet()

    # --- Update, publish, advance

    def _update(self, cut: Cut) -> None:
        learned, skipped = self.learned, self._world.chance(self._world.load.skipped_share)
        standing = Standing(learned.version + 1, None, cut.ledger, cut.books, skipped)
        if skipped:
            self.learned = replace(learned, standing=standing, weights=(*learned.weights, learned.weights[-1]))
        else:
            prompts = [group.prompt for group in cut.batch.groups if not group.remainder]
            samples = {(one.prompt, one.sample) for group in cut.batch.groups for one in group.trajectories}
            weights, trained = (*learned.weights, self._world.number()), (*learned.trained, *prompts)
            self.learned = Learned(standing, weights, trained, learned.samples | samples)
        self.doing = PUBLISHING
        if self.learned.version % self._world.load.checkpoint_every == 0:
            self._cluster.checkpoint(self.learned)
        self._after(self._world.load.publish_s, self._announce)

    def _announce_first(self) -> None:
        if not self._broker.is_up:
            self._after(RETRY_S, self._announce_first)
            return
        self._greet()
        self._publish()
        self._evaluate_and_wait()

    def _announce(self) -> None:
        """Publish, then advance; once more when the broker dies meanwhile."""
        if self._broker.is_up:
            self._publish()
        if not self._broker.is_up or self._cluster.faults.broker_dies_at(Seen.BROKER_DIED_PUBLISHING):
            self._after(RETRY_S, self._announce)
            return
        self._standing = self.learned.standing
        self._asked(self._advance)
        self._world.progressed()
        self._cluster.faults.broker_dies_at(Seen.BROKER_DIED_ADVANCED)
        self._evaluate_and_wait()

    def _publish(self) -> None:
        self._published, self._evaluates = self.learned.version, False
        self._asked(self._tell_published)

    def _tell_published(self) -> None:
        if self._published is not None:
            self._broker.publish(self._session, self._epoch, self._published, self.learned.weights[self._published])

    def _advance(self) -> None:
        self._broker.advance(self._session, self._epoch, self.learned.version, self.learned.standing.skipped)

    def _evaluate_and_wait(self) -> None:
        every = self._world.load.evaluate_every
        self._evaluates = bool(every) and self.learned.version % every == 0
        if self._evaluates and self._broker.is_up:
            self._asked(self._tell_evaluate)
        self._wait()

    def _tell_evaluate(self) -> None:
        self._broker.evaluate(self._session, self._epoch, self.learned.version)

    def _wait(self) -> None:
        self.doing = WAITING
        self.waits_since = self._world.now
        self._broker.changed = True

    # --- The broker

    def beat(self) -> None:
        if self.alive and self._session and self._broker.is_up:
            self._or_end(lambda: self._asked(lambda: self._broker.beat(self._session, self._epoch, [])))

    def _asked(self, question: Callable[[], Answer]) -> Answer:
        """The broker's answer, after an introduction where it does not know us. Raises Refused, Replaced."""
        epoch = self._epoch
        try:
            return question()
        except Refused:
            if self._broker.knows(self._session, epoch):
                raise
        self._greet()
        return question()

    def _greet(self) -> None:
        """Introduces itself; a broker that starts anew is told what it does not know."""
        self._told, epoch = self._standing, self._epoch
        self._session, self._epoch = self._broker.hello(Role.LEARNER, "learner-0", self._incarnation, self._standing)
        if epoch not in (0, self._epoch):
            self._world.seen[Seen.BROKER_TOLD_OF_SKIP] += self._standing.skipped
            self._insist()
            self._tell_published()
            if self._evaluates:
                self._tell_evaluate()

    def _or_end(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Replaced:
            self._world.seen[Seen.ZOMBIE_LEARNER_REFUSED] += 1
            self.alive = False

    def _after(self, delay_s: float, action: Callable[..., None], *arguments: object) -> None:
        if delay_s:
            self._world.after(delay_s, self._do, action, arguments)
        else:
            self._do(action, arguments)

    def _do(self, action: Callable[..., None], arguments: tuple[object, ...]) -> None:
        if self.alive:
            self._or_end(lambda: action(*arguments))
