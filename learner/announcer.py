"""Publish, then advance: the second half of a step, most of it beside the next one.

Every rank takes part in the copy (under ZeRO 3 each writes its own slices); rank 0's thread then makes the digests
and tells the broker, in this order: the snapshot exists, the version has advanced, its evaluation is wanted.
Advancing before the snapshot exists would let a generator ask for weights that are not there; that it cannot happen
rests on `_finish`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from learner.link import Link
from learner.publisher import Publisher
from learner.ranks import Ranks

DIGEST_S = 600.0  # of the largest snapshot
ANSWERS = 3  # of the broker, each within the link's own deadline


class Announcer:
    """One announcement at a time; an error of one is raised by the next call."""

    def __init__(
        self, publisher: Publisher, link: Link, ranks: Ranks, evaluation_is_due: Callable[[int], bool]
    ) -> None:
        self._publisher, self._link, self._ranks, self._evaluation_is_due = publisher, link, ranks, evaluation_is_due
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.stall_s = 0.0  # of the last announcement: what the training loop waited for
        self.publish_s = 0.0  # from the copy's start to the broker's last answer
        self.snapshot_bytes = 0

    def announce(self, version: int, *, first: bool = False, skipped: bool = False) -> None:
        """Collective: copy the weights of `version`; the rest happens in rank 0's thread."""
        self.wait()
        started = time.monotonic()
        self._publisher.copy(version)
        self.stall_s = time.monotonic() - started
        if self._ranks.is_first:
            self._thread = threading.Thread(
                target=self._finish, args=(version, first, skipped, started), name="announcer"
            )
            self._thread.start()

    def wait(self) -> None:
        """Until the last announcement is done. Raises what it failed of."""
        if self._thread is not None:
            limit = DIGEST_S + ANSWERS * self._link.wait_s
            self._thread.join(limit)
            assert not self._thread.is_alive(), f"the announcement took longer than {limit:.0f} s"
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what the announcement failed of, if it did."""
        if self._error is not None:
            raise self._error

    def _finish(self, version: int, first: bool, skipped: bool, started: float) -> None:
        try:
            snapshot = self._publisher.finish()
            self.snapshot_bytes = snapshot.manifest.total_bytes
            self._link.publish(snapshot)
            if not first:
                self._link.advance(version, skipped=skipped)
            if self._evaluation_is_due(version):
                self._link.evaluate(version)
            self.publish_s = time.monotonic() - started
        except BaseException as error:
            self._error = error
