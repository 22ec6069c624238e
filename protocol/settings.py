"""Builds a run's Config from its layers and remembers where each value came from.

    defaults < recipe (YAML) < environment (TETHER__LEARNER__LEARNING_RATE) < flags (--learner.learning_rate)

`build` merges the layers and is the only place where settings are checked; its errors name the setting, the value,
where it was written, and the nearest known name. `Settings.save` writes the resolved `config.yaml` with the origin of
each value behind it; `load` is how every process of the run reads it. Nothing here reads the process's own environment:
mains pass it in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from protocol.config import Config
from protocol.errors import ConfigError
from protocol.foreign_names import setting_of
from protocol.setting_names import (
    PASS_THROUGH,
    describe,
    is_passed_through,
    is_section,
    item_keys,
    known_keys,
    parts,
    takes_text,
    unknown,
)

ENVIRONMENT_PREFIX = "TETHER__"
DEFAULT = "default"


class Value(NamedTuple):
    """One setting as somebody wrote it."""

    key: str  # dotted: learner.learning_rate
    value: Any
    origin: str  # launch/recipes/demo.yaml:7, TETHER__LEARNER__ZERO, --zero


@dataclass(frozen=True, slots=True)
class Settings:
    """A checked Config and the values it was built from; settings that are absent from `values` have their default."""

    config: Config
    values: Mapping[str, Value]

    def origin(self, key: str) -> str:
        """Where a setting's value came from; of a pass-through key, all places that wrote into it."""
        places = {v.origin for v in self.values.values() if v.key == key or v.key.startswith(f"{key}.")}
        return ", ".join(sorted(places)) or DEFAULT

    def override(self, values: Iterable[Value]) -> Settings:
        """These settings with `values` over them. Raises ConfigError as `build` does."""
        return build(self.values.values(), values)

    def save(self, path: Path) -> None:
        lines = ["# The resolved settings of this run, and where each came from."]
        for section, fields in self.config.model_dump(mode="json").items():
            lines.append(f"{section}:" if fields else f"{section}: {{}}")
            lines += [
                f"  {name}: {_flow(value)}  # {self.origin(f'{section}.{name}')}" for name, value in fields.items()
            ]
        path.write_text("\n".join(lines) + "\n")


def build(*layers: Iterable[Value]) -> Settings:
    """The settings of all layers, later ones over earlier ones. Raises ConfigError if one is unknown or not allowed."""
    values: dict[str, Value] = {}
    for value in (leaf for layer in layers for given in layer for leaf in _leaves(given)):
        _require_known(value)
        for key in [k for k in values if k.startswith(f"{value.key}.") or value.key.startswith(f"{k}.")]:
            del values[key]  # a pass-through value that replaces a mapping, or a mapping that replaces a value
        values[value.key] = value
    tree: dict[str, Any] = {}
    for value in values.values():
        *parents, name = value.key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value.value
    try:
        return Settings(Config.model_validate(tree), values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, values) for problem in error.errors(include_url=False))) from None


def load(path: Path) -> Config:
    """The settings of a run, as `Settings.save` wrote them."""
    return build(read_saved(path)).config


def read_saved(path: Path) -> list[Value]:
    """The layer that a run's own `config.yaml` is; each value keeps the origin that it was saved with."""
    lines = path.read_text().splitlines() if path.is_file() else []
    values = read_recipe(path).values
    return [value._replace(origin=lines[_line(value) - 1].rpartition("  # ")[2]) for value in values]


class Recipe(NamedTuple):
    """A recipe file: a layer of settings, and what must be made before they can be used."""

    values: list[Value]
    make: str  # what `make:` names; "" for most recipes


def read_recipe(path: Path) -> Recipe:
    """Raises ConfigError if the file is missing or is not a mapping in YAML."""
    try:
        text = path.read_text()
        node = yaml.compose(text, Loader=_Loader)
        tree = yaml.load(text, Loader=_Loader)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"expected settings in {path}, but {reason}; check the path") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            f"expected YAML, {error.problem} at {path}:{line}; see the recipes in launch/recipes"
        ) from None
    if tree is None:
        return Recipe([], "")
    if not isinstance(tree, dict):
        raise ConfigError(
            f"expected sections with settings, got {type(tree).__name__} in {path}; see the recipes in launch/recipes"
        )
    lines = dict(_lines(node, "", path))
    make = tree.pop("make", "")
    return Recipe([v._replace(origin=f"{path}:{lines.get(v.key, 1)}") for v in _leaves(Value("", tree, ""))], str(make))


def from_environment(environ: Mapping[str, str]) -> list[Value]:
    """The layer of variables like TETHER__LEARNER__LEARNING_RATE."""
    names = sorted(name for name in environ if name.startswith(ENVIRONMENT_PREFIX))
    keys = (name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".") for name in names)
    return [from_text(key, environ[name], name) for key, name in zip(keys, names, strict=True)]


def from_text(key: str, text: str, origin: str) -> Value:
    """A setting that was written as text: as it is where text is wanted, as YAML elsewhere.

    Raises ConfigError on broken YAML.
    """
    if takes_text(key):
        return Value(key, text, origin)
    try:
        return Value(key, yaml.load(text, Loader=_Loader), origin)
    except yaml.YAMLError:
        raise ConfigError(f"{key} must be a number, a word, or YAML in quotes, got {text!r} ({origin})") from None


class _Loader(yaml.SafeLoader):
    """YAML in which 2e-6 is a number (YAML 1.1 wants 2.0e-6) and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is written twice", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _lines(node: yaml.Node | None, prefix: str, path: Path) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _lines(value, f"{name}.", path)


def _line(value: Value) -> int:
    return int(value.origin.rpartition(":")[2])


def _leaves(given: Value) -> Iterator[Value]:
    """Split what was given for a whole section into its settings."""
    is_group = is_section(given.key) or given.key in PASS_THROUGH
    if isinstance(given.value, dict) and (is_group or (is_passed_through(given.key) and given.value)):
        for name, value in given.value.items():
            yield from _leaves(Value(f"{given.key}.{name}".removeprefix("."), value, given.origin))
    elif not (is_group and given.value is None):  # None: a section without settings
        yield given


def _require_known(value: Value) -> None:
    key, section = value.key, value.key.split(".")[0]
    if key in known_keys() or (section in PASS_THROUGH and key != section):
        return
    if key in PASS_THROUGH or is_section(key):
        inside = [known for known in known_keys() if known.startswith(f"{key}.")]
        inside = inside or [*filter(None, [setting_of(key)]), f"{key}.NAME"]
        raise ConfigError(
            f"{key} is a group of settings, got {value.value!r} ({value.origin}); set {', '.join(inside)}"
        )
    raise unknown(key, value.origin)


def _explain(problem: Any, values: Mapping[str, Value]) -> str:
    """One line for one of pydantic's findings."""
    key = ".".join(str(part) for part in problem["loc"])
    named = ".".join(part for part in problem["loc"] if isinstance(part, str))
    if problem["type"] == "value_error":  # a rule of ours: the text is complete
        text = str(problem["msg"]).removeprefix("Value error, ")
        places = [value.origin for value in values.values() if value.key in text]
        return text + (f" ({', '.join(places)})" if places else "")
    origin = next((v.origin for v in values.values() if named == v.key or named.startswith(f"{v.key}.")), DEFAULT)
    if problem["type"] == "extra_forbidden":
        return str(unknown(key, origin, [item for item in item_keys() if parts(item)[0] == parts(named)[0]]))
    if problem["type"] == "missing":
        return f"{key} is required and was not given ({origin}); it means: {describe(parts(named)[0])}"
    rule = str(problem["msg"]).replace("Input should be", "must be", 1)
    return (
        f"{key} {rule}, got {problem['input']!r} ({origin}); it means: {describe(named) or describe(parts(named)[0])}"
    )


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    return json.dumps(value) if "\n" in text else text  # JSON is YAML, and stays on its line
