"""A plan as people and programs read it: `--dry-run`, and the memory of a shared card before a start.

Run by `launch/cluster.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from launch.plan import Devices, Plan
from protocol.setting_names import known_keys
from protocol.settings import DEFAULT, Settings


def as_text(planned: Plan, settings: Settings, run_dir: Path) -> str:
    lines = [f"{run_dir} (nothing is started)", ""]
    lines += [f"{process.name:<13} {process.device:<10} {' '.join(process.argv)}" for process in planned.processes]
    lines += ["", *columns([*planned.notes, *planned.memory]), ""]
    given = [(value.key, _on_one_line(value.value), value.origin) for value in settings.values.values()]
    return "\n".join([*lines, *(f"{key} = {value}  ({origin})" for key, value, origin in given)])


def as_json(planned: Plan, settings: Settings, devices: Devices, run_dir: Path) -> str:
    fields = {
        "run_dir": str(run_dir),
        "devices": {"kind": devices.kind, "cores": devices.cores, "cards": [card.name for card in devices.cards]},
        "processes": [
            {"name": p.name, "role": p.role, "device": p.device, "argv": list(p.argv), "env": dict(p.env)}
            for p in planned.processes
        ],
        "notes": dict(planned.notes),
        "memory": {topic.strip(): sentence for topic, sentence in planned.memory},
        "settings": settings.config.model_dump(mode="json"),
        "origins": {key: origin for key in known_keys() if (origin := settings.origin(key)) != DEFAULT},
    }
    return json.dumps(fields, indent=2)


def columns(notes: Sequence[tuple[str, str]]) -> list[str]:
    """As lines no wider than the terminal, or than 80 where there is none."""
    width, lines = shutil.get_terminal_size().columns, []
    for topic, sentence in notes:
        wrapped = textwrap.wrap(sentence, max(40, width - 12), break_long_words=False, break_on_hyphens=False)
        lines += [f"{topic:<11} {wrapped[0]}", *(f"{'':<11} {more}" for more in wrapped[1:])]
    return lines


def show(text: str) -> None:
    """Print all of it, or as much as whoever reads wants to have (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _on_one_line(value: object) -> object:
    return repr(value) if isinstance(value, str) and "\n" in value else value
