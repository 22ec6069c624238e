"""A learner rank's line to the broker: shares in, versions out, heartbeats all the time.

A control thread of each rank runs the asyncio loop, so the broker is answered also while the main thread is inside a
step or a collective. Rank 0's thread holds the agreed ledger and hands it to any broker that says it does not know
us: the promise that a dead broker loses nothing rests on `Link._hello`. Called from the main thread; every call has a
deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from protocol.addresses import Addresses, host_identity
from protocol.errors import PeerTimeout, ProtocolError
from protocol.keys import ClientKey
from protocol.messages import (
    Advance,
    Beat,
    BeatAnswer,
    Evaluate,
    Evaluation,
    Finished,
    Hello,
    Message,
    Publish,
    Role,
    SharePage,
    Take,
    Wait,
)
from protocol.session import Session
from protocol.shares import join_pages
from protocol.types import Share
from protocol.weights import Snapshot

Answer = TypeVar("Answer")
log = logging.getLogger("tether.link")


@dataclass(frozen=True, slots=True)
class Standing:
    """What rank 0 tells a broker that knows nothing."""

    version: int  # V
    training_step: int  # -1: none
    ledger: bytes  # msgpack, as of the cut of the last agreed batch; b"": nothing was trained yet
    skipped: bool = False  # that batch's step was not finite and changed nothing


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """One rank's share and what came with it."""

    share: Share
    ledger: bytes  # rank 0; b"" elsewhere
    numbers: dict[str, float]  # rank 0: the broker's metrics as of the cut


class Link:
    """Open it, take, publish, advance; close it."""

    def __init__(
        self,
        addresses: Addresses,
        key: ClientKey,
        *,
        rank: int,
        num_ranks: int,
        standing: Standing,
        settings_digest: str,
        wait_s: float,
    ) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.heartbeat_numbers: dict[str, float] = {}
        self._standing = self._told = standing  # what is so, and what the last hello said
        self._batch_epoch = 0  # of the batch in training
        self.wait_s = wait_s  # deadline of every request: how long the broker may stay away
        self._settings_digest = settings_digest
        self._incarnation = secrets.randbits(62)
        self._state, self._detail, self._since = "starting", "", time.monotonic()
        self._evaluations: list[Evaluation] = []
        self._evaluations_received = 0
        self._published: Publish | None = None
        self._published_base: Publish | None = None
        self._evaluation_asked: Evaluate | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)
        self._thread.start()
        try:
            opening = Session.open(addresses, key, self._hello, timeout_s=wait_s)
            self._session: Session = self._wait(opening, "the broker's welcome")
        except BaseException:
            self._end_thread()
            raise
        self._session.on_epoch = self._introduced_again
        self._beats = asyncio.run_coroutine_threadsafe(self._beat_forever(), self._loop)

    @property
    def num_steps(self) -> int:
        """T, as the broker counted the rows."""
        assert self._session.welcome is not None
        return self._session.welcome.num_steps

    def say(self, state: str, detail: str = "") -> None:
        """What this process is doing or waiting for; heartbeats carry it."""
        self._state, self._detail, self._since = state, detail, time.monotonic()

    def take(self, step: int, check: Callable[[], None]) -> Taken | Finished:
        """This rank's share of `step`, waited for. Raises PeerTimeout when the broker is gone, and what `check` raises.

        `check` is called every few seconds of waiting: what is waited for may hang on something of our own that failed.
        """
        return self._wait(self._take(step, check), f"the share of step {step}", timeout_s=None)

    def agreed(self, taken: Taken) -> None:
        """All ranks hold the same batch: from now on its ledger is the one that a new broker gets."""
        if self.rank == 0:
            self._wait(self._agree(taken), "the broker's welcome")

    def publish(self, snapshot: Snapshot) -> None:
        """The snapshot lies complete in its folder, and so does its base. A broker that starts anew is told again."""
        message = self._published = _publish(snapshot)
        if snapshot.base is not None and self._published_base is None:
            self._published_base = _publish(snapshot.base, is_base=True)
            self._ask(self._published_base)
        self._wait(self._publish_after_its_base(message), "the answer to Publish")

    def advance(self, version: int, *, skipped: bool = False) -> None:
        """Step `version` - 1 is trained and its snapshot published."""
        self._standing = Standing(version, -1, self._standing.ledger, skipped)
        self._wait(self._advance(Advance(version=version, skipped=skipped)), "the answer to Advance")

    def evaluate(self, version: int) -> None:
        """Have the held-out prompts answered by `version`; the result comes through `evaluations`."""
        self._evaluation_asked = Evaluate(version=version)
        self._ask(self._evaluation_asked)

    def evaluations(self) -> list[Evaluation]:
        """Finished evaluations since the last call, oldest first."""
        self._evaluations, finished = [], self._evaluations
        return finished

    def refresh(self) -> None:
        """One heartbeat now, for the evaluations that finished since the last."""
        self._wait(self._beat(), "the answer to a heartbeat")

    def close(self, reason: str) -> None:
        """Leave in order."""
        self._beats.cancel()
        with contextlib.suppress(PeerTimeout):  # the broker is gone; so are we
            self._wait(self._session.close(farewell=reason), "the farewell", timeout_s=5.0)
        self._end_thread()

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5.0)
        if not self._thread.is_alive():
            self._loop.close()

    def _hello(self) -> Hello:
        standing = self._told = self._standing
        first = self.rank == 0
        return Hello(
            role=Role.LEARNER.value,
            name=f"learner-{self.rank}",
            incarnation=self._incarnation,
            host=host_identity(),
            settings_digest=self._settings_digest,
            rank=self.rank,
            num_ranks=self.num_ranks,
            version=standing.version if first else 0,
            training_step=standing.training_step if first else -1,
            ledger=standing.ledger if first else b"",
            skipped=standing.skipped if first else False,
        )

    async def _take(self, step: int, check: Callable[[], None]) -> Taken | Finished:
        while True:
            check()
            pages = await self._pages(step)
            if isinstance(pages, Finished):
                return pages
            if pages is not None:
                share = join_pages(pages, self._session.epoch, self.rank, self.num_ranks)
                return Taken(share, pages[0].ledger, dict(pages[0].numbers))

    async def _publish_after_its_base(self, message: Publish) -> None:
        try:
            await self._session.ask(message, timeout_s=self.wait_s)
        except ProtocolError as error:
            if error.code != "base" or self._published_base is None:
                raise
            log.info("publishing the base again to a broker that was restarted meanwhile")
            await self._session.ask(self._published_base, timeout_s=self.wait_s)
            await self._session.ask(message, timeout_s=self.wait_s)

    async def _advance(self, message: Advance) -> None:
        try:
            await self._session.ask(message, timeout_s=self.wait_s)
        except ProtocolError as error:
            if error.code != "order" or self._published is None:
                raise
            log.info("publishing version %d again to a broker that was restarted meanwhile", message.version)
            await self._publish_after_its_base(self._published)
            await self._session.ask(message, timeout_s=self.wait_s)

    async def _agree(self, taken: Taken) -> None:
        self._standing = Standing(self._standing.version, taken.share.step, taken.ledger)
        self._batch_epoch = taken.share.epoch
        await self._insist()

    async def _insist(self) -> None:
        """See that the broker knows of the batch in training.

        One that was restored after it gave us the batch and before we agreed on it has queued its prompts again. To
        say hello as another process is to have it restored once more, with what we know now.
        """
        while (
            self._standing.training_step >= 0
            and self._session.epoch != self._batch_epoch
            and self._told.training_step != self._standing.training_step
        ):
            log.warning("the broker does not know of step %d: introducing ourselves anew", self._standing.training_step)
            self._incarnation = secrets.randbits(62)
            await self._session.greet(self.wait_s)

    async def _pages(self, step: int) -> list[SharePage] | Finished | None:
        """All pages of one batch; None when the broker had nothing yet, or another batch in the middle of it."""
        pages: list[SharePage] = []
        epoch = self._session.epoch
        while not pages or len(pages) < pages[0].num_pages:
            question = Take(step=step, rank=self.rank, num_ranks=self.num_ranks, page=len(pages))
            try:
                answer = await self._session.ask(
                    question, bulk=True, timeout_s=self.wait_s, what=f"the share of step {step}"
                )
            except ProtocolError as error:
                if error.code == "page" and pages:
                    return None  # a restored broker has another batch, of fewer pages
                raise
            if isinstance(answer, Finished):
                return answer
            if isinstance(answer, Wait):
                self._detail = answer.reason
                return None
            assert isinstance(answer, SharePage)
            if pages and (answer.batch_digest != pages[0].batch_digest or self._session.epoch != epoch):
                return None
            pages.append(answer)
        return pages

    async def _beat_forever(self) -> None:
        assert self._session.welcome is not None
        while True:
            await asyncio.sleep(self._session.welcome.heartbeat_s)
            try:
                await self._beat()
            except (PeerTimeout, ProtocolError):
                continue  # the main thread's next question meets the same silence, and says so

    async def _beat(self) -> None:
        beat = Beat(
            state=self._state,
            detail=self._detail,
            for_s=time.monotonic() - self._since,
            numbers=self.heartbeat_numbers,
            evaluations_seen=self._evaluations_received,
        )
        epoch = self._session.epoch
        answer = await self._session.ask(beat, timeout_s=self.wait_s)
        if (
            isinstance(answer, BeatAnswer)
            and epoch == self._session.epoch
            and beat.evaluations_seen == self._evaluations_received
        ):
            for fields in answer.evaluations:
                self._evaluations_received += 1
                evaluation = Evaluation.model_validate(fields)
                self._evaluations.append(evaluation)
                if self._evaluation_asked is not None and self._evaluation_asked.version <= evaluation.version:
                    self._evaluation_asked = None

    def _introduced_again(self, epoch: int) -> None:
        """The broker was restarted and restored from what our hello said: what else it knew it is told again."""
        log.info("the broker speaks for epoch %016x now", epoch)
        self._evaluations_received = 0
        task = self._loop.create_task(self._tell_again())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell_again(self) -> None:
        await self._insist()
        for message in (self._published_base, self._published, self._evaluation_asked):
            if message is not None:
                await self._session.ask(message, timeout_s=self.wait_s)

    def _ask(self, message: Message) -> None:
        what = f"the answer to {type(message).__name__}"
        self._wait(self._session.ask(message, timeout_s=self.wait_s, what=what), what)

    def _wait(self, coroutine: Coroutine[Any, Any, Answer], what: str, timeout_s: float | None = -1.0) -> Answer:
        """Run it in the control thread. `timeout_s` None: the coroutine keeps its own deadlines."""
        limit = self.wait_s + 5.0 if timeout_s == -1.0 else timeout_s
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(limit)
        except TimeoutError:
            future.cancel()
            raise PeerTimeout(f"waited {limit:.0f} s for {what}; the control thread gave no answer") from None


def _publish(snapshot: Snapshot, *, is_base: bool = False) -> Publish:
    return Publish(
        version=snapshot.version,
        digest=snapshot.digest,
        manifest=snapshot.manifest.to_bytes(),
        path=str(snapshot.folder),
        host=host_identity(),
        is_base=is_base,
    )
