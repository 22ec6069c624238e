"""Vendors' tools and packages that are not here, as small real ones: executables on a PATH, folders on a PYTHONPATH."""

from __future__ import annotations

import os
from pathlib import Path

NVIDIA = "0, GPU-aa11, NVIDIA H200, 143771\n1, GPU-bb22, NVIDIA H200, 143771\n"

ROCM_CARDS = """WARNING: AMD GPU device(s) is/are in a low-power state. Check power control/runtime_status
{"card1": {"Unique ID": "0xB0B", "VRAM Total Memory (B)": "206141652992", "Card Series": "AMD Instinct MI300X"},
 "card0": {"Unique ID": "0xA0A", "VRAM Total Memory (B)": "206141652992", "Card series": "AMD Instinct MI300X"},
 "system": {"Driver version": "6.7.0"}}
"""

NPU_MAP = """\tNPU ID     Chip ID    Chip Logic ID    Chip Name
\t0          0          0                Ascend 910B3
\t0          1          -                Mcu
\t5          0          1                Ascend 910B3
"""

NPU_TABLE = """+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 92.4        39                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          4171 / 65536         |
+===========================+===============+====================================================+
| 5     910B3               | Warning       | 92.4        39                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           1452 / 15137      1    / 32768         |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
| 0       0                 | 1234          | python                   | 56000                   |
"""


def add_tool(folder: Path, name: str, answer: str, when: str = "*") -> None:
    """Put an executable into `folder` that prints `answer` if its last argument is like `when`. May be repeated."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    before = path.read_text() if path.exists() else '#!/bin/sh\nfor last in "$@"; do :; done\n'
    path.write_text(f"{before}case $last in {when}) cat <<'END'\n{answer}END\nexit 0;; esac\n")
    path.chmod(0o755)


def add_nvidia(folder: Path) -> None:
    add_tool(folder, "nvidia-smi", NVIDIA)


def add_rocm(folder: Path) -> None:
    add_tool(folder, "rocm-smi", ROCM_CARDS)


def add_npu(folder: Path) -> None:
    add_tool(folder, "npu-smi", NPU_MAP, "-m")
    add_tool(folder, "npu-smi", NPU_TABLE, "info")


def path_with(folder: Path) -> str:
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def add_package(folder: Path, name: str, version: str = "1.0", source: str = "", entry_points: str = "") -> None:
    """Put a Python package into `folder`, which is to stand on a PYTHONPATH."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(entry_points)


def claim_cuda_torch(folder: Path) -> None:
    """Installed packages say that torch was built for CUDA; the real one is found beneath."""
    metadata = folder / "torch-2.13.0+cu130.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+cu130\n")
