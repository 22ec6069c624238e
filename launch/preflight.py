"""What can be known to go wrong before anything starts. Edge: looks at folders, memory and installed packages.

Each check raises with what was expected, what was found, and what to do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.devices import detect
from launch.memory import RewardModelSize
from launch.model_shape import ModelShape
from launch.plan import Devices
from protocol.accelerators import ORDER, candidates
from protocol.config import Config
from protocol.errors import ConfigError, PreflightError
from protocol.keys import require_curve

SNAPSHOTS = 3
"""Weights that lie in shared memory at a time: the newest, the one being read, the one being written.

With adapters those are small, and the model is there once, as their base.
"""

MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file, as that library has it."""


def check(config: Config, shared_memory: Path = Path("/dev/shm")) -> None:
    """Raises PreflightError or ConfigError for the first thing that is missing."""
    require_curve()
    check_packages(config)
    check_model(config.model.path)
    copies = 1 if config.lora.rank or config.run.evaluation_only else SNAPSHOTS
    check_shared_memory(Path(config.model.path), shared_memory, copies)


def check_device(config: Config, devices: Devices, environ: Mapping[str, str]) -> None:
    """Raises PreflightError if `devices` lack a card or a package, naming each, and a --device that lacks nothing."""
    lacks = _lacking(config, devices, environ)
    if lacks:
        device = devices.accelerator.device
        others = [kind for kind in dict.fromkeys(kind.device for kind in ORDER) if kind != device]
        works = [other for other in others if not _lacking(config, detect(other, environ), environ)]
        wanted = (
            f"--device {device}" if config.run.device == device else f"--device {config.run.device}, here {device},"
        )
        raise PreflightError(
            "\n  ".join([f"{wanted} needs more than there is; what works here: --device {[*works, 'cpu'][0]}", *lacks])
        )


def _lacking(config: Config, devices: Devices, environ: Mapping[str, str]) -> list[str]:
    """What a run on these devices would miss, one line each, with what to do about it."""
    accelerator, lacks = devices.accelerator, []
    if accelerator.tools and not devices.cards:
        tools = " or ".join(tool.commands[0][0] for kind in candidates(accelerator.device) for tool in kind.tools)
        masks = [mask for mask in (accelerator.outer_mask, *accelerator.masks) if mask in environ]
        through = f" and {' and '.join(f'{mask}={environ[mask]}' for mask in masks)} lets through" if masks else ""
        lacks.append(f"needs a card, none is visible: there must be one that {tools} shows{through}")
    wants_vllm = config.generators.count and config.generators.engine == "vllm"
    for package in (accelerator.torch_plugin, accelerator.vllm_plugin if wants_vllm else None):
        if package is not None and importlib.util.find_spec(package.module) is None:
            lacks.append(f"needs the package {package.module}, which this Python does not have: {package.install}")
    if accelerator.toolkit and not any(environ.get(name) for name in accelerator.toolkit_variables):
        names = " nor ".join(accelerator.toolkit_variables)
        lacks.append(f"needs {accelerator.toolkit} (neither {names} is set)")
    if accelerator.torch_build and (version := _cpu_build("torch")):
        lacks.append(f"needs a torch that was built for it, found {version}: {accelerator.torch_build}")
    return lacks


def _cpu_build(package: str) -> str:
    """Name and version of a package that was built for the CPU alone, as its version says; "" for any other."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f"{package} {version}" if version.endswith("+cpu") else ""


def model_shape(model: str, fetch: bool = False) -> ModelShape | None:
    """Of a folder, or of a name on Hugging Face; None where its config.json is not here, nor can be fetched."""
    folder = Path(model)
    found: Any = folder / "config.json" if folder.is_dir() else None
    try:
        if found is None and model and model.count("/") <= 1:
            import huggingface_hub

            found = huggingface_hub.try_to_load_from_cache(model, "config.json")
            if fetch and not isinstance(found, str):
                found = huggingface_hub.hf_hub_download(model, "config.json")
        config = json.loads(Path(found).read_text()) if isinstance(found, (str, Path)) else None
    except (OSError, ValueError):
        return None
    return ModelShape.of(config if isinstance(config, dict) else None)


def sizes(config: Config, fetch: bool) -> tuple[ModelShape | None, RewardModelSize | None]:
    """Of model and reward model, where they share a card and are known. `fetch`: a config.json that is not here."""
    if not config.run.share_gpu:
        return None, None
    folder = config.rewards.model.path
    return model_shape(config.model.path, fetch), reward_model_size(Path(folder)) if folder else None


def reward_model_size(folder: Path) -> RewardModelSize:
    """By the headers of its weights' files. Raises ConfigError naming one that cannot be read."""
    number = 0
    for path in sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors")):
        try:
            with open(path, "rb") as file:
                header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER_BYTES)))
            number += sum(math.prod(told["shape"]) for name, told in header.items() if name != "__metadata__")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"expected the reward model's weights as safetensors in {path}, cannot read its header: {error}; fetch "
                "it again, or set rewards.model.path"
            ) from None
    return RewardModelSize(number, model_shape(str(folder)))


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
