"""Which settings there are: their dotted names, what they mean, and which name was probably meant.

Read off the fields of `protocol/config.py` and its sections, so nothing is listed twice.
"""

from __future__ import annotations

import difflib
import enum
import typing
from collections.abc import Iterator, Sequence
from functools import cache

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from protocol.config import Config
from protocol.errors import ConfigError
from protocol.foreign_names import PAGE, setting_of

PASS_THROUGH = tuple(name for name, field in Config.model_fields.items() if typing.get_origin(field.annotation) is dict)
"""Sections that are handed to an engine as they are: any name is allowed in them."""


TRUNCATING = ("top_p", "top_k", "min_p")
"""Settings of other systems that users try first, and that there are none of."""


@cache
def known_keys() -> tuple[str, ...]:
    """Every setting's dotted name, without the pass-through sections."""
    return tuple(_names_in(Config, ""))


@cache
def item_keys() -> tuple[str, ...]:
    """Names inside the items of settings that are lists of groups: rewards.functions.weight."""
    found: list[str] = []
    for key in known_keys():
        field = _field(key)
        items = typing.get_args(field.annotation) if field else ()
        found += [f"{key}.{name}" for item in items if _is_group(item) for name in item.model_fields]
    return tuple(found)


def is_section(key: str) -> bool:
    """Whether a name stands for a group of settings; "" is the whole Config."""
    field = _field(key)
    return key == "" or (field is not None and _is_group(field.annotation))


def is_passed_through(key: str) -> bool:
    return key.split(".")[0] in PASS_THROUGH


def takes_text(key: str) -> bool:
    """Whether the setting's value is a text or one of a few words, and never a number or a list."""
    field = _field(key)
    kind = field.annotation if field else None
    return (
        kind is str
        or typing.get_origin(kind) is typing.Literal
        or (isinstance(kind, type) and issubclass(kind, enum.Enum))
    )


def describe(key: str) -> str:
    """What a setting means, in one line."""
    field = _field(key)
    return (field.description or "") if field else ""


def nearest(key: str, candidates: Sequence[str]) -> str:
    """The candidate that was probably meant; its last part weighs most, and initials (lr) count as the whole name.

    A section may be written without its dot: lora_rank is lora.rank.
    """
    section, name = parts(key)

    def likeness(candidate: str) -> float:
        its_section, its_name = parts(candidate)
        initials = "".join(word[:1] for word in its_name.split("_"))
        names = {its_name} if section else {its_name, f"{its_section}_{its_name}"}
        alike = 1.0 if name == initials else max(difflib.SequenceMatcher(None, name, its).ratio() for its in names)
        return alike + 0.3 * difflib.SequenceMatcher(None, section, its_section).ratio()

    return max(candidates, key=likeness)


def unknown(key: str, origin: str, candidates: Sequence[str] = ()) -> ConfigError:
    """The error for a setting that does not exist, naming what it is called here, or the nearest that does."""
    if parts(key)[1] in TRUNCATING:
        return ConfigError(
            f"{key} is not a setting ({origin}): truncated sampling is refused for training, because the learner "
            "cannot reproduce the truncated distribution and every ratio would be biased; leave it out"
        )
    meant, foreign = nearest(key, candidates or known_keys()), setting_of(key)
    if foreign == "":
        return ConfigError(
            f"{key} is not a setting ({origin}), and there is none like it: {PAGE} says what to do instead"
        )
    if foreign is None:
        return ConfigError(f"{key} is not a setting ({origin}); did you mean {meant}?")
    dashes = "--" if key.startswith("--") else ""
    is_same = parts(key)[1] in (parts(foreign)[1], foreign.replace(".", "_"))  # but for its section
    differ = "" if is_same else f" {PAGE} says how they differ"
    return ConfigError(f"{key} is not a setting ({origin}); did you mean {dashes}{foreign}?{differ}")


def parts(key: str) -> tuple[str, str]:
    """("learner", "learning_rate") of learner.learning_rate, ("", "learning_rate") of --learning-rate."""
    section, _, name = key.lstrip("-").replace("-", "_").rpartition(".")
    return section, name


def _names_in(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if _is_group(field.annotation):
            yield from _names_in(typing.cast(type[BaseModel], field.annotation), f"{prefix}{name}.")
        elif f"{prefix}{name}" not in PASS_THROUGH:
            yield f"{prefix}{name}"


def _field(key: str) -> FieldInfo | None:
    kind: typing.Any = Config
    field: FieldInfo | None = None
    for name in key.split("."):
        field = kind.model_fields.get(name) if _is_group(kind) else None
        kind = field.annotation if field else None
    return field


def _is_group(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
