"""Checkpoints: everything a run goes on from, in one folder that is either whole or not there.

Written by all learner ranks together, read at any ZeRO stage by any number of them. No pickle: safetensors by parameter
name, msgpack, and an `hf/` folder that transformers and vLLM load as it is. That a half-written or damaged checkpoint
is never resumed rests on the order in `save` (aside, sealed, renamed) and on `damage` (`protocol/checkpoints.py`).

    step_<n>/manifest.json             format, step, AdamW's counts; size and sha256 of every file below
             training-<k>.safetensors  the policy's fp32/<name>, exp_avg/<name>, exp_avg_sq/<name>
             <model>-<k>.safetensors   likewise, of a model beside the policy
             state.msgpack             what the caller adds: ledger, version, settings
             hf/                       weights in the computing dtype, config, tokenizer
             adapter/                  with adapters: for peft; `training-<k>` is then of the adapters, hf/ merged
             base/                     likewise, as hf/: the weights below them, where they are not those of model.path
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import msgpack
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from learner.policy import Policy
from learner.ranks import Ranks
from protocol.checkpoints import MANIFEST_FILE, PREFIX, checkpoints, seal, step_of, sync
from protocol.errors import ConfigError

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
    final, aside = folder / f"{PREFIX}{step}", folder / f"tmp-{PREFIX}{step}"
    if ranks.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    policy.export(aside)
    models: dict[str, Model] = {POLICY: policy, **(others or {})}
    for name, model in models.items():
        _write_training_state(aside, name, model, ranks)
    if ranks.is_first:
        (aside / STATE_FILE).write_bytes(msgpack.packb(dict(extras)))
        seal(aside, step, {name: model.num_applied for name, model in models.items()})
        if final.exists():
            os.rename(final, folder / f"tmp-replaced-{PREFIX}{step}")
        os.rename(aside, final)
        sync(folder)
        _remove_old(folder, step, keep)
    ranks.barrier(f"write the checkpoint of step {step}")
    return final


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


def _remove_old(folder: Path, step: int, keep: int) -> None:
    kept = [path for path in checkpoints(folder) if step_of(path) <= step][-keep:]
    for path in [*checkpoints(folder), *folder.glob("tmp-*")]:
        if path not in kept:
            shutil.rmtree(path)
