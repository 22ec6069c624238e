"""What a desk may say to a question besides an answer."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages import Wait


@dataclass(frozen=True, slots=True)
class Later:
    """Nothing now: park the question, ask again when something changed, and send `wait` when that took too long."""

    wait: Wait
