"""Checkpoints: everything a run goes on from, in one folder that is either whole or not there.

Written by all learner ranks together, read at any ZeRO stage by any number of them. No pickle: safetensors by parameter
name, msgpack, and an `hf/` folder that transformers and vLLM load as it is. That a half-written or damaged checkpoint
is never resumed rests on the order in `save` (aside, synced, digested, renamed) and on `damage`.

    step_<n>/manifest.json             format, step, AdamW's count; size and sha256 of every file below
             training-<k>.safetensors  fp32/<name>, exp_avg/<name>, exp_avg_sq/<name>
             state.msgpack             what the caller adds: ledger, version, settings
             hf/                       weights in the computing dtype, config, tokenizer
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from learner.policy import Policy
from learner.ranks import Ranks
from protocol.errors import ConfigError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.msgpack"
KEYS = ("fp32", "exp_avg", "exp_avg_sq")
SHARD_BYTES = 2 << 30  # of host memory that writing takes


@dataclass(frozen=True)
class Found:
    """What `latest_valid` saw."""

    path: Path | None  # newest checkpoint that verifies
    damaged: tuple[str, ...]  # newer ones, each with what is wrong


def save(folder: Path, step: int, policy: Policy, extras: Mapping[str, Any], keep: int, ranks: Ranks) -> Path:
    """Write `folder`/step_<step> and remove all but the `keep` newest. Collective.

    `extras`, of rank 0, is plain data for msgpack. Checkpoints of later steps are removed too: they belong to a course
    that this run left when it was resumed.
    """
    final, aside = folder / f"step_{step}", folder / f"tmp-step_{step}"
    if ranks.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    policy.save_pretrained(aside / "hf")
    _write_training_state(aside, policy, ranks)
    if ranks.is_first:
        (aside / STATE_FILE).write_bytes(msgpack.packb(dict(extras)))
        _seal(aside, step, policy.num_applied)
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


def load(path: Path, policy: Policy) -> dict[str, Any]:
    """Set weights and moments from a checkpoint that `latest_valid` gave; returns the extras. Collective.

    Raises ConfigError if it is of another model.
    """
    manifest = json.loads((path / MANIFEST_FILE).read_bytes())
    with ExitStack() as stack:
        places: dict[str, Any] = {}
        for shard in sorted(path.glob("training-*.safetensors")):
            file = stack.enter_context(safe_open(shard, "pt"))
            places |= dict.fromkeys(file.keys(), file)
        _check_same_model(path, policy, {key: tuple(file.get_slice(key).get_shape()) for key, file in places.items()})

        def read(name: str) -> dict[str, Tensor]:
            return {
                key: places[f"{key}/{name}"].get_tensor(f"{key}/{name}") for key in KEYS if f"{key}/{name}" in places
            }

        policy.restore(manifest["num_applied"], read)
    extras: dict[str, Any] = msgpack.unpackb((path / STATE_FILE).read_bytes())
    return extras


def _check_same_model(path: Path, policy: Policy, shapes: Mapping[str, tuple[int, ...]]) -> None:
    wanted = {f"fp32/{name}": shape for name, _, shape in policy.layout()}
    saved = {key: shape for key, shape in shapes.items() if key.startswith("fp32/")}
    unlike = sorted(key.removeprefix("fp32/") for key, _ in wanted.items() ^ saved.items())
    if unlike:
        raise ConfigError(
            f"{path} is a checkpoint of another model: {unlike[0]} is missing or has another shape; set model.path"
        )


def _write_training_state(folder: Path, policy: Policy, ranks: Ranks) -> None:
    shard: dict[str, Tensor] = {}
    number = held = 0
    for name, state in policy.training_state():  # a collective per parameter, so every rank walks through all
        if not ranks.is_first:
            continue
        shard |= {f"{key}/{name}": value.to("cpu", copy=True).contiguous() for key, value in state.items()}
        held += sum(value.nbytes for value in state.values())
        if held >= SHARD_BYTES:
            save_file(shard, folder / f"training-{number:05}.safetensors")
            shard, number, held = {}, number + 1, 0
    if shard:
        save_file(shard, folder / f"training-{number:05}.safetensors")


def _seal(folder: Path, step: int, num_applied: int) -> None:
    """Sync every file, then write the manifest that vouches for them, and sync that."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        _sync(path)
    files = {str(path.relative_to(folder)): (path.stat().st_size, _digest(path)) for path in paths}
    manifest = {"format": FORMAT, "step": step, "num_applied": num_applied, "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, sort_keys=True))
    for path in (folder / MANIFEST_FILE, folder / "hf", folder):
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
