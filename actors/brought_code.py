"""Runs a user's code, so that its function can be called: in a reward worker, or in the generator for a rollout."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protocol.brought_code import is_file
from protocol.errors import ConfigError


def brought_function(use: str, kind: str, setting: str) -> Callable[..., Any]:
    """NAME of FILE.py:NAME or package.module:NAME. Raises ConfigError if there is none; `kind` and `setting` are its
    words."""
    place, _, name = use.partition(":")
    module = _file(Path(place), kind, setting) if is_file(use) else _module(place)
    brought = getattr(module, name, None)
    if not callable(brought):
        raise ConfigError(f"expected a function {name} in {place}, there is none; set {setting}")
    return brought  # type: ignore[no-any-return]


def _file(file: Path, kind: str, setting: str) -> Any:
    if not file.is_file():
        raise ConfigError(f"expected {kind} code in {file}, there is no such file; set {setting}")
    spec = importlib.util.spec_from_file_location(f"{kind}_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and typing look for a class's own module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises when it is imported
        raise ConfigError(f"importing {file} raised {type(error).__name__}: {error}; mend the file") from error
    return module


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises when it is imported
        raise ConfigError(
            f"importing {name} raised {type(error).__name__}: {error}; install it, or put its folder into PYTHONPATH"
        ) from error
