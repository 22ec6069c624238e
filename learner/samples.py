"""Trajectories to look at: samples/step_<n>.jsonl. Written by learner rank 0, shown by `tools/samples.py`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protocol.types import Share, ShareItem

FOLDER, PREFIX = "samples", "step_"
EVALUATIONS, VERSION = "evaluations", "version_"  # likewise, as `broker/report.py` writes them


def sample_fields(
    share: Share, item: ShareItem, functions: Sequence[str], prompt: str, completion: str
) -> dict[str, Any]:
    """One line of the file: plain data. `prompt` and `completion` are the texts of the item's tokens."""
    by_function = share.function_rewards[:, item.group, item.sample]
    of_group = share.baseline_rewards[item.group]
    return {
        "step": share.step,
        "prompt_number": item.prompt,
        "sample": item.sample,
        "prompt": prompt,
        "completion": completion,
        "reward": float(share.rewards[item.group, item.sample]),
        "rewards": {
            name: None if np.isnan(value) else float(value) for name, value in zip(functions, by_function, strict=True)
        },
        "group_rewards": of_group[~np.isnan(of_group)].tolist(),
        "prompt_tokens": len(item.prompt_tokens),
        "completion_tokens": len(item.completion.tokens),
        "observed_tokens": 0 if item.completion.observed is None else int(item.completion.observed.sum()),
        "finish_reason": item.completion.finish_reason.value,
        "versions": [list(span) for span in item.completion.spans],
    }


def spread(items: Sequence[ShareItem], count: int) -> list[ShareItem]:
    """So many of a share's completions, evenly over its groups: the share itself begins with the longest."""
    ordered = sorted(items, key=lambda item: (item.group, item.sample))
    count = min(count, len(ordered))
    return [ordered[place * len(ordered) // count] for place in range(count)]


def write_samples(run_folder: Path, step: int, samples: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object per line, whole or not at all; a step that is run again replaces its file."""
    folder = run_folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{PREFIX}{step:06}.jsonl"
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(
        "".join(json.dumps(dict(sample), ensure_ascii=False) + "\n" for sample in samples), encoding="utf-8"
    )
    os.replace(aside, path)
    return path


def cut_samples(run_folder: Path, from_step: int) -> None:
    """Remove what an earlier try has written of this step and of later ones."""
    _cut(run_folder / FOLDER, PREFIX, from_step)


def cut_evaluations(run_folder: Path, from_version: int) -> None:
    """Remove what an earlier try has written of evaluations of this version and of later ones."""
    _cut(run_folder / EVALUATIONS, VERSION, from_version)


def _cut(folder: Path, prefix: str, first: int) -> None:
    for path in folder.glob(f"{prefix}*.jsonl"):
        if int(path.stem.removeprefix(prefix)) >= first:
            path.unlink()
