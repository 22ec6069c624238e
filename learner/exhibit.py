"""A model that is only evaluated: one process in the learner's place, which publishes its weights and trains nothing.

Run by `launch/learner.py` where `run.evaluation_only` is set; needs neither torch nor a card. What the generators load
are the files' own bytes, so that a checkpoint's hf/ folder is evaluated as its run evaluated it.
"""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from learner.evaluations import EVALUATIONS_FILE, log_evaluation
from learner.link import Link, Standing
from protocol.addresses import Addresses
from protocol.config import Config
from protocol.errors import ConfigError, NoProgress
from protocol.keys import read_client_key
from protocol.messages import Finished
from protocol.shared_memory import private_folder
from protocol.weights import Snapshot, SnapshotWriter, lay_out

log = logging.getLogger("tether.exhibit")

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # of safetensors
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_HEADER_BYTES = 100 << 20  # as the format has it
NO_PARAMETERS = (".rotary_emb.inv_freq",)  # tensors that some old checkpoints hold beside the parameters


class Stored(NamedTuple):
    """One tensor in a file of safetensors."""

    name: str
    dtype: str  # as in a snapshot
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def evaluate(config: Config, run_dir: Path) -> bool:
    """Publish the model, wait for its evaluation, write it down; False: the run was asked to end before that.

    Raises ConfigError if there are no weights that can be read, NoProgress with the broker's verdict.
    """
    tensors = [tensor for file in weight_files(config.model.path) for tensor in stored(file)]
    shared = private_folder("learner")
    link = Link(
        Addresses.read(run_dir),
        read_client_key(run_dir / "keys" / "learner.key"),
        rank=0,
        num_ranks=1,
        standing=Standing(0, -1, b""),
        settings_digest=config.result_digest(),
        wait_s=config.watchdog.orphan_s,
    )
    try:
        link.say("publishing", config.model.path)
        link.publish(snapshot_of(tensors, shared / "snapshot"))
        link.say("waiting for the evaluation")
        finished = link.take(0, lambda: None)
        assert isinstance(finished, Finished), "a run without steps has no batch"
        if finished.kind == "verdict":
            raise NoProgress(finished.reason)
        link.refresh()
        for evaluation in link.evaluations():
            log_evaluation(evaluation)
            with open(run_dir / EVALUATIONS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(evaluation.model_dump(), ensure_ascii=False) + "\n")
        return finished.kind == "complete"
    finally:
        link.close("the evaluation is over")
        shutil.rmtree(shared, ignore_errors=True)


def weight_files(model: str) -> list[Path]:
    """The safetensors of a model folder or Hugging Face name. Raises ConfigError if there are none."""
    folder = Path(model) if Path(model).is_dir() else _downloaded(model)
    if (folder / INDEX).is_file():
        names = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / SINGLE]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise ConfigError(
            f"expected weights as safetensors in {folder}, found no {missing.name}; save them with "
            "model.save_pretrained(FOLDER), or name another model"
        )
    return files


def stored(file: Path) -> Iterator[Stored]:
    """The tensors of one file, which is not loaded. Raises ConfigError for another format or a strange dtype."""
    try:
        with open(file, "rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(size, MAX_HEADER_BYTES)))
        for name, fields in header.items():
            if name == "__metadata__" or name.endswith(NO_PARAMETERS):
                continue
            if fields["dtype"] not in DTYPES:
                raise ConfigError(
                    f"expected weights of {', '.join(DTYPES)}, {name} in {file} is {fields['dtype']}; evaluate a model "
                    "that is not quantised"
                )
            start, end = (8 + size + offset for offset in fields["data_offsets"])
            yield Stored(name, DTYPES[fields["dtype"]], tuple(fields["shape"]), file, start, end)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"expected safetensors in {file}, {type(error).__name__}: {error}; fetch it again") from None


def snapshot_of(tensors: list[Stored], folder: Path) -> Snapshot:
    """The tensors as version 0. Raises ConfigError if a file has not their length."""
    layout = lay_out((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
    writer = SnapshotWriter(folder, layout)
    files = {tensor.file: np.memmap(tensor.file, np.uint8, "r") for tensor in tensors}
    for tensor, spec in zip(tensors, layout, strict=True):
        data = files[tensor.file][tensor.start : tensor.end]
        if len(data) != spec.nbytes:
            raise ConfigError(f"expected {spec.nbytes} bytes of {tensor.name} in {tensor.file}, found {len(data)}")
        writer.view(spec)[:] = data
    return writer.finish(0)


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the hub's client has no common base for "no such name", "no network" and "no access"
        raise ConfigError(
            f"expected model.path to be a folder or a Hugging Face name that can be reached, got {name} "
            f"({type(error).__name__}); download it elsewhere and name its folder"
        ) from None
