"""Data never becomes code: beside the pickling of `test_layers.py`, nothing evaluates text or loads unsafe YAML."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_layers import modules

EVALUATING = {"eval", "exec", "compile", "__import__"}
UNSAFE_YAML = {"unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "UnsafeLoader", "FullLoader", "Loader"}


def safe_loaders(tree: ast.AST) -> set[str]:
    """Names of this module's own loaders, each a yaml.SafeLoader with more rules."""
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} == {"yaml.SafeLoader"}
    }


def dangerous(source: str) -> Iterator[str]:
    """Every place of a module that could run what it reads, as `line: what`."""
    tree = ast.parse(source)
    safe = safe_loaders(tree) | {"yaml.SafeLoader"}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in EVALUATING:
                yield f"{node.lineno}: {name}"
            case ast.Attribute(value=ast.Name("yaml"), attr=attr) if attr in UNSAFE_YAML:
                yield f"{node.lineno}: yaml.{attr}"
            case ast.Call(func=ast.Attribute(value=ast.Name("yaml"), attr="load" | "load_all" | "compose")):
                loaders = {ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "Loader"}
                if len(node.args) > 1 or not loaders or loaders - safe:
                    yield f"{node.lineno}: yaml without a safe loader"
            case ast.ImportFrom(module="yaml" | "torch" | "numpy", names=names):
                loading = {alias.name for alias in names} & (UNSAFE_YAML | {"load", "load_all"})
                yield from (f"{node.lineno}: {node.module}.{name}" for name in sorted(loading))
            case ast.keyword(arg="allow_pickle" | "weights_only", value=value) if not isinstance(value, ast.Constant):
                yield f"{value.lineno}: {node.arg} is decided at run time"


def test_nothing_runs_what_it_reads() -> None:
    found = {path: places for path, source in modules().items() if (places := list(dangerous(source)))}
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "__import__(name)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text, yaml.SafeLoader)",
        "class Mine(yaml.FullLoader): pass\nyaml.load(text, Loader=Mine)",
        "yaml.unsafe_load(text)",
        "from yaml import load",
        "from torch import load",
        "numpy.load(path, allow_pickle=trusted)",
    ],
)
def test_every_such_way_is_seen(source: str) -> None:
    assert list(dangerous(source))


@pytest.mark.parametrize(
    "source",
    ["yaml.safe_load(text)", "class Mine(yaml.SafeLoader): pass\nyaml.load(text, Loader=Mine)", "re.compile('a')"],
)
def test_what_is_safe_is_let_be(source: str) -> None:
    assert not list(dangerous(source))
