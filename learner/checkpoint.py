"""Checkpoints: everything a run goes on from, in one folder that is either whole or not there.

Written by all learner ranks together, read at any ZeRO stage by any number of them. No pickle: safetensors by parameter
name, msgpack, and an `hf/` folder that transformers and vLLM load as it is. That a half-written or damaged checkpoint
is never resumed rests on the order in `save` (aside, synced, digested, renamed) and on `damage`.

    step_<n>/manifest.json             format, step, AdamW's counts; size and sha256 of every file below
             training-<k>.safetensors  the policy's fp32/<name>, exp_avg/<name>, exp_avg_sq/<name>
             <model>-<k>.safetensors   likewise, of a model beside the policy
             state.msgpack             what the caller adds: ledger, version, settings
             hf/                       weights in the computing dtype, config, tokenizer
             adapter/                  with adapters: for peft; `training-<k>` is then of the adapters, hf/ merged
             base/                     likewise, as hf/: the weights below them, where they are not those of model.path
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgpack
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from learner.policy import Policy
from learner.ranks import Ranks
from protocol.errors import ConfigError

FORMAT = 2
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.msgpack"
POLICY = "training"  # the policy's files
KEYS = ("fp32", "exp_avg", "exp_avg_sq")
SHARD_BYTES = 2 << 30  # of host memory that writing takes


class Model(Protocol):
    """What has weights, and maybe moments, that training goes on from."""

    @property
    def num_applied(self) -> int: ...
    def layout(self) -> list[tuple[str, str, tuple[int, ...]]]: ...
    def training_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]: ...
    def restore(self, num_applied: int, read: Callable[[str], Mapping[str, Tensor]]) -> None: ...


@dataclass(frozen=True)
class Found:
    """What `latest_valid` saw."""

    path: Path | None  # newest checkpoint that verifies
    damaged: tuple[str, ...]  # newer ones, each with what is wrong


def save(
    folder: Path,
    step: int,
    policy: Policy,
    extras: Mapping[str, Any],
    keep: int,
    ranks: Ranks,
    others: Mapping[str, Model] | None = None,
) -> Path:
    """Write `folder`/step_<step> and remove all but the `keep` newest. Collective.

    `extras`, of rank 0, is plain data for msgpack; `others` are the models beside the policy, by name. Checkpoints of
    later steps are removed too: they belong to a course that this run left when it was resumed.
    """
    final, aside = folder / f"step_{step}", folder / f"tmp-step_{step}"
    if ranks.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    policy.export(aside)
    models: dict[str, Model] = {POLICY: policy, **(others or {})}
    for name, model in models.items():
        _write_training_state(aside, name, model, ranks)
    if ranks.is_first:
        (aside / STATE_FILE).write_bytes(msgpack.packb(dict(extras)))
        _seal(aside, step, {name: model.num_applied for name, model in models.items()})
        if final.exists():
            os.rename(final, folder / f"tmp-replaced-step_{step}")
        os.rename(aside, final)
        _sync(folder)
        _remove_old(folder, step, keep)
    ranks.barrier(f"write the checkpoint of step {step}")
    return final


def latest_valid(folder: Path) -> Found:
    """The newest checkpoint whose every byte is as it was written. Reads them whole; local, call it on one rank."""
    damaged: list[str] = []
    for path in reversed(_checkpoints(folder)):
        reason = damage(path)
        if not reason:
            return Found(path, tuple(damaged))
        damaged.append(f"{path}: {reason}")
    return Found(None, tuple(damaged))


def damage(path: Path) -> str:
    """What is wrong with a checkpoint; "" if nothing."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_bytes())
        if manifest["format"] != FORMAT:
            return f"format {FORMAT} expected, got {manifest['format']}"
        for name, (size, digest) in manifest["files"].items():
            if (path / name).stat().st_size != size:
                return f"{name} must have {size} bytes, has {(path / name).stat().st_size}"
            if _digest(path / name) != digest:
                return f"{name} does not match its digest"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST_FILE} cannot be read: {type(error).__name__}: {error}"
    return ""


def load(path: Path, policy: Policy, others: Mapping[str, Model] | None = None) -> dict[str, Any]:
    """Set weights and moments from a checkpoint that `latest_valid` gave; returns the extras. Collective.

    `others` as `save` had them. Raises ConfigError if one is missing, or the checkpoint is of another model.
    """
    applied = json.loads((path / MANIFEST_FILE).read_bytes())["num_applied"]
    models: dict[str, Model] = {POLICY: policy, **(others or {})}
    for name, model in models.items():
        if name not in applied:
            raise ConfigError(f"{path} has no {name} model, which the run has; resume with the settings it was made by")
        _read_training_state(path, name, model, applied[name])
    extras: dict[str, Any] = msgpack.unpackb((path / STATE_FILE).read_bytes())
    return extras


def _read_training_state(path: Path, name: str, model: Model, num_applied: int) -> None:
    with ExitStack() as stack:
        places: dict[str, Any] = {}
        for shard in sorted(path.glob(f"{name}-*.safetensors")):
            file = stack.enter_context(safe_open(shard, "pt"))
            places |= dict.fromkeys(file.keys(), file)
        _check_same_model(path, model, {key: tuple(file.get_slice(key).get_shape()) for key, file in places.items()})

        def read(name: str) -> dict[str, Tensor]:
            return {
                key: places[f"{key}/{name}"].get_tensor(f"{key}/{name}") for key in KEYS if f"{key}/{name}" in places
            }

        model.restore(num_applied, read)


def _check_same_model(path: Path, model: Model, shapes: Mapping[str, tuple[int, ...]]) -> None:
    wanted = {f"fp32/{name}": shape for name, _, shape in model.layout()}
    saved = {key: shape for key, shape in shapes.items() if key.startswith("fp32/")}
    unlike = sorted(key.removeprefix("fp32/") for key, _ in wanted.items() ^ saved.items())
    if unlike:
        raise ConfigError(
            f"{path} is a checkpoint of another model: {unlike[0]} is missing or has another shape; set model.path, "
            "and lora as it was"
        )


def _write_training_state(folder: Path, model_name: str, model: Model, ranks: Ranks) -> None:
    shard: dict[str, Tensor] = {}
    number = held = 0
    for name, state in model.training_state():  # a collective per parameter, so every rank walks through all
        if not ranks.is_first:
            continue
        shard |= {f"{key}/{name}": value.to("cpu", copy=True).contiguous() for key, value in state.items()}
        held += sum(value.nbytes for value in state.values())
        if held >= SHARD_BYTES:
            save_file(shard, folder / f"{model_name}-{number:05}.safetensors")
            shard, number, held = {}, number + 1, 0
    if shard:
        save_file(shard, folder / f"{model_name}-{number:05}.safetensors")


def _seal(folder: Path, step: int, num_applied: Mapping[str, int]) -> None:
    """Sync every file, then write the manifest that vouches for them, and sync that."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        _sync(path)
    files = {str(path.relative_to(folder)): (path.stat().st_size, _digest(path)) for path in paths}
    manifest = {"format": FORMAT, "step": step, "num_applied": dict(num_applied), "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, sort_keys=True))
    for path in (folder / MANIFEST_FILE, *{path.parent for path in paths}, folder):
        _sync(path)


def _remove_old(folder: Path, step: int, keep: int) -> None:
    kept = [path for path in _checkpoints(folder) if _step_of(path) <= step][-keep:]
    for path in [*_checkpoints(folder), *folder.glob("tmp-*")]:
        if path not in kept:
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((path for path in folder.glob("step_*") if path.name[5:].isdecimal()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
