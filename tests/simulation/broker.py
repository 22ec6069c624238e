"""The broker of a simulated cluster: what `broker/service.py` and its desks do around the scheduler, without messages.

Used by simulations only. Scheduler, ledger and peers are the real ones. Sessions and epochs are checked as the service
checks them; a broker that dies is replaced by a new object, which knows nothing until a learner says hello.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from broker.batches import Batch
from broker.leases import Grant, OpenLease, Wait
from broker.ledger import Ledger, LedgerSnapshot
from broker.peers import Peer, Peers
from broker.prompts import TOO_LONG
from protocol.messages import Hello, Role, Status
from protocol.types import LeaseKind, Trajectory
from tests.simulation.books import Books
from tests.simulation.promises import WatchedScheduler
from tests.simulation.world import World


class Refused(Exception):
    """This session is over, or this message comes at the wrong time."""


class Replaced(Exception):
    """Another process has taken this one's place."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a learner tells a broker that knows nothing."""

    version: int
    training: int | None = None
    ledger: LedgerSnapshot | None = None  # None: nothing was trained yet
    books: Books = field(default_factory=Books)
    skipped: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A batch on its way to the learner, with the ledger and the books as of its cut."""

    epoch: int
    batch: Batch
    ledger: LedgerSnapshot
    books: Books


class SimulatedBroker:
    """One life of the broker process."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.epoch = world.number()
        self.is_up = True
        self.changed = True  # something happened that may answer who waits
        self.scheduler: WatchedScheduler | None = None
        self._weights: dict[int, int] = {}  # by version: what was published, as a number of its own
        self._peers = Peers()
        self._learner_incarnation = 0
        self._cuts: dict[int, Cut] = {}  # by step, until its advance
        self._evaluation_wanted = False

    # --- Who is there

    def hello(self, role: Role, name: str, incarnation: int, standing: Standing | None = None) -> tuple[int, int]:
        """(session, epoch). Raises Replaced."""
        hello = Hello(role=role.value, name=name, incarnation=incarnation)
        if self._peers.is_replaced(hello):
            raise Replaced(name)
        for old in self._peers.named(role, name):
            self._lose(old, crashed=old.incarnation != incarnation)
        if standing is not None and (self.scheduler is None or self._learner_incarnation != incarnation):
            self._learner_incarnation = incarnation
            self._restore(standing)
        self.changed = True
        return self._peers.admit(self._world.number(), "", hello, self._world.now).session, self.epoch

    def _restore(self, standing: Standing) -> None:
        ledger = Ledger() if standing.ledger is None else Ledger.restore(standing.ledger)
        books = standing.books
        if standing.skipped:
            ledger.skip_step()
            books = books.skip()
        self.scheduler = WatchedScheduler(
            self._world.settings, ledger, standing.version, standing.training, books=books, record=self._world.record
        )
        self.epoch = self._world.number()
        self._cuts.clear()
        self._weights.clear()
        self._evaluation_wanted = False

    def knows(self, session: int, epoch: int) -> bool:
        return epoch == self.epoch and self._peers.get(session) is not None

    def _admitted(self, session: int, epoch: int) -> Peer:
        peer = self._peers.get(session)
        if peer is None or epoch != self.epoch:
            raise Refused("session")
        return peer

    def _lose(self, peer: Peer, crashed: bool) -> None:
        self._peers.forget(peer)
        if peer.role is Role.GENERATOR and self.scheduler is not None:
            self.scheduler.holder_lost(peer.id, crashed)
            self.changed = True

    def bye(self, session: int, epoch: int) -> None:
        self._lose(self._admitted(session, epoch), crashed=False)

    def tick(self) -> tuple[list[OpenLease], list[int]]:
        """What time brings; returns the leases that it took back, and the sessions of generators that it ended."""
        lost = self.scheduler.expire(self._world.now) if self.scheduler else []
        silent = self._peers.silent(self._world.now, self._world.settings.lease_ttl_s)
        for peer in silent:
            self._lose(peer, crashed=True)
        self.changed = self.changed or bool(lost)
        self._settle()
        self._start_evaluation()
        return lost, [peer.session for peer in silent if peer.role is Role.GENERATOR]

    # --- Generators

    def weights_of(self, version: int) -> int | None:
        """What was published under this number."""
        return self._weights.get(version)

    @property
    def announced(self) -> tuple[int, int] | None:
        """(version, weights) that generators should hold; None until they are published."""
        version = self.scheduler.version if self.scheduler else -1
        return (version, self._weights[version]) if version in self._weights else None

    def pull(self, session: int, epoch: int, held: tuple[int, int], room: int) -> list[Grant] | None:
        """Leases, or None for now."""
        peer = self._admitted(session, epoch)
        peer.seen_at = self._world.now
        newest, (version, weights) = self.announced, held
        if self.scheduler is None or newest is None or self._weights.get(version) != weights:
            return None
        newer = newest[0] > version
        answer = self.scheduler.pull(peer.id, version, room, self._world.now, newer_available=newer)
        if isinstance(answer, Wait):
            return None
        self.changed = True
        return [grant for grant in answer if self._is_usable(self.scheduler, grant)] or None

    def _is_usable(self, scheduler: WatchedScheduler, grant: Grant) -> bool:
        every = self._world.load.unusable_every
        too_long = grant.kind is LeaseKind.TRAIN and every > 0 and grant.prompt % every == 0
        if too_long:
            scheduler.filtered(grant.attempt, TOO_LONG)
        return not too_long

    def undelivered(self, grants: list[Grant]) -> None:
        for grant in grants:
            self._now().released(grant.attempt)
        self.changed = True

    def result(self, session: int, epoch: int, of_epoch: int, trajectory: Trajectory) -> Status:
        """`of_epoch`: that the lease was given in."""
        peer = self._admitted(session, epoch)
        if of_epoch != self.epoch:
            return Status.STALE_EPOCH
        if not self._holds(peer, trajectory.attempt, trajectory.prompt):
            return Status.LATE
        scheduler = self._now()
        lease = scheduler.leases.find(trajectory.attempt)
        assert lease is not None
        status = scheduler.finished(trajectory, self._world.now)
        self.changed = self.changed or scheduler.may_answer_others(lease)
        self._settle()
        return Status(status.value)

    def release(self, session: int, epoch: int, grant: Grant, failed: bool) -> None:
        peer = self._admitted(session, epoch)
        if self._holds(peer, grant.attempt, grant.prompt):
            if failed:
                self._now().failed(grant.attempt, "given up", self._world.now)
            else:
                self._now().released(grant.attempt)
            self.changed = True
            self._settle()

    def beat(self, session: int, epoch: int, grants: list[Grant]) -> list[Grant]:
        """A heartbeat; returns the leases that are not the sender's any more."""
        peer = self._admitted(session, epoch)
        peer.seen_at = self._world.now
        return [
            grant
            for grant in grants
            if not self._holds(peer, grant.attempt, grant.prompt)
            or not self._now().renew(grant.attempt, 1, self._world.now)
        ]

    def _holds(self, peer: Peer, attempt: int, prompt: int) -> bool:
        lease = self.scheduler.leases.find(attempt) if self.scheduler else None
        return lease is not None and lease.holder == peer.id and lease.grant.prompt == prompt

    # --- The learner

    def take(self, session: int, epoch: int, step: int) -> Cut | str | None:
        """The batch of this step, the same until its advance; or why no other comes; or None while it is not ready."""
        self._admitted(session, epoch).seen_at = self._world.now
        scheduler = self._now()
        if step not in self._cuts:
            if scheduler.verdict:
                return scheduler.verdict
            if scheduler.done:
                return "complete"
            if step != scheduler.next_step or not scheduler.ready:
                return None
            batch = scheduler.take(self._world.now)
            self._cuts[step] = Cut(self.epoch, batch, scheduler.ledger.snapshot(), scheduler.books)
            self.changed = True
        return self._cuts[step]

    def publish(self, session: int, epoch: int, version: int, weights: int) -> None:
        self._admitted(session, epoch)
        self._weights[version] = weights
        self.changed = True

    def advance(self, session: int, epoch: int, version: int, skipped: bool) -> None:
        self._admitted(session, epoch)
        scheduler = self._now()
        if version == scheduler.version:
            return
        if version not in self._weights or scheduler.training is None or version != scheduler.version + 1:
            raise Refused("order")
        scheduler.advanced(version, self._world.now, skipped)
        self._cuts = {step: cut for step, cut in self._cuts.items() if step >= version}
        self.changed = True

    def evaluate(self, session: int, epoch: int, version: int) -> None:
        """Of the newest version, which `version` is to whoever asks."""
        self._admitted(session, epoch)
        self._evaluation_wanted = True
        self._start_evaluation()

    def _start_evaluation(self) -> None:
        scheduler = self.scheduler
        if scheduler is None or scheduler.evaluation is not None:
            return
        if self._evaluation_wanted or (scheduler.trained_out and not scheduler.done):
            self._evaluation_wanted = False
            if scheduler.evaluated_version != scheduler.version:
                scheduler.evaluate(range(self._world.load.num_evaluation_prompts))
                self.changed = True

    def _settle(self) -> None:
        """Takes note of what the last events decided."""
        result = self.scheduler.take_evaluation() if self.scheduler else None
        if self.scheduler is not None:
            self.scheduler.quarantined.clear()
        if result is not None:
            tokens = {int(token) for one in result.trajectories if one.completion for token in one.completion.tokens}
            assert tokens <= {self._weights[result.version]}, f"evaluation {result.version} is by weights {tokens}"
            self.changed = True

    def _now(self) -> WatchedScheduler:
        if self.scheduler is None:
            raise Refused("no_learner")
        return self.scheduler
