"""Nothing waits in silence: what the broker does when a run makes no progress.

Progress is an accepted result, a cut batch or an announced version. Without any for `watchdog.warn_s` the table of
who waits for whom is written to the log; after `watchdog.stop_s` the run gets a verdict, which ends it.
"""

from __future__ import annotations

import json
import logging

from broker.outlook import describe
from broker.run_state import RunState

log = logging.getLogger("tether.broker")


class Watchdog:
    """Looked at on every tick."""

    def __init__(self, run: RunState) -> None:
        self._run = run
        self._warned_at = 0.0

    def look(self, now: float) -> None:
        run, limits = self._run, self._run.config.watchdog
        if run.announced is None or run.scheduler is None or run.scheduler.done or run.verdict or run.draining:
            return
        idle_s = now - run.progress_at
        if idle_s > limits.warn_s and now - self._warned_at > limits.warn_s:
            self._warned_at = now
            table = [peer.describe(now) for peer in run.peers]
            log.warning(
                "no progress for %.0f s: %s",
                idle_s,
                json.dumps({"peers": table, "leases": describe(run.scheduler, now)}),
            )
        if idle_s > limits.stop_s:
            waiting = "; ".join(f"{peer.name}: {peer.state} {peer.detail}".strip() for peer in run.peers)
            run.verdict = f"no progress for {idle_s:.0f} s (watchdog.stop_s); {waiting or 'nobody is connected'}"
            run.changed = True
            log.error("%s", run.verdict)
