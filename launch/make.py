"""Makes what a recipe wants made: `make: NAME` in a recipe runs the tool of that name before the run starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from protocol.errors import ConfigError, PreflightError
from protocol.settings import DEFAULT, Settings, Value

TOOL = "tools/demo_task.py"
KINDS = ("demo", "demo_calculator", "tiny_model")
"""What a recipe may ask for: the demo's model and rows, the same with large numbers, or a tiny model for the rows that
`data.train` names."""


def make(name: str, settings: Settings, folder: Path, repository: Path) -> Settings:
    """Run the tool, and let the settings that nobody gave point to what it made."""
    if name not in KINDS:
        raise ConfigError(f"expected one of {', '.join(KINDS)} behind make: in the recipe, got {name!r}")
    config = settings.config
    command = [sys.executable, str(repository / TOOL), "--out", str(folder), "--seed", str(config.run.seed)]
    made = {"model.path": folder / "model"}
    if name == "tiny_model":
        command += ["--data", config.data.train]
    else:
        command += ["--large"] if name == "demo_calculator" else []
        made |= {"data.train": folder / "train.jsonl", "data.eval": folder / "test.jsonl"}
        made |= {"warmup.data": folder / "warmup.jsonl"}
    if subprocess.run(command, check=False).returncode:
        raise PreflightError(f"{TOOL} could not make what the recipe needs; its words stand above")
    values = [Value(key, str(path), f"made by {TOOL}") for key, path in made.items() if settings.origin(key) == DEFAULT]
    return settings.override(values)
