"""Code that a user brings by name, FILE.py:NAME or package.module:NAME: whether it is there, and which it is.

Nothing here runs it, and it never travels. Both ends of a connection compare its digest, each of its own files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from protocol.errors import ConfigError


def is_file(use: str) -> bool:
    """Whether it is FILE.py:NAME."""
    return use.partition(":")[0].endswith(".py")


def is_brought(use: str) -> bool:
    """Whether it is a user's code, and no built-in name."""
    return ":" in use


def shown_name(use: str) -> str:
    """What results, curves and errors call it: a built-in's name, or the module's without its folder or package."""
    place, _, name = use.partition(":")
    if not is_brought(use):
        return use
    return f"{Path(place).stem if is_file(use) else place.rpartition('.')[2]}:{name}"


def is_there(use: str) -> bool:
    """Whether it names a function in a file, there or not, or in a module that Python finds."""
    place, _, name = use.partition(":")
    if not name or is_file(use):
        return bool(name)
    try:
        _file_of_module(place, "")
    except ConfigError:
        return False
    return True


def brought_digest(uses: Sequence[str], kind: str, setting: str) -> str:
    """Of names and file contents, in order; "" when all are built in. Raises ConfigError if a file is missing.

    `kind` of code ("reward") and the `setting` that names it are words of that error.
    """
    digest = hashlib.sha256()
    brought = [use for use in uses if is_brought(use)]
    for use in brought:
        place, _, name = use.partition(":")
        try:
            content = (Path(place) if is_file(use) else _file_of_module(place, kind)).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"expected {kind} code in {place}, {(error.strerror or 'unreadable').lower()}; set {setting}"
            ) from None
        digest.update(name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()[:32] if brought else ""


def _file_of_module(name: str, kind: str) -> Path:
    """Where Python would import it from, without running its packages. Raises ConfigError if that is nowhere."""
    folders, spec = None, None
    for depth in range(1, name.count(".") + 2):
        spec = PathFinder.find_spec(".".join(name.split(".")[:depth]), folders)
        folders = list(spec.submodule_search_locations or []) if spec else []
    if spec is None or not spec.has_location or spec.origin is None:
        raise ConfigError(
            f"expected {kind} code in a module {name}, Python finds none; install it, or put its folder into PYTHONPATH"
        )
    return Path(spec.origin)
