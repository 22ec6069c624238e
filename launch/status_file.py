"""RUN/status.json: what a run is doing, for whoever looks into its folder instead of asking its broker.

Written by `launch/cluster.py` at every answer of the broker, about once a second, and a last time when the run has
ended. A reader never sees half a file: that rests on the rename in `_write`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.supervisor import Seen, Verdict

log = logging.getLogger("tether.cluster")


class StatusFile:
    """`answered` while the run goes on, `ended` once."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "status.json"
        self._broker: Mapping[str, Any] = {}  # its last answer

    def answered(self, broker: Mapping[str, Any], processes: Sequence[Seen]) -> None:
        """`broker`: its status; {} while it gives none."""
        self._broker = broker or self._broker
        self._write(broker, processes, None)

    def ended(self, verdict: Verdict, processes: Sequence[Seen]) -> None:
        self._write(self._broker, processes, verdict)

    def _write(self, broker: Mapping[str, Any], processes: Sequence[Seen], ended: Verdict | None) -> None:
        fields = {
            "time": round(time.time(), 3),
            "pid": os.getpid(),
            "ended": {"code": int(ended.code), "text": ended.text} if ended else None,
            "processes": [{"name": seen.name, "state": seen.state, "restarts": seen.restarts} for seen in processes],
            "broker": dict(broker),
        }
        aside = self.path.with_name(f"{self.path.name}.tmp")
        try:
            aside.write_text(json.dumps(fields, indent=1) + "\n")
            os.replace(aside, self.path)
        except OSError as error:  # a disk that is full for a moment is no reason to end a run
            log.warning("%s was not written: %s", self.path, error)
