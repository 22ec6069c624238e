"""What a learner rank is doing, and where its time went. The states' shares of each step add up to 1."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from enum import StrEnum


class State(StrEnum):
    """The named states of a learner rank; also the curves time/<state>."""

    STARTING = "starting"
    WARMING_UP = "warming_up"  # supervised warm start
    WAITING_FOR_TRAJECTORIES = "waiting_for_trajectories"
    WAITING_FOR_RANKS = "waiting_for_ranks"
    TRAINING = "training"
    PUBLISHING = "publishing"  # the copy of the weights, and the announcement before it if that is not done yet
    CHECKPOINTING = "checkpointing"
    RECORDING = "recording"  # curves and samples


class StateClock:
    """Tells heartbeats the state (`tell`) and adds up the time in each."""

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        self._tell = tell
        self._state = State.STARTING
        self._since = time.monotonic()
        self._spent: dict[State, float] = defaultdict(float)

    def enter(self, state: State, detail: str = "") -> None:
        self._count()
        self._state = state
        self._tell(state.value, detail)

    def shares(self) -> tuple[dict[str, float], float]:
        """Curves time/<state> since the last call, and the seconds they are shares of."""
        self._count()
        total = sum(self._spent.values())
        curves = {f"time/{state}": seconds / total for state, seconds in self._spent.items()} if total else {}
        self._spent.clear()
        return curves, total

    def _count(self) -> None:
        now = time.monotonic()
        self._spent[self._state] += now - self._since
        self._since = now
