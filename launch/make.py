"""Makes what a recipe wants made: `make: NAME` in a recipe runs the tool of that name before the run starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from protocol.errors import ConfigError, PreflightError
from protocol.settings import DEFAULT, Settings, Value

TOOLS: Mapping[str, tuple[str, ...]] = {
    "demo": ("tools/demo_task.py",),
}
"""By name: the tool and its arguments; --out and --seed are added."""


def make(name: str, settings: Settings, folder: Path, repository: Path) -> Settings:
    """Run the tool, and let the settings that nobody gave point to what it made."""
    if name not in TOOLS:
        raise ConfigError(f"expected one of {', '.join(TOOLS)} behind make: in the recipe, got {name!r}")
    tool, *arguments = TOOLS[name]
    command = [
        sys.executable,
        str(repository / tool),
        *arguments,
        "--out",
        str(folder),
        "--seed",
        str(settings.config.run.seed),
    ]
    if subprocess.run(command, check=False).returncode:
        raise PreflightError(f"{tool} could not make what the recipe needs; its words stand above")
    made = {"model.path": folder / "model", "data.train": folder / "train.jsonl", "data.eval": folder / "test.jsonl"}
    values = [Value(key, str(path), f"made by {tool}") for key, path in made.items() if settings.origin(key) == DEFAULT]
    return settings.override(values)
