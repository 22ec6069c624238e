"""What differs between kinds of device: names, variables, the vendor's tools, and the packages that a kind needs.

Read by the cluster command (which cards there are, who sees which), by learner ranks (backend) and by generators
(vLLM's plugin). Standard library only. That a run on one kind never sees another's cards rests on `MASKS`, which the
plan empties in every process before it sets those of the kind. What each variable means: docs/devices.md.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from protocol.errors import ConfigError, PreflightError


@dataclass(frozen=True, slots=True)
class Card:
    """One accelerator."""

    index: str  # as the variables in `Accelerator.masks` want it
    name: str
    memory_bytes: int = 0  # 0: not known
    uuid: str = ""  # by which a mask may name it too; "": it has none


@dataclass(frozen=True, slots=True)
class Tool:
    """A vendor's command line tool that lists cards."""

    commands: tuple[tuple[str, ...], ...]  # `read` gets what all of them print, as one text
    read: Callable[[str], list[Card]]


@dataclass(frozen=True, slots=True)
class Package:
    """A Python package that a kind of device needs."""

    module: str
    install: str


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One kind of device."""

    kind: str
    device: str  # what torch, run.device and DeepSpeed's DS_ACCELERATOR call it
    backend: str  # of torch.distributed
    masks: tuple[str, ...] = ()  # variables that say which cards a process sees; they must agree
    outer_mask: str = ""  # one that is applied before them: they count the cards that it leaves, from 0
    environment: Mapping[str, str] = field(default_factory=dict)  # what makes the numbers in `masks` those of the tools
    tools: tuple[Tool, ...] = ()  # the first that shows a card is believed
    torch_build: str = ""  # how to get a torch that was built for it; "": the CPU's does, with the plugin
    torch_plugin: Package | None = None  # makes `device` known to torch
    vllm_plugin: Package | None = None  # makes it known to vLLM
    toolkit_variables: tuple[str, ...] = ()  # one of them is set where the vendor's toolkit is in use
    toolkit: str = ""


def read_nvidia_smi(text: str) -> list[Card]:
    """Lines such as `0, GPU-5f.., NVIDIA H200, 143771`; the last is MiB."""
    rows = [[field.strip() for field in line.split(",")] for line in text.splitlines()]
    return [Card(row[0], row[2], _number(row[3]) << 20, row[1]) for row in rows if len(row) == 4 and row[0].isdecimal()]


def read_amd_smi(text: str) -> list[Card]:
    """A list of cards as JSON, below "gpu_data" since ROCm 7."""
    parsed = _json(text)
    rows = parsed.get("gpu_data") if isinstance(parsed, dict) else parsed
    cards = []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("gpu"), int):
            asic, size = _part(row, "asic"), _part(_part(row, "vram"), "size")
            unit = {"B": 0, "KB": 10, "MB": 20, "GB": 30}.get(str(size.get("unit")), 0)
            serial = str(asic.get("asic_serial", ""))
            name = str(asic.get("market_name", "AMD GPU"))
            cards.append(Card(str(row["gpu"]), name, _number(size.get("value")) << unit, _amd_uuid(serial)))
    return cards


def read_rocm_smi(text: str) -> list[Card]:
    """JSON with a key "card0" for each card; releases differ in capitals."""
    parsed = _json(text)
    rows = {key: value for key, value in parsed.items() if isinstance(value, dict)} if isinstance(parsed, dict) else {}
    cards = []
    for key in sorted((key for key in rows if re.fullmatch(r"card\d{1,4}", key)), key=lambda key: int(key[4:])):
        row = {str(name).lower(): value for name, value in rows[key].items()}
        memory = _number(row.get("vram total memory (b)"))
        name = str(row.get("card series", "AMD GPU"))
        cards.append(Card(key[4:], name, memory, _amd_uuid(str(row.get("unique id", "")))))
    return cards


def read_npu_smi(text: str) -> list[Card]:
    """Of `info -m` the rows `NPU ID, Chip ID, Chip Logic ID[, Chip Phy-ID], Chip Name`, of `info` the memory in MiB."""
    sizes, npu, cards = {}, "", []
    for line in text.splitlines():
        if first := re.match(r"\|\s*(\d+)\s+[^|\s][^|]*\|\s*[A-Za-z]", line):
            npu = first[1]
        elif second := re.match(r"\|\s*(\d+)\s+(?:\d+\s+)?\|.*?(\d+)\s*/\s*(\d+)\s*\|\s*$", line):
            sizes[npu, second[1]] = int(second[3]) << 20
    for line in text.splitlines():
        if row := re.fullmatch(r"\s*(\d+)\s+(\d+)\s+(\d+)\s+(?:\d+\s+)?([A-Za-z\d].*?)\s*", line):
            cards.append(Card(row[3], row[4], sizes.get((row[1], row[2]), 0)))
    return cards


def _json(text: str) -> Any:
    """What the first object or array in `text` says; None if there is none. Tools print warnings before it."""
    start = re.search(r"^\s*[\[{]", text, re.MULTILINE)
    try:
        return json.loads(text[start.start() :]) if start else None
    except (ValueError, RecursionError):
        return None


def _part(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> int:
    """A size as tools write it; 0 where they have none, such as [N/A]."""
    text = str(value)
    return int(text) if text.isdecimal() and len(text) < 20 else 0


def _amd_uuid(serial: str) -> str:
    return f"GPU-{serial[2:]}" if re.fullmatch(r"0[xX][\da-fA-F]+", serial) else ""


NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
AMD_SMI = ("amd-smi", "static", "--asic", "--vram", "--json")
ROCM_SMI = ("rocm-smi", "--showproductname", "--showuniqueid", "--showmeminfo", "vram", "--json")

CUDA = Accelerator(
    kind="cuda",
    device="cuda",
    backend="nccl",
    masks=("CUDA_VISIBLE_DEVICES",),
    environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"},  # as nvidia-smi counts; else the fastest card is 0
    tools=(Tool((NVIDIA_SMI,), read_nvidia_smi),),
    torch_build="TETHER_DEVICE=cuda make setup",
)
ROCM = Accelerator(
    kind="rocm",
    device="cuda",  # ROCm's torch calls itself cuda
    backend="nccl",  # and RCCL nccl
    masks=("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    outer_mask="ROCR_VISIBLE_DEVICES",
    tools=(Tool((AMD_SMI,), read_amd_smi), Tool((ROCM_SMI,), read_rocm_smi)),
    torch_build="install torch and vllm as built for ROCm (docs/devices.md)",
)
NPU = Accelerator(
    kind="npu",
    device="npu",
    backend="hccl",
    masks=("ASCEND_RT_VISIBLE_DEVICES",),
    tools=(Tool((("npu-smi", "info", "-m"), ("npu-smi", "info")), read_npu_smi),),
    torch_plugin=Package("torch_npu", "pip install torch-npu, in the release that is made for this torch"),
    vllm_plugin=Package("vllm_ascend", "pip install vllm-ascend, with the releases of vllm and torch that it names"),
    toolkit_variables=("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"),
    toolkit="CANN, Ascend's toolkit: install it, then source /usr/local/Ascend/ascend-toolkit/set_env.sh",
)
CPU = Accelerator(kind="cpu", device="cpu", backend="gloo")

ORDER = (CUDA, ROCM, NPU)
"""Where `--device auto` looks for a card; without one it takes the processor."""

BY_KIND = {accelerator.kind: accelerator for accelerator in (CPU, *ORDER)}

DEVICES = ("cpu", "cuda", "npu")
"""What run.device may be, beside auto."""

MASKS = tuple(dict.fromkeys(mask for accelerator in ORDER for mask in accelerator.masks))
"""Every variable that says which cards a process sees; an empty one says none."""


def candidates(wanted: str) -> tuple[Accelerator, ...]:
    """The kinds that a run.device may mean, the one to be tried first first; of `cpu` none."""
    return tuple(accelerator for accelerator in ORDER if wanted in ("auto", accelerator.device))


def backend_of(device: str) -> str:
    """What torch.distributed talks over. Raises ConfigError if there is no such device."""
    if device not in DEVICES:
        raise ConfigError(f"device must be one of {', '.join(DEVICES)}, got {device}; set run.device")
    return next(accelerator.backend for accelerator in BY_KIND.values() if accelerator.device == device)


def import_torch_plugin(device: str) -> None:
    """Make `device` known to torch; to be called before the first `torch.device(device)`.

    Raises PreflightError naming the package that is missing or does not load.
    """
    for accelerator in candidates(device):
        plugin = accelerator.torch_plugin
        if plugin is not None:
            try:
                importlib.import_module(plugin.module)
            except ImportError as error:
                raise PreflightError(
                    f"--device {device} needs the package {plugin.module}, which does not load: {error}; "
                    f"{plugin.install}"
                ) from error
