"""What does the learner wait for when it puts its weights into shared memory? Fresh files against written-over ones.

Both ways go through `SnapshotRing`, as the learner does: "over" writes where an earlier version was, "fresh" begins in
an empty folder every time. A plain memcpy of as many bytes, between memory that was used before, is measured in the
same turns. Digests and names are not: they do not stop the learner.

    python bench/publish.py [--megabytes 500] [--turns 7]

Prints one JSON line: medians in seconds, and what each way costs in memcpys.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from protocol.own_python import use_own_python

    use_own_python()

from learner.snapshot_ring import SnapshotRing
from protocol.shared_memory import private_folder
from protocol.snapshot_file import Bytes
from protocol.weights import TensorSpec, lay_out


def publish(ring: SnapshotRing, layout: tuple[TensorSpec, ...], version: int, weights: Bytes) -> float:
    """Seconds of what stops the learner: room, and one copy."""
    started = time.perf_counter()
    writer = ring.begin(version)
    writer.view(layout[0])[:] = weights
    seconds = time.perf_counter() - started
    writer.finish(version)
    return seconds


def copy(source: Bytes, target: Bytes) -> float:
    """Seconds of a memcpy."""
    started = time.perf_counter()
    target[:] = source
    return time.perf_counter() - started


def measure(folder: Path, num_bytes: int, turns: int) -> dict[str, float]:
    """Medians over turns that each measure all three."""
    layout = lay_out([("weights", "float32", (num_bytes // 4,))])
    weights, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    over = SnapshotRing(folder / "over", layout)
    for version in range(2):
        publish(over, layout, version, weights)
    seconds: dict[str, list[float]] = {"fresh": [], "over": [], "memcpy": []}
    for turn in range(turns):
        seconds["fresh"].append(publish(SnapshotRing(folder / "fresh", layout), layout, 0, weights))
        seconds["over"].append(publish(over, layout, 2 + turn, weights))
        seconds["memcpy"].append(copy(weights, target))
    return {name: median(values) for name, values in seconds.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500, help="of the weights, 2**20 bytes each")
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args(argv)
    folder = private_folder("bench-publish")
    try:
        found = measure(folder, args.megabytes << 20, args.turns)
    finally:
        shutil.rmtree(folder)
    line = {"bench": "publish", "megabytes": args.megabytes, "turns": args.turns}
    line |= {f"{name}_s": round(value, 4) for name, value in found.items()}
    line |= {f"{name}_per_memcpy": round(found[name] / found["memcpy"], 2) for name in ("fresh", "over")}
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
