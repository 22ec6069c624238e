"""Who is connected: one record per session, from Hello to farewell or silence.

Pure bookkeeping of the broker process. A session is bound to the CURVE key it was opened with, checked on every
message: knowing another's session number gives nothing.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from protocol.messages import Beat, Hello, Role

MAX_PEERS = 4096  # sessions at a time
REMEMBERED_NAMES = 4096
REMEMBERED_INCARNATIONS = 8  # of each name


@dataclass(eq=False)
class Peer:
    """One process, as it described itself and as it was last heard."""

    session: int
    key: str  # public key of its connection
    role: Role
    name: str
    incarnation: int
    host: str
    rank: int
    seen_at: float  # s, the broker's monotonic clock
    route: bytes = b""  # control routing id of its last message: where hints go
    state: str = "starting"
    detail: str = ""
    state_since: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)
    held: tuple[int, str] = (-1, "")  # (version, digest) a generator serves
    evaluations_seen: int = 0

    @property
    def id(self) -> str:
        """How the scheduler calls it."""
        return f"{self.session:016x}"

    def beats(self, beat: Beat, now: float) -> None:
        self.seen_at = now
        self.state, self.detail, self.state_since = beat.state, beat.detail, now - beat.for_s
        self.numbers = dict(beat.numbers)
        self.evaluations_seen = beat.evaluations_seen

    def describe(self, now: float) -> dict[str, Any]:
        return {
            "name": self.name,
            "role": self.role.value,
            "state": self.state,
            "detail": self.detail,
            "for_s": round(now - self.state_since, 1),
            "seen_s": round(now - self.seen_at, 1),
            "version": self.held[0],
            "numbers": self.numbers,
        }


class Peers:
    """All sessions of one epoch and before."""

    def __init__(self) -> None:
        self._by_session: dict[int, Peer] = {}
        self._incarnations: OrderedDict[tuple[Role, str], deque[int]] = OrderedDict()  # by name, newest last

    def __len__(self) -> int:
        return len(self._by_session)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._by_session.values()))

    def get(self, session: int) -> Peer | None:
        return self._by_session.get(session)

    def by_id(self, peer_id: str) -> Peer | None:
        return self._by_session.get(int(peer_id, 16))

    def admit(self, session: int, key: str, hello: Hello, now: float) -> Peer:
        role = Role(hello.role)
        peer = Peer(session, key, role, hello.name, hello.incarnation, hello.host, hello.rank, now, state_since=now)
        self._by_session[session] = peer
        seen = self._incarnations.setdefault((role, hello.name), deque(maxlen=REMEMBERED_INCARNATIONS))
        if hello.incarnation not in seen:
            seen.append(hello.incarnation)
        self._incarnations.move_to_end((role, hello.name))
        if len(self._incarnations) > REMEMBERED_NAMES:
            self._incarnations.popitem(last=False)
        return peer

    def is_replaced(self, hello: Hello) -> bool:
        """Whether a newer process has taken this one's name."""
        seen = self._incarnations.get((Role(hello.role), hello.name))
        return seen is not None and hello.incarnation in seen and hello.incarnation != seen[-1]

    def forget(self, peer: Peer) -> None:
        self._by_session.pop(peer.session, None)

    def named(self, role: Role, name: str) -> list[Peer]:
        return [peer for peer in self if peer.role is role and peer.name == name]

    def of_role(self, role: Role) -> list[Peer]:
        return [peer for peer in self if peer.role is role]

    def silent(self, now: float, limit_s: float) -> list[Peer]:
        """Those not heard for longer than `limit_s`."""
        return [peer for peer in self if now - peer.seen_at > limit_s]
