"""Nothing on the wire is without a limit: a peer can make nothing large, negative or endless by leaving one out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Union

from pydantic import BaseModel

from protocol.messages import MESSAGES, LeaseItem
from tests.message_values import Declared, fields, inner


def places_without_a_limit(name: str, one: Declared) -> Iterator[str]:
    """Where whole numbers, texts, bytes, lists or maps may be of any size, and fractions infinite or no number."""
    limit = {int: one.low, float: one.finite or None}.get(one.kind, one.max_length)
    if one.kind in (int, float, str, bytes, list, dict) and limit is None:
        yield f"{name}: {one.kind.__name__}"
    if one.kind is BaseModel:
        for part, declaration in fields(one.arguments[0]).items():
            yield from places_without_a_limit(part, declaration)
    elif one.kind in (list, dict, tuple, Union):
        for declaration in inner(one):
            yield from places_without_a_limit(name, declaration)


def test_whatever_the_broker_is_asked_has_a_limit() -> None:
    """Rewards are checked later, with the reason told; metrics may be no number; no step in training is -1."""
    asked = [kind for kind in MESSAGES if kind.roles is not None]
    free = {
        place for kind in asked for name, one in fields(kind).items() for place in places_without_a_limit(name, one)
    }
    assert free == {"reward: float", "rewards: float", "numbers: float", "training_step: int"}


def test_whatever_the_broker_answers_is_natural_and_every_time_is_finite() -> None:
    models: list[type[BaseModel]] = [*MESSAGES, LeaseItem]
    for kind in models:
        for name, one in fields(kind).items():
            free = set(places_without_a_limit(name, one)) - {"training_step: int"}
            assert not any(place.endswith(": int") for place in free), f"{kind.__name__}: {free}"
            assert not name.endswith("_s") or (one.kind is float and one.finite), f"{kind.__name__}.{name}"
