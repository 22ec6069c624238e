"""What each message does: sessions and roles here, the work itself at the desks.

No socket, no thread: `handle` takes a decoded message and the time, and returns the answer, or Later when there is
none yet. A session belongs to the key it was opened with and to the epoch it was opened in; anything else is told to
say hello again, which is the one way everybody learns of a restart.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from typing import Any

from broker.generator_desk import GeneratorDesk
from broker.learner_desk import LearnerDesk
from broker.outcome import Later
from broker.outlook import describe
from broker.peers import MAX_PEERS, Peer
from broker.run_state import RunState
from broker.watchdog import Watchdog
from protocol.codec import Header
from protocol.errors import ProtocolError
from protocol.messages import (
    Advance,
    Beat,
    BeatAnswer,
    Bye,
    Done,
    Drain,
    Evaluate,
    FetchChunk,
    FetchFile,
    FetchManifest,
    Hello,
    Leases,
    Message,
    Over,
    Publish,
    Pull,
    Release,
    Result,
    Role,
    StatusAnswer,
    StatusRequest,
    Take,
    VersionHint,
    Welcome,
)

log = logging.getLogger("tether.broker")


class Service:
    """All of the broker but its sockets."""

    def __init__(self, run: RunState) -> None:
        self._run = run
        self._learner = LearnerDesk(run)
        self._generators = GeneratorDesk(run)
        self._watchdog = Watchdog(run)
        self.refused: Counter[str] = Counter()  # by code; the server counts

    @property
    def epoch(self) -> int:
        return self._run.epoch

    @property
    def changed(self) -> bool:
        """Whether a parked question may have an answer now."""
        return self._run.changed

    @changed.setter
    def changed(self, value: bool) -> None:
        self._run.changed = value

    def take_hints(self) -> list[tuple[bytes, VersionHint]]:
        """Pushes that are due, each with its route."""
        self._run.hints, hints = [], self._run.hints
        return hints

    def farewells(self) -> list[tuple[bytes, Over]]:
        """What generators are told when this broker ends in order: with it the run does."""
        return [(peer.route, Over(reason="the run is over")) for peer in self._run.peers.of_role(Role.GENERATOR)]

    def tick(self, now: float) -> None:
        """What time brings: lost leases, silent peers, the watchdog, an evaluation that waited for another."""
        run = self._run
        if run.scheduler is not None:
            for lease in run.scheduler.expire(now):
                log.warning("lease of prompt %d (attempt %d) was lost", lease.grant.prompt, lease.grant.attempt)
                run.changed = True
        for peer in run.peers.silent(now, run.config.watchdog.lease_ttl_s):
            log.warning("%s has been silent for %.0f s: its session ends", peer.name, now - peer.seen_at)
            self._lose(peer, crashed=True)
        run.shelf.expire(now, run.config.watchdog.lease_ttl_s)
        self._generators.settle(now)
        self._learner.start_evaluation(now)
        self._watchdog.look(now)

    def handle(
        self, message: Message, header: Header, key: str, role: Role, route: bytes, now: float
    ) -> Message | Later:
        """The answer to one message. Raises ProtocolError to refuse it."""
        if isinstance(message, Hello):
            return self._hello(message, key, role, route, now)
        peer = self._run.peers.get(header.session)
        if peer is None or header.epoch != self._run.epoch:
            raise ProtocolError("session", "this session is over; say hello again")
        if peer.key != key:
            raise ProtocolError("identity", "this session belongs to another key")
        match message:
            case Beat():
                peer.route = route
                return self._beat(peer, message, now)
            case Pull():
                peer.route = route
                return self._generators.pull(peer, message, now)
            case Result():
                return self._generators.result(peer, message, now)
            case Release():
                return self._generators.release(peer, message, now)
            case FetchManifest():
                return self._generators.manifest(peer, message)
            case FetchChunk():
                return self._generators.chunk(peer, message, now)
            case FetchFile():
                return self._generators.file(message)
            case Take():
                peer.seen_at = now
                return self._learner.take(message, now)
            case Publish():
                return self._learner.publish(message, now)
            case Advance():
                return self._learner.advance(message, now)
            case Evaluate():
                return self._learner.evaluate(message, now)
            case StatusRequest():
                peer.seen_at = now
                return StatusAnswer(status=self.status(now))
            case Drain():
                self._run.draining = message.reason or "asked to"
                self._run.changed = True
                log.info("draining: %s", self._run.draining)
                return Done()
            case Bye():
                log.info("%s leaves: %s", peer.name, message.reason)
                self._lose(peer, crashed=False)
                return Done()
        raise ProtocolError("type", f"{type(message).__name__} is no question")

    def undelivered(self, answer: Message) -> None:
        """An answer did not reach its asker; what it hands out must not stay with the dead."""
        if isinstance(answer, Leases):
            self._generators.undelivered(answer)

    def status(self, now: float) -> dict[str, Any]:
        """Who waits for what since when: what the console and tools/status.py show."""
        run, scheduler = self._run, self._run.scheduler
        learner = next((peer for peer in run.peers.of_role(Role.LEARNER) if peer.rank == 0), None)
        shown = [peer for peer in run.peers if peer.role is not Role.STATUS]
        return {
            "run_id": run.run_id,
            "phase": self._phase(),
            "version": scheduler.version if scheduler else 0,
            "next": scheduler.next_step if scheduler else 0,
            "training_step": scheduler.training if scheduler and scheduler.training is not None else -1,
            "num_steps": run.num_steps,
            "data": run.source.notes,
            "progress_s": round(now - run.progress_at, 1) if run.progress_at else 0.0,
            "ledger": scheduler.ledger.counts() if scheduler else {},
            "scheduler": describe(scheduler, now) if scheduler else {},
            "processes": [peer.describe(now) for peer in sorted(shown, key=lambda peer: (peer.role, peer.name))],
            "metrics": learner.numbers if learner else {},
            "evaluations": [{name: e[name] for name in ("version", "accuracy")} for e in run.evaluations],
            "evaluating": bool(scheduler and scheduler.evaluation),
            "results": dict(run.num_results),
            "refused": dict(self.refused),
            "verdict": run.verdict or (scheduler.verdict if scheduler else ""),
        }

    def _phase(self) -> str:
        run = self._run
        if run.scheduler is None:
            return "waiting for the learner"
        if run.draining:
            return "draining"
        return "done" if run.scheduler.done else "running"

    def _hello(self, hello: Hello, key: str, role: Role, route: bytes, now: float) -> Welcome:
        run = self._run
        if hello.role != role.value:
            raise ProtocolError("role", f"the key is a {role}'s, the process says it is a {hello.role[:20]}")
        if hello.settings_digest and hello.settings_digest != run.config.result_digest():
            raise ProtocolError(
                "settings",
                f"{hello.name} has other settings than the run (digest {hello.settings_digest[:8]}, expected "
                f"{run.config.result_digest()[:8]}); start it again, with the run's settings",
            )
        if role is Role.GENERATOR and hello.reward_digest != run.reward_digest:
            raise ProtocolError(
                "rewards",
                f"{hello.name} would score with other reward code than the run, or another reward model; give it the "
                "same files with --reward and --reward-model",
            )
        if role is Role.GENERATOR and hello.rollout_digest != run.rollout_digest:
            raise ProtocolError(
                "rollout",
                f"{hello.name} would make completions by another rollout than the run; give it the same file with "
                "--rollout",
            )
        if role is not Role.STATUS:
            self._take_over(role, hello)
        if len(run.peers) >= MAX_PEERS:
            raise ProtocolError("full", f"{MAX_PEERS} processes are connected, which is the limit")
        if role is Role.LEARNER and hello.rank == 0:
            self._meet_learner(hello, now)
        peer = run.peers.admit(secrets.randbits(62) | 1, key, hello, now)
        peer.route = route
        run.changed = True
        log.info("%s is here (session %s)", hello.name, peer.id)
        files = (
            [(name, size, digest) for name, (_, size, digest) in run.files.items()] if role is Role.GENERATOR else []
        )
        return Welcome(
            session=peer.session,
            run_id=run.run_id,
            settings=run.config.model_dump(mode="json"),
            files=files,
            heartbeat_s=run.config.watchdog.heartbeat_s,
            num_steps=run.num_steps,
        )

    def _take_over(self, role: Role, hello: Hello) -> None:
        """A process that is restarted, or connects anew, takes the place of the one before.

        The one before may still live: were it let in again, the two would take turns and get nothing done.
        """
        peers = self._run.peers
        if peers.is_replaced(hello):
            raise ProtocolError(
                "replaced", f"another process called {hello.name} has taken this one's place; give each its own --name"
            )
        for old in peers.named(role, hello.name):
            self._lose(old, crashed=old.incarnation != hello.incarnation)

    def _meet_learner(self, hello: Hello, now: float) -> None:
        """A learner we do not know brings the truth with it; one that only reconnects finds everything as it was."""
        run = self._run
        if run.scheduler is None or run.learner_incarnation != hello.incarnation:
            run.restore(hello, now)

    def _beat(self, peer: Peer, beat: Beat, now: float) -> BeatAnswer:
        run = self._run
        peer.beats(beat, now)
        newest = run.announced
        first = peer.role is Role.LEARNER and peer.rank == 0
        return BeatAnswer(
            version=newest.version if newest else 0,
            digest=newest.digest if newest else "",
            revoked=self._generators.renew(peer, beat.leases, now),
            evaluations=run.evaluations[beat.evaluations_seen :] if first else [],
        )

    def _lose(self, peer: Peer, crashed: bool) -> None:
        self._run.peers.forget(peer)
        self._run.shelf.ended(peer.session)
        if peer.role is Role.GENERATOR and self._run.scheduler is not None:
            self._run.scheduler.holder_lost(peer.id, crashed)
            self._run.changed = True
