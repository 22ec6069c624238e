"""Trajectories to look at: samples/step_<n>.jsonl. Written by learner rank 0."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_samples(run_folder: Path, step: int, samples: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object per line, whole or not at all; a step that is run again replaces its file."""
    folder = run_folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06}.jsonl"
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(
        "".join(json.dumps(dict(sample), ensure_ascii=False) + "\n" for sample in samples), encoding="utf-8"
    )
    os.replace(aside, path)
    return path
