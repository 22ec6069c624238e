"""Finds what there is to compute on, without torch: the vendors' tools, masked as the environment says.

Run by `launch/cluster.py`. That no process is ever given a card that the user has masked rests on `visible`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launch.plan import Devices
from protocol.accelerators import CPU, Accelerator, Card, Tool, candidates
from protocol.errors import PreflightError

QUERY_TIMEOUT_S = 20.0
HIDES_ALL = ("", "-1", "none", "NoDevFiles")
"""Masks that let no card through; the words are what job schedulers and container runtimes write."""


def detect(wanted: str, environ: Mapping[str, str]) -> Devices:
    """The devices that `wanted` (run.device) means: the first kind that has a visible card; of `auto` else the CPU.

    Raises PreflightError if a mask names what is not there, or contradicts another.
    """
    kinds = candidates(wanted)
    for accelerator in kinds:
        cards = visible(accelerator, _listed(accelerator), environ)
        if cards:
            return Devices(accelerator.kind, num_cores(), cards)
    return Devices(CPU.kind if wanted == "auto" or not kinds else kinds[0].kind, num_cores())


def num_cores() -> int:
    """Cores that this process may use: its affinity mask, cut by the container's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def visible(accelerator: Accelerator, found: Sequence[Card], environ: Mapping[str, str]) -> tuple[Card, ...]:
    """The cards that the user's masks let through, in their order, with the numbers that our own masks must use.

    Raises PreflightError if a mask names what is not there, or contradicts another.
    """
    if not found:
        return ()
    cards, shown = tuple(found), f"{' or '.join(tool.commands[0][0] for tool in accelerator.tools)} shows"
    outer = accelerator.outer_mask
    if outer in environ:
        left = _admitted(cards, outer, environ[outer], shown)
        cards = tuple(replace(card, index=str(number)) for number, card in enumerate(left))
        shown = f"{outer}={environ[outer]} leaves and counts anew, from 0 (unset one of the two)"
    given = {mask: environ[mask] for mask in accelerator.masks if mask in environ}
    if len(set(given.values())) > 1:
        both = " and ".join(f"{mask}={value}" for mask, value in given.items())
        raise PreflightError(f"expected one list of visible cards, found {both}; unset one, or make them equal")
    for mask, value in list(given.items())[:1]:
        cards = _admitted(cards, mask, value, shown)
    return cards


def _admitted(cards: Sequence[Card], mask: str, value: str, shown: str) -> tuple[Card, ...]:
    """The cards that a mask such as "2,0" or "GPU-5f" names, in its order. A slice (MIG-..) is a card of its own."""
    if value.strip() in HIDES_ALL:
        return ()
    admitted: list[Card] = []
    for name in (part.strip() for part in value.split(",")):
        named = [card for card in cards if card.index == name or _is_uuid_of(name, card)]
        if name.startswith("MIG-"):
            named = [Card(name, "MIG slice", uuid=name)]
        if len(named) != 1 or named[0] in admitted:
            problem = "twice" if len(named) == 1 else "for several cards" if named else "which is none of them"
            there = ", ".join(card.index for card in cards) or "none"
            raise PreflightError(
                f"{mask}={value} has {name!r}, {problem}; expected some of the cards {there}, which {shown}; set {mask}"
            )
        admitted += named
    return tuple(admitted)


def _is_uuid_of(name: str, card: Card) -> bool:
    return name.upper().startswith("GPU-") and card.uuid.lower().startswith(name.lower())


def _listed(accelerator: Accelerator) -> list[Card]:
    return next((cards for tool in accelerator.tools if (cards := tool.read(_said(tool)))), [])


def _said(tool: Tool) -> str:
    """What the tool's commands print; nothing where there is no such tool, or no driver behind it."""
    texts = []
    for command in tool.commands:
        try:
            answer = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=QUERY_TIMEOUT_S, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        texts.append(answer.stdout)
    return "\n".join(texts)
