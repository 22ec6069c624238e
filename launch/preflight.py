"""What can be known to go wrong before anything starts. Edge: looks at folders, memory and installed packages.

Each check raises with what was expected, what was found, and what to do.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from protocol.config import Config
from protocol.errors import ConfigError, PreflightError
from protocol.keys import require_curve

SNAPSHOTS = 3
"""Weights that lie in shared memory at a time: the newest, the one being read, the one being written.

With adapters those are small, and the model is there once, as their base.
"""


def check(config: Config, shared_memory: Path = Path("/dev/shm")) -> None:
    """Raises PreflightError or ConfigError for the first thing that is missing."""
    require_curve()
    check_packages(config)
    check_model(config.model.path)
    copies = 1 if config.lora.rank or config.run.evaluation_only else SNAPSHOTS
    check_shared_memory(Path(config.model.path), shared_memory, copies)


def check_packages(config: Config) -> None:
    """The engines that this run will import can be found."""
    engine = {"vllm": ["vllm"], "transformers": ["transformers"], "fake": []}[config.generators.engine]
    trains = [] if config.run.evaluation_only else ["torch", "deepspeed"]
    for package in [*(engine if config.generators.count else []), *trains]:
        if importlib.util.find_spec(package) is None:
            raise PreflightError(
                f"this run needs the package {package}, which this Python does not have; run make setup"
            )


def check_model(model: str) -> None:
    """A folder has a config and a tokenizer. A name without a folder is left to Hugging Face."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith(".") or model.count("/") > 1:
            raise ConfigError(
                f"expected a model folder or a name on Hugging Face, found no folder {model}; set --model"
            )
        return
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"expected a config.json in the model folder {folder}, found none; set --model to a folder that has one"
        )
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"expected a fast tokenizer (tokenizer.json) in the model folder {folder}, found none; save one there with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER), or set --model"
        )


def check_shared_memory(model: Path, shared_memory: Path, copies: int = SNAPSHOTS) -> None:
    """Room for so many snapshots of a model whose size can be seen."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors")) if model.is_dir() else 0
    if size and shared_memory.is_dir() and shutil.disk_usage(shared_memory).free < copies * size:
        free = shutil.disk_usage(shared_memory).free
        snapshots = "1 snapshot" if copies == 1 else f"{copies} snapshots"
        raise PreflightError(
            f"weights travel through {shared_memory}: expected room for {snapshots} of {size / 1e9:.2f} GB, "
            f"found {free / 1e9:.2f} GB free; enlarge it (docker: --shm-size), or remove what lies there"
        )
