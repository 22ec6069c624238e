"""What a run has written so far: metrics.jsonl, with a line per step, and evaluations.jsonl, one per evaluation.

Read by the console while the learner appends, and by the summary at the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


class History:
    """Rows of one run, read on as they are appended. A file that a resumed learner has cut back is read anew."""

    def __init__(self, run_dir: Path) -> None:
        self._curves = _Tail(run_dir / "metrics.jsonl")
        self._evaluations = _Tail(run_dir / "evaluations.jsonl")

    def read(self) -> None:
        self._curves.read()
        self._evaluations.read()

    @property
    def steps(self) -> Sequence[Row]:
        """One row per training step."""
        return [row for row in self._curves.rows if "reward/mean" in row]

    @property
    def warmup(self) -> Sequence[Row]:
        """One row per step of the supervised warm start."""
        return [row for row in self._curves.rows if "warmup/loss" in row]

    @property
    def evaluations(self) -> Sequence[Row]:
        """One row per evaluated version; a version that a resumed run evaluated again has its newest."""
        return list({row["version"]: row for row in self._evaluations.rows}.values())


class _Tail:
    def __init__(self, path: Path) -> None:
        self.rows: list[Row] = []
        self._path = path
        self._offset, self._inode = 0, 0

    def read(self) -> None:
        """Take in whole new lines; a half-written last one waits for the next call."""
        try:
            status = self._path.stat()
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset, self.rows = status.st_ino, 0, []
            with self._path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            row = _row(line)
            if row is not None:
                self.rows.append(row)


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None  # the learner was killed in the middle of a line
    return row if isinstance(row, dict) else None
