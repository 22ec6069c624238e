"""What runs of ours inside vLLM's own processes: the loading of snapshots, and the guard against orphaned engine cores.

vLLM calls `register` in the front-end, in every engine core and in every worker, because it is declared as the entry
point `tether` of `vllm.general_plugins`. That every parameter is loaded rests on
`SnapshotTransferEngine.receive_weights`; that no head keeps old weights, on its `finish_weight_update`; that every
adapter is, on `AdapterWorker.put_adapters`; that no engine core outlives its generator, on `protocol/parent.py`.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

from actors.snapshot_tensors import snapshot_tensors
from actors.vllm_settings import ADAPTER_ID, PLUGIN
from protocol.errors import SnapshotError
from protocol.parent import leave_with
from protocol.weights import Snapshot

NEEDLESS_WARNINGS = (
    "vllm.model_executor.model_loader.reload.layerwise",  # at every load, of layers that have nothing to be loaded
    "vllm.v1.utils",  # at every end, because the engine core is killed without being asked
)
"""Loggers of vLLM that warn of what is meant to be; errors they still say."""


def register() -> None:
    """Make the backend known to vLLM and, in a process that vLLM spawned, watch its parent. May be called again."""
    for name in NEEDLESS_WARNINGS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.suppress(ValueError):  # registered before
        WeightTransferEngineFactory.register_engine(PLUGIN, SnapshotTransferEngine)
    parent = multiprocessing.parent_process()
    if parent is not None:
        leave_with(parent.pid)


@dataclass
class NoInit(WeightTransferInitInfo):
    """There is nothing to set up: every update says where its snapshot lies."""


@dataclass
class SnapshotUpdate(WeightTransferUpdateInfo):
    """The snapshot to load; it must not change or go before the update has finished."""

    folder: str
    digest: str


class SnapshotTransferEngine(WeightTransferEngine[NoInit, SnapshotUpdate]):
    """Loads snapshots through vLLM's layer-wise reload, which re-packs each layer as its first load did."""

    init_info_cls = NoInit
    update_info_cls = SnapshotUpdate

    def init_transfer_engine(self, init_info: NoInit) -> None:
        pass

    def start_weight_update(self) -> None:
        self._tied = set(_tied_layers(self.model))
        layerwise.initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SnapshotUpdate) -> None:
        """Load every tensor of the snapshot. Raises SnapshotError if one has no place, or a parameter got no tensor."""
        snapshot = _opened(update_info.folder, update_info.digest)
        self.model.load_weights(snapshot_tensors(snapshot))
        missing = [name for name, layer in self.model.named_modules() if layer not in self._tied and _is_short(layer)]
        if missing:
            raise SnapshotError(f"the snapshot does not fill every parameter of: {', '.join(missing)}")

    def finish_weight_update(self) -> None:
        """Put what was loaded in place, and re-pack the heads that share their weight with the embedding.

        For the CPU vLLM packs a copy of the head's weight, but reloads only the embedding: the copy would stay.
        """
        layerwise.finalize_layerwise_reload(self.model, self.model_config)
        for layer in self.model.modules():
            if isinstance(layer, VocabParallelEmbedding) and hasattr(layer, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(layer, remove_weight=False)

    def shutdown(self) -> None:
        pass


class AdapterWorker:
    """What vLLM adds to its worker where snapshots are adapters. They are no weight update: each of those ends with
    all adapters forgotten.
    """

    model_runner: Any  # of the worker

    def put_adapters(self, folder: str, digest: str, alpha: float) -> None:
        """Put a snapshot's adapters in the place of the last; no file in peft's format is needed.

        Raises SnapshotError if one of their modules has no place: vLLM itself would leave it out in silence.
        """
        model = self.model_runner.get_model()
        manager, mapper = model.lora_manager, getattr(model, "hf_to_vllm_mapper", None)
        snapshot = _opened(folder, digest)
        # copies: vLLM keeps them, and a view would hold the file, which the learner writes over
        tensors = {f"base_model.model.{name}": tensor.clone() for name, tensor in snapshot_tensors(snapshot)}
        rank = next(len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A.weight"))
        adapters = LoRAModel.from_lora_tensors(
            ADAPTER_ID,
            tensors,
            PEFTHelper(r=rank, lora_alpha=alpha, target_modules=[]),
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            weights_mapper=mapper and mapper.get_rename_mapper(),
        )
        manager.remove_adapter(ADAPTER_ID)
        manager.add_adapter(adapters)
        homeless = sorted(adapters.loras.keys() - manager.modules.keys())
        if homeless:
            raise SnapshotError(f"vLLM has no place for adapters of {', '.join(homeless)}; set lora.targets")
        manager.activate_adapter(ADAPTER_ID)


def _opened(folder: str, digest: str) -> Snapshot:
    snapshot = Snapshot.open(Path(folder), version=0)
    if snapshot.digest != digest:
        raise SnapshotError(f"{folder} has become another snapshot: {snapshot.digest[:12]}")
    return snapshot


def _tied_layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Layers whose parameter belongs to an earlier layer: no tensor comes for them."""
    owners: dict[int, torch.nn.Module] = {}
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            if owners.setdefault(id(parameter), layer) is not layer:
                yield layer


def _is_short(layer: torch.nn.Module) -> bool:
    """Whether a layer under reload still waits for elements; rows that only pad the vocabulary do not count."""
    info = layerwise.get_layerwise_info(layer)
    if not info.can_load() or is_deferred_attention_layer(layer):
        return False
    expected = sum(get_tensor_load_numel(parameter) for parameter in layer.parameters(recurse=False))
    if isinstance(layer, VocabParallelEmbedding):
        expected -= layer.shard_indices.num_org_vocab_padding * layer.embedding_dim
    return bool(info.load_numel < expected)
