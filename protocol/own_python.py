"""Lets `python launch/cluster.py` work with any Python: the commands that people type change to the project's own one.

Imports the standard library only, because nothing else is known to be installed when it runs.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def use_own_python() -> None:
    """If this Python lacks what every process needs, start again with the one that `make setup` built."""
    if all(importlib.util.find_spec(name) for name in ("pydantic", "zmq", "rich")):
        return
    own = ROOT / ".venv" / "bin" / "python"
    if not own.exists() or Path(sys.prefix) == own.parents[1]:
        sys.exit(f"error: expected Tether's packages in {sys.executable}, found none; run make setup in {ROOT} first")
    os.execv(own, [str(own), *sys.orig_argv[1:]])
