"""Who is connected, in every order of hellos and farewells, against the list of all hellos there ever were."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from broker.peers import REMEMBERED_INCARNATIONS, Peers
from protocol.messages import Beat, Hello, Role

NAMES = st.sampled_from(["x-0", "x-1"])
LIMIT_S = 10.0


class PeerMachine(RuleBasedStateMachine):
    """Sessions come and go; a name is taken over by newer processes."""

    def __init__(self) -> None:
        super().__init__()
        self.peers = Peers()
        self.now = 0.0
        self.hellos: list[Hello] = []
        self.connected: dict[int, tuple[Hello, float]] = {}  # by session: what it said, and when it was last heard

    @rule(role=st.sampled_from(Role), name=NAMES, incarnation=st.integers(1, 12))
    def say_hello(self, role: Role, name: str, incarnation: int) -> None:
        hello = Hello(role=role.value, name=name, incarnation=incarnation)
        assert self.peers.is_replaced(hello) == self._is_replaced(hello)
        if not self._is_replaced(hello):
            session = len(self.hellos) + 1
            self.hellos.append(hello)
            peer = self.peers.admit(session, "key", hello, self.now)
            assert self.peers.by_id(peer.id) is self.peers.get(session) is peer
            self.connected[session] = hello, self.now

    def _is_replaced(self, hello: Hello) -> bool:
        """Another process has said this name after this one did, and not so long ago that ours is forgotten."""
        order: list[int] = []
        for earlier in self.hellos:
            if (earlier.role, earlier.name) == (hello.role, hello.name) and earlier.incarnation not in order:
                order.append(earlier.incarnation)
        return hello.incarnation in order[-REMEMBERED_INCARNATIONS:-1]

    @rule(data=st.data(), state=st.sampled_from(["idle", "busy"]), for_s=st.floats(0, 9))
    def beat(self, data: st.DataObject, state: str, for_s: float) -> None:
        if self.connected:
            session = data.draw(st.sampled_from(sorted(self.connected)))
            peer = self.peers.get(session)
            assert peer is not None
            peer.beats(Beat(state=state, for_s=for_s, numbers={"n": 1.0}), self.now)
            self.connected[session] = self.connected[session][0], self.now
            described = peer.describe(self.now)
            assert (described["state"], described["for_s"], described["seen_s"]) == (state, round(for_s, 1), 0.0)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.connected:
            session = data.draw(st.sampled_from(sorted(self.connected)))
            peer = self.peers.get(session)
            assert peer is not None
            self.peers.forget(peer)
            self.peers.forget(peer)
            del self.connected[session]

    @rule(delay_s=st.sampled_from([0.0, 1.0, LIMIT_S]))
    def time_passes(self, delay_s: float) -> None:
        self.now += delay_s

    @invariant()
    def those_who_said_hello_and_not_goodbye_are_connected(self) -> None:
        assert {peer.session for peer in self.peers} == set(self.connected)
        assert len(self.peers) == len(self.connected)
        for role in Role:
            of_role = [session for session, (hello, _) in self.connected.items() if hello.role == role]
            assert [peer.session for peer in self.peers.of_role(role)] == of_role
            named = [session for session in of_role if self.connected[session][0].name == "x-0"]
            assert [peer.session for peer in self.peers.named(role, "x-0")] == named
        silent = [session for session, (_, heard) in self.connected.items() if self.now - heard > LIMIT_S]
        assert [peer.session for peer in self.peers.silent(self.now, LIMIT_S)] == silent


TestPeerMachine = PeerMachine.TestCase
TestPeerMachine.settings = settings(max_examples=30, stateful_step_count=40)
