"""Which run, and which of its checkpoints, `--resume` goes on from.

    --resume          the run of --run-name, else the newest
    --resume auto     the newest run of this name that is not complete; where there is none, a new one
    --resume never    a new one, as without the flag
    --resume PATH     the run in PATH, from its newest checkpoint that verifies; or from PATH, a run's checkpoint

Asked by `launch/cluster.py` before anything starts; the learner always takes the newest checkpoint that verifies, also
after a death, so to go on from an older one the later ones are set aside first (`go_back`).
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import NamedTuple

from launch.run_folder import check_run
from protocol.checkpoints import MANIFEST_FILE, checkpoints, damage, step_of
from protocol.errors import ConfigError, Exit

AUTO, NEVER = "auto", "never"

CHECKPOINTS = "checkpoints"  # of a run's folder


class Resumption(NamedTuple):
    run_dir: Path
    checkpoint: Path | None = None  # None: the newest that verifies


def resumption(given: str, out: Path, name: str) -> Resumption:
    """What a path behind --resume means, and "" there with this --out and --run-name.

    Raises ConfigError unless it is a run, or a checkpoint of one.
    """
    path = (Path(given) if given else out / name if name else newest_run(out)).absolute()
    run_dir = path.parent.parent
    if path.parent.name == CHECKPOINTS and (run_dir / "config.yaml").is_file():
        if not (path / MANIFEST_FILE).is_file():
            there = ", ".join(str(found) for found in checkpoints(path.parent)) or "none"
            raise ConfigError(f"expected a checkpoint to resume from, found none in {path}; there are: {there}")
        return Resumption(run_dir, path)
    if (path / MANIFEST_FILE).is_file():
        raise ConfigError(
            f"expected RUN/{CHECKPOINTS}/step_N behind --resume, but {path} lies in no run; to start a new run from "
            f"these weights: --model {path / 'hf'}"
        )
    check_run(path)
    return Resumption(path)


def newest_run(out: Path) -> Path:
    """The run that was started or resumed last. Raises ConfigError if there is none."""
    found = [path.parent for path in out.glob("*/config.yaml")]
    if not found:
        raise ConfigError(
            f"expected a run to resume below {out}, found none; start one, or name its folder with --resume DIR"
        )
    return max(found, key=_started_at)


def unfinished(out: Path, name: str) -> Path | None:
    """The newest run below `out` that is not complete and is called `name`, or `name` and the time of its start."""
    is_called_so = re.compile(rf"{re.escape(name)}(-\d{{4}}-\d{{6}})?").fullmatch
    found = [path for path in out.glob("*") if is_called_so(path.name) and (path / "config.yaml").is_file()]
    return max((path for path in found if not is_complete(path)), key=_started_at, default=None)


def is_complete(run_dir: Path) -> bool:
    """Whether its last start came to the run's end."""
    try:
        ended = json.loads((run_dir / "status.json").read_bytes())["ended"]
    except (FileNotFoundError, ValueError):  # killed before it had said anything, or the machine fell while it did
        return False
    return ended is not None and ended["code"] == Exit.DONE


def go_back(checkpoint: Path) -> str:
    """Make a checkpoint the newest of its run, whose lock the caller holds; says where later ones are now.

    Raises ConfigError if it is damaged.
    """
    if reason := damage(checkpoint):
        others = ", ".join(path.name for path in checkpoints(checkpoint.parent) if path != checkpoint) or "none"
        raise ConfigError(f"{checkpoint} is damaged, {reason}; resume from another ({others})")
    later = [path for path in checkpoints(checkpoint.parent) if step_of(path) > step_of(checkpoint)]
    if not later:
        return f"going on from {checkpoint}"
    aside = checkpoint.parent / f"left-{time.strftime('%m%d-%H%M%S')}"
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    return f"going on from {checkpoint}; the later {', '.join(path.name for path in later)} are in {aside}"


def _started_at(run_dir: Path) -> float:
    """Every start writes the settings anew."""
    return (run_dir / "config.yaml").stat().st_mtime
