"""Finds what there is to compute on, without torch: nvidia-smi, npu-smi, else the processor.

Run by `launch/cluster.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.plan import VISIBLE, Card, Devices

QUERIES = {
    "cuda": ("nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"),
    "npu": ("npu-smi", "info", "-m"),
}
QUERY_TIMEOUT_S = 20.0


def detect(wanted: str, environ: Mapping[str, str]) -> Devices:
    """The devices of kind `wanted`; of `auto`: the first kind that has a card, else the processor."""
    for kind in ("cuda", "npu") if wanted == "auto" else (wanted,):
        cards = _cards(kind, environ)
        if cards:
            return Devices(kind, num_cores(), cards)
    return Devices("cpu" if wanted == "auto" else wanted, num_cores())


def num_cores() -> int:
    """Cores that this process may use: its affinity mask, cut by the container's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def parse_nvidia(text: str) -> list[tuple[str, Card]]:
    """(uuid, card) of each line `0, GPU-5f.., NVIDIA H200, 143771`."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[0].isdigit():
            index, uuid, name, mebibytes = fields
            found.append((uuid, Card(index, name, int(mebibytes) << 20 if mebibytes.isdigit() else 0)))
    return found


def parse_npu(text: str) -> list[tuple[str, Card]]:
    """("", card) of each chip with a logic id: lines `NPU ID, Chip ID, Chip Logic ID, Chip Name`."""
    rows = (re.fullmatch(r"\s*\d+\s+\d+\s+(\d+)\s+(\S.*?)\s*", line) for line in text.splitlines())
    return [("", Card(row[1], row[2])) for row in rows if row]


def visible(found: Sequence[tuple[str, Card]], mask: str | None) -> tuple[Card, ...]:
    """The cards that a mask such as "2,0" or "GPU-5f" admits, in its order; None admits all."""
    if mask is None:
        return tuple(card for _, card in found)
    names = [name.strip() for name in mask.split(",")]
    picked = (
        [c for uuid, c in found if name and (c.index == name or (uuid and uuid.startswith(name)))] for name in names
    )
    return tuple(cards[0] for cards in picked if cards)


def _cards(kind: str, environ: Mapping[str, str]) -> tuple[Card, ...]:
    if kind == "cpu":
        return ()
    try:
        answer = subprocess.run(QUERIES[kind], capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()  # no such tool, or no driver behind it
    found = parse_nvidia(answer.stdout) if kind == "cuda" else parse_npu(answer.stdout)
    return visible(found, environ.get(VISIBLE[kind]))
