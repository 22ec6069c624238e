"""Values of every field that a message declares: right ones, the least, the fullest, and all kinds of wrong ones.

Read from the declarations in `protocol/messages.py` alone, so a new message or field is covered without a change here;
a declaration of a new kind is an error until it is taught.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from pydantic import AllowInfNan, BaseModel
from pydantic.fields import FieldInfo

from protocol.fields import ArrayField

FAR = 4  # elements of an unbounded or long list, map or text that hypothesis draws
KINDS: dict[str, Any] = {
    "nothing": None,
    "a truth": True,
    "a whole number": 1,
    "a fraction": 0.5,
    "a text": "x",
    "bytes": b"x",
    "a list": [],
    "a map": {},
}
ACCEPTED: dict[Any, set[str]] = {
    NoneType: {"nothing"},
    bool: {"a truth"},
    int: {"a whole number"},
    float: {"a whole number", "a fraction"},
    str: {"a text"},
    Literal: {"a text"},
    bytes: {"bytes"},
    list: {"a list"},
    tuple: {"a list"},
    dict: {"a map"},
    BaseModel: {"a map"},
    Any: set(KINDS),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=FAR),
    lambda inner: st.lists(inner, max_size=FAR) | st.dictionaries(st.text(max_size=FAR), inner, max_size=FAR),
    max_leaves=6,
)


class Declared(NamedTuple):
    """One declaration, taken apart."""

    kind: Any  # a key of ACCEPTED, Union or np.ndarray
    arguments: tuple[Any, ...]  # of list[...], dict[...], Literal[...], the alternatives of a union, or a model
    low: int | None = None
    high: int | None = None
    max_length: int | None = None
    finite: bool = False
    array: ArrayField | None = None


def declared(annotation: Any, marks: list[Any]) -> Declared:
    """`marks`: what pydantic keeps beside the annotation of a field."""
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        marks = [
            *marks,
            *(inner for mark in more for inner in (mark.metadata if isinstance(mark, FieldInfo) else [mark])),
        ]
    found: dict[str, Any] = {}
    for mark in marks:
        found |= {"low": mark.ge} if hasattr(mark, "ge") else {}
        found |= {"high": mark.lt - 1} if hasattr(mark, "lt") else {}
        found |= {"max_length": mark.max_length} if hasattr(mark, "max_length") else {}
        found |= {"finite": not mark.allow_inf_nan} if isinstance(mark, AllowInfNan) else {}
        found |= {"array": mark} if isinstance(mark, ArrayField) else {}
    origin = get_origin(annotation) or annotation
    arguments = get_args(annotation)
    if origin in (UnionType, Union):
        origin = Union
    elif isinstance(origin, type) and issubclass(origin, BaseModel):
        origin, arguments = BaseModel, (origin,)
    assert origin in (*ACCEPTED, Union, np.ndarray), f"teach message_values what {annotation} is"
    assert (origin is np.ndarray) == ("array" in found), f"{annotation} and {marks} do not fit"
    return Declared(origin, arguments, **found)


def fields(model: type[BaseModel]) -> dict[str, Declared]:
    return {name: declared(info.annotation, info.metadata) for name, info in model.model_fields.items()}


def inner(one: Declared) -> list[Declared]:
    return [declared(argument, []) for argument in one.arguments if argument is not Ellipsis]


def right(one: Declared) -> st.SearchStrategy[Any]:
    """Anything the declaration allows, short."""
    longest = min(one.max_length or FAR, FAR)
    if one.kind is np.ndarray:
        assert one.array is not None
        return arrays(one.array)
    if one.kind is int:
        low, high = one.low, one.high
        return st.integers(-(1 << 63) if low is None else low, (1 << 63) - 1 if high is None else high)
    if one.kind is float:
        return st.floats(allow_nan=not one.finite, allow_infinity=not one.finite)
    if one.kind is Literal:
        return st.sampled_from(one.arguments)
    if one.kind is BaseModel:
        return st.builds(one.arguments[0], **{name: right(field) for name, field in fields(one.arguments[0]).items()})
    parts = [] if one.kind in (NoneType, bool, str, bytes, Any) else [right(part) for part in inner(one)]
    made = {
        NoneType: lambda: st.none(),
        bool: lambda: st.booleans(),
        str: lambda: st.text(max_size=longest),
        bytes: lambda: st.binary(max_size=longest),
        Any: lambda: JSON,
        list: lambda: st.lists(parts[0], max_size=longest),
        tuple: lambda: st.tuples(*parts),
        dict: lambda: st.dictionaries(*parts, max_size=longest),
        Union: lambda: st.one_of(*parts),
    }
    return made[one.kind]()


@st.composite
def arrays(draw: st.DrawFn, field: ArrayField) -> np.ndarray[Any, Any]:
    """Of the declared dtype and dimensions; whole, seen through a stride, or in the other byte order."""
    dtype = np.dtype(field.dtype)
    shape = numpy_strategies.array_shapes(min_dims=field.ndim, max_dims=field.ndim, min_side=0, max_side=4)
    made: np.ndarray[Any, Any] = draw(numpy_strategies.arrays(dtype, shape))
    seen = draw(st.sampled_from(["whole", "backwards", "strided", "other byte order"]))
    if seen == "backwards":
        return made[::-1]
    if seen == "strided":
        return np.repeat(made, 2, axis=0)[::2]
    return made.astype(dtype.newbyteorder(">")) if seen == "other byte order" else made


def least(one: Declared) -> Any:
    """The smallest value; arrays have one element."""
    if one.kind is np.ndarray:
        assert one.array is not None
        return np.zeros((1,) * one.array.ndim, one.array.dtype)
    if one.kind is BaseModel:
        return {name: least(field) for name, field in fields(one.arguments[0]).items()}
    if one.kind is tuple:
        return [least(part) for part in inner(one)]
    if one.kind is Literal:
        return one.arguments[0]
    if one.kind is Union:
        return least(inner(one)[0])
    if one.kind is int:
        return one.low or 0
    return {NoneType: None, bool: False, float: 0.0, str: "", bytes: b"", list: [], dict: {}, Any: None}[one.kind]


def fullest(one: Declared) -> Any:
    """As large as the declaration allows; without a limit, a little."""
    longest = 10 if one.max_length is None else one.max_length
    if one.kind is np.ndarray:
        assert one.array is not None
        return np.ones((1000,) + (2,) * (one.array.ndim - 1), one.array.dtype)
    if one.kind is BaseModel:
        return {name: fullest(field) for name, field in fields(one.arguments[0]).items()}
    if one.kind is tuple:
        return [fullest(part) for part in inner(one)]
    if one.kind is list:
        return [fullest(inner(one)[0])] * longest
    if one.kind is dict:
        key, value = inner(one)
        width = key.max_length or 10
        return {f"{n:\U0001f600>{width}}": fullest(value) for n in range(longest)}
    if one.kind is Literal:
        return max(one.arguments, key=len)
    if one.kind is Union:
        return fullest(inner(one)[0])
    if one.kind is int:
        return (1 << 63) - 1 if one.high is None else one.high
    text, some_json = "\U0001f600" * longest, [{"a": [1, None]}]
    return {NoneType: None, bool: True, float: 1e308, str: text, bytes: b"\xff" * longest, Any: some_json}[one.kind]


def wrong(one: Declared) -> Iterator[tuple[str, Any]]:
    """(what is wrong, the value) of everything near the declaration that it does not allow."""
    alternatives = inner(one) if one.kind is Union else [one]
    accepted = set().union(*(ACCEPTED[alternative.kind] for alternative in alternatives))
    yield from ((what, value) for what, value in KINDS.items() if what not in accepted)
    if one.kind is Literal:
        yield "an unknown word", "no such word"
    if one.low is not None:
        yield "too small", one.low - 1
    if one.high is not None:
        yield "too large", one.high + 1
    if one.finite:
        yield from ((f"{value}", value) for value in (float("nan"), float("inf"), -float("inf")))
    if one.max_length is not None:
        yield "too long", _too_long(one, one.max_length + 1)
    yield from _wrong_inside(one)


def _too_long(one: Declared, length: int) -> Any:
    if one.kind is list:
        return [least(inner(one)[0])] * length
    if one.kind is dict:
        return {str(n): least(inner(one)[1]) for n in range(length)}
    return {str: "x", bytes: b"x"}[one.kind] * length


def _wrong_inside(one: Declared) -> Iterator[tuple[str, Any]]:
    """One part of a list, map, tuple or model is wrong, missing or too much."""
    if one.kind is list:
        yield from ((f"[{what}]", [value]) for what, value in wrong(inner(one)[0]))
    elif one.kind is dict:
        key, value = inner(one)
        yield from ((f"a value that is {what}", {"k": bad}) for what, bad in wrong(value))
        if key.max_length is not None:
            yield "a key that is too long", {"k" * (key.max_length + 1): least(value)}
    elif one.kind is tuple:
        good = least(one)
        yield from (("one too few", good[:-1]), ("one too many", [*good, good[-1]]))
        for place, part in enumerate(inner(one)):
            for what, bad in wrong(part):
                yield f"part {place}: {what}", [*good[:place], bad, *good[place + 1 :]]
    elif one.kind is BaseModel:
        good = least(one)
        yield "an unknown field", good | {"unknown": 0}
        for name, field in fields(one.arguments[0]).items():
            if one.arguments[0].model_fields[name].is_required():
                yield f"{name} is missing", {other: value for other, value in good.items() if other != name}
            yield from ((f"{name}: {what}", good | {name: bad}) for what, bad in wrong(field))


def same(one: Any, other: Any) -> bool:
    """Equal in value and type, NaN like NaN; arrays also in dtype and shape, whatever their order in memory was."""
    if isinstance(one, np.ndarray):
        plain = np.ascontiguousarray(one, one.dtype.newbyteorder("="))
        is_like = other.dtype == plain.dtype and other.shape == plain.shape
        return bool(is_like and other.tobytes() == plain.tobytes())
    if isinstance(one, BaseModel):
        return type(one) is type(other) and same(dict(one), dict(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other)) and isinstance(other, type(one))
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return type(one) is type(other) and bool(one == other)
