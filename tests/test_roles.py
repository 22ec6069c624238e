"""Who may send what: every message that there is, under every key, against the table that documents the wire."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
from pydantic.fields import FieldInfo

from protocol import messages
from protocol.fields import ArrayField
from protocol.messages import MESSAGES, Done, Message, Refused, Role
from tests.raw_peer import RawPeer
from tests.wire import SmallService, serving

WHO: Mapping[str, set[Role]] = {
    "anyone": set(Role),
    "generator": {Role.GENERATOR},
    "learner rank": {Role.LEARNER},
    "learner rank 0": {Role.LEARNER},
    "supervisor": {Role.STATUS},
    "broker": set(),
}


def documented() -> dict[str, set[Role]]:
    """Who may send each message to the broker, as the table at the top of `protocol/messages.py` says."""
    assert messages.__doc__ is not None
    table = messages.__doc__.split("\n\n")[1]
    found: dict[str, set[Role]] = {}
    for line in table.splitlines()[1:]:
        who, asks, _, answers = re.split(r"\s{2,}", line.strip())[:4]
        found |= dict.fromkeys(asks.split(", "), WHO[who])
        for answer in answers.split(" | "):
            if answer in {kind.__name__ for kind in MESSAGES}:
                found[answer] = set()
    return found


def smallest(kind: type[Message]) -> Message:
    """One of them, with the least in it."""
    required = {name: field for name, field in kind.model_fields.items() if field.is_required()}
    return kind(**{name: _least(field) for name, field in required.items()})


def _least(field: FieldInfo) -> Any:
    for mark in field.metadata:
        if isinstance(mark, ArrayField):
            return np.zeros((0,) * mark.ndim, mark.dtype)
    if get_origin(field.annotation) is Literal:
        return get_args(field.annotation)[0]
    kind = get_origin(field.annotation) or field.annotation
    assert isinstance(kind, type)
    assert kind is not NoneType
    return kind()


def test_the_table_names_every_message() -> None:
    assert set(documented()) == {kind.__name__ for kind in MESSAGES}


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[Role, RawPeer], list[Message]]]:
    """One peer with each key, before a server that says Done to everything; and what came through to it."""
    folder, heard = tmp_path_factory.mktemp("roles"), list[Message]()

    def answer(message: Message, header: Any, role: Role) -> Message:
        heard.append(message)
        return Done()

    with serving(folder, SmallService(answer)) as (addresses, _):
        made = {role: RawPeer(folder, role, addresses=addresses) for role in Role}
        yield made, heard
        for peer in made.values():
            peer.close()


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("role", Role)
def test_what_a_role_may_not_send_is_refused_by_name(
    kind: type[Message], role: Role, peers: tuple[dict[Role, RawPeer], list[Message]]
) -> None:
    made, heard = peers
    heard.clear()
    answer = made[role].ask(smallest(kind))
    if role in documented()[kind.__name__]:
        assert (answer, [type(message) for message in heard]) == (Done(), [kind])
    else:
        assert (answer, heard) == (Refused(code="role", text=f"a {role} may not send {kind.__name__}"), [])
