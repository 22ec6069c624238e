"""What the broker does for generators: leases out, results in, weights and files on request.

Every result gets exactly one final status. Which lease goes to whom, and what becomes of a result, is the scheduler's
decision; this desk checks what a peer claims before the scheduler sees it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgpack
import numpy as np

from broker.checks import invalid_reason, trajectory
from broker.leases import Grant, Refusal
from broker.leases import Wait as NoLease
from broker.outcome import Later
from broker.overlong import punished
from broker.peers import Peer
from broker.prompts import Unusable
from broker.report import evaluation_summary, write_completions
from broker.run_state import RunState
from broker.scheduler import Scheduler
from protocol.errors import ProtocolError, SnapshotError
from protocol.messages import (
    Bytes,
    Done,
    FetchChunk,
    FetchFile,
    FetchManifest,
    LeaseItem,
    Leases,
    ManifestAnswer,
    Pull,
    Release,
    Result,
    Status,
    Verdict,
    Wait,
)
from protocol.rewards import names_in_results
from protocol.types import LeaseKind, Prompt, Trajectory

log = logging.getLogger("tether.broker")

FILE_PART_BYTES = 4 << 20
MAX_LEASES = 256  # of one answer: what `Leases` may carry
LEASES_BYTES = 4 << 20  # likewise; half of the codec's limit
AT_ONCE = {Refusal.NEWER_VERSION, Refusal.UNKNOWN_VERSION, Refusal.TOO_OLD}  # the asker can do something about it now


class GeneratorDesk:
    """Answers Pull, Release, Result and the fetches."""

    def __init__(self, run: RunState) -> None:
        self._run = run

    def pull(self, peer: Peer, message: Pull, now: float) -> Leases | Wait | Later:
        run, newest = self._run, self._run.announced
        peer.seen_at, peer.held = now, (message.version, message.digest)
        if message.digest:
            run.shelf.ended(peer.session, message.digest)
        if run.scheduler is None or newest is None:
            return Later(Wait(reason="waiting for the learner"))

        def wait(reason: str) -> Wait:
            return Wait(reason=reason, version=newest.version, digest=newest.digest)

        if run.draining or run.verdict:
            return Later(wait("the run ends"))
        if not message.digest or run.shelf.digest(message.version) != message.digest:
            return wait(Refusal.UNKNOWN_VERSION.value)
        newer = newest.version > message.version
        room = min(message.room, MAX_LEASES)
        answer = run.scheduler.pull(peer.id, message.version, room, now, newer_available=newer)
        if isinstance(answer, NoLease):
            said = wait(answer.reason.value)
            return said if answer.reason in AT_ONCE and newer else Later(said)
        run.changed = True
        items = self._items(answer)
        if not items:
            return Later(wait("prompts were skipped"))
        tokens = np.concatenate([prompt.tokens for _, prompt in items]).astype(np.int32)
        return Leases(leases=[item for item, _ in items], tokens=tokens)

    def undelivered(self, leases: Leases) -> None:
        """Its asker is gone, so it cannot have crashed of these prompts: they go to somebody else."""
        for item in leases.leases:
            self._run.scheduler_now().released(item.attempt)
        self._run.changed = True

    def renew(self, peer: Peer, leases: Sequence[tuple[int, int, int]], now: float) -> list[tuple[int, int]]:
        """Keeps the leases (prompt, attempt, tokens) of a heartbeat; returns those that are not the sender's."""
        scheduler = self._run.scheduler
        return [
            (prompt, attempt)
            for prompt, attempt, num_tokens in leases
            if scheduler is None
            or not self._holds(peer, attempt, prompt)
            or not scheduler.renew(attempt, num_tokens, now)
        ]

    def release(self, peer: Peer, message: Release, now: float) -> Done:
        scheduler = self._run.scheduler
        if scheduler is not None and self._holds(peer, message.attempt, message.number):
            if message.failed:
                scheduler.failed(message.attempt, message.reason, now)
            else:
                scheduler.released(message.attempt)
            self._run.changed = True
            self.settle(now)
        return Done()

    def result(self, peer: Peer, message: Result, now: float) -> Verdict:
        run = self._run
        verdict = self._judge(peer, message, now)
        run.num_results[verdict.status] = run.num_results.get(verdict.status, 0) + 1
        if verdict.status == Status.ACCEPTED:
            run.progress_at = now
            run.num_errors += bool(message.error)
        self.settle(now)
        return verdict

    def settle(self, now: float) -> None:
        """Write down what the last events decided: prompts that are given up, an evaluation that is complete."""
        if self._run.scheduler is not None:
            self._write_quarantined(self._run.scheduler)
            self._finish_evaluation(self._run.scheduler, now)

    def manifest(self, peer: Peer, message: FetchManifest) -> ManifestAnswer:
        self._run.shelf.ended(peer.session)
        shelf, what = self._run.shelf, f"base {message.base[:12]}" if message.base else f"version {message.version}"
        shelved = shelf.base(message.base) if message.base else shelf.version(message.version)
        if shelved is None:
            raise ProtocolError("version", f"{what} is not on the shelf any more; ask for the newest")
        path = shelved.path if peer.host and peer.host == shelved.host else ""
        return ManifestAnswer(version=shelved.version, digest=shelved.digest, manifest=shelved.manifest, path=path)

    def chunk(self, peer: Peer, message: FetchChunk, now: float) -> Bytes:
        try:
            return Bytes(data=self._run.shelf.chunk(message.digest, message.index, peer.session, now))
        except SnapshotError as error:
            text = f"snapshot {message.digest[:12]} is not to be had any more: {error}; ask for the newest"
            raise ProtocolError("chunk", text) from None

    def file(self, message: FetchFile) -> Bytes:
        entry = self._run.files.get(message.name)
        if entry is None:
            raise ProtocolError("file", f"{message.name[:80]} is no file of the model")
        if message.offset > entry[1]:
            raise ProtocolError("file", f"{message.name} has {entry[1]} bytes, byte {message.offset} was asked for")
        with open(entry[0], "rb") as file:
            file.seek(message.offset)
            return Bytes(data=np.frombuffer(file.read(FILE_PART_BYTES), np.uint8))

    def _judge(self, peer: Peer, message: Result, now: float) -> Verdict:
        run, config = self._run, self._run.config
        if message.epoch != run.epoch:
            return Verdict(status=Status.STALE_EPOCH, reason="the broker was restored since this lease was given")
        scheduler = run.scheduler_now()
        lease = scheduler.leases.find(message.attempt)
        if lease is None or not self._holds(peer, message.attempt, message.prompt):
            return Verdict(status=Status.LATE, reason="this lease is not yours any more")
        evaluating = lease.grant.kind is LeaseKind.EVALUATE
        sampling = config.evaluation_params() if evaluating else config.sampling.params()
        reason = invalid_reason(
            message,
            max_tokens=sampling.max_tokens,
            vocab_size=run.vocab_size,
            versions=range(lease.grant.version, scheduler.version + 1),
            reward_names=names_in_results(config, evaluating=evaluating),
        )
        answer = trajectory(message)
        if config.algorithm.overlong == "punish" and not evaluating:
            answer = punished(answer, sampling.max_tokens, config.algorithm.overlong_buffer_tokens)
        if reason:
            log.warning(
                "result %d of prompt %d by %s is invalid: %s", message.sample, message.prompt, peer.name, reason
            )
            answer = Trajectory(message.prompt, message.attempt, message.sample, None, error=f"invalid: {reason}")
        status = scheduler.finished(answer, now)
        run.changed = run.changed or scheduler.may_answer_others(lease)
        return Verdict(status=Status.INVALID.value if reason else status.value, reason=reason)

    def _items(self, grants: Sequence[Grant]) -> list[tuple[LeaseItem, Prompt]]:
        """What one answer can carry of them; the others are free again, for the next pull."""
        items: list[tuple[LeaseItem, Prompt]] = []
        num_bytes = 0
        for index, grant in enumerate(grants):
            leased = self._lease(grant)
            if leased is None:
                continue
            texts = (leased[0].columns, leased[0].conversation)
            num_bytes += 4 * leased[0].num_tokens + len(msgpack.packb(texts))
            if items and num_bytes > LEASES_BYTES:
                for rest in reversed(grants[index:]):  # each goes to the front of its queue
                    self._run.scheduler_now().released(rest.attempt)
                break
            items.append(leased)
        return items

    def _lease(self, grant: Grant) -> tuple[LeaseItem, Prompt] | None:
        """The wire's form of a grant; None when its prompt cannot be used, which the ledger then says."""
        run = self._run
        evaluating = grant.kind is LeaseKind.EVALUATE
        prompt = run.source.evaluation[grant.prompt] if evaluating else run.source.prompt(grant.prompt)
        if isinstance(prompt, Unusable):
            run.scheduler_now().filtered(grant.attempt, prompt.reason)
            return None
        item = LeaseItem(
            kind=grant.kind.value,
            number=grant.prompt,
            row=prompt.row,
            attempt=grant.attempt,
            samples=grant.samples,
            version=grant.version,
            failures=grant.failures,
            ttl_s=run.config.watchdog.lease_ttl_s,
            num_tokens=len(prompt.tokens),
            columns=dict(prompt.columns),
            conversation=[dict(message) for message in prompt.conversation],
        )
        return item, prompt

    def _holds(self, peer: Peer, attempt: int, number: int) -> bool:
        lease = self._run.scheduler_now().leases.find(attempt)
        return lease is not None and lease.holder == peer.id and lease.grant.prompt == number

    def _write_quarantined(self, scheduler: Scheduler) -> None:
        for number, reason in scheduler.quarantined:
            log.error("prompt %d is quarantined: %s", number, reason)
            self._run.write_line("quarantine.jsonl", {"prompt": number, "reason": reason})
        scheduler.quarantined.clear()

    def _finish_evaluation(self, scheduler: Scheduler, now: float) -> None:
        answered = scheduler.take_evaluation()
        if answered is not None:
            self._run.evaluations.append(evaluation_summary(self._run, answered, now))
            write_completions(self._run, answered)
            self._run.changed = True
