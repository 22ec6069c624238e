"""What a process's log says about why it ended. Pure but for `read_from`; used by the supervisor's verdicts."""

from __future__ import annotations

import re
from pathlib import Path

MAX_READ_BYTES = 4 << 20
MAX_LINE = 300

_TRACEBACK = re.compile(r"Traceback \(most recent call last\):")
_RAISED = re.compile(
    r"(?:^|\s)((?:[\w.]+\.)?\w*(?:Error|Exception|Exit|Interrupt|Timeout|Locked|Progress)\b(?:: .*)?)$"
)
_REPORTED = re.compile(r"^\d\d:\d\d:\d\d [EC] \S+ \S+: (.*)")
"""A line that a process of ours logged as an error (`launch/log_lines.py`)."""

_COMPLAINT = re.compile(r"\b(error|fatal|critical|killed|refused)\b", re.IGNORECASE)


def first_error(text: str) -> str:
    """The line that names what went wrong: of a chain of exceptions the cause; "" if nothing did.

    A program that prefixes its log lines (vLLM's engine core does) is understood too.
    """
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if _TRACEBACK.search(line)), None)
    if start is not None:
        for line in lines[start + 1 :]:
            raised = _RAISED.search(line)
            if raised and not line.startswith("  "):
                return raised[1][:MAX_LINE]
    reported = [found[1] for line in lines if (found := _REPORTED.match(line))]
    if reported:
        return reported[-1][:MAX_LINE]  # what a main says when it leaves
    return next((line.strip()[:MAX_LINE] for line in lines if _COMPLAINT.search(line)), "")


def last_line(text: str) -> str:
    """What a process said last."""
    return next((line.strip()[:MAX_LINE] for line in reversed(text.splitlines()) if line.strip()), "")


def read_from(path: Path, offset: int) -> str:
    """The log's text from a byte on; of a huge log the first part, where first errors are."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(MAX_READ_BYTES).decode(errors="replace")
