"""Random adapters of a tiny model, their snapshots, and the model that computes the same without them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from protocol.weights import Snapshot
from tests.models import snapshot_from

RANK, ALPHA = 6, 9.0  # 6: vLLM's room is 8


def random_adapters(model: Qwen2ForCausalLM, seed: int) -> dict[str, Tensor]:
    """For every linear layer but the head."""
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            adapters[f"{name}.lora_A.weight"] = torch.randn(RANK, module.in_features, generator=generator) * 0.14
            adapters[f"{name}.lora_B.weight"] = torch.randn(module.out_features, RANK, generator=generator) * 0.1
    return adapters


@torch.no_grad()
def merged(model: Qwen2ForCausalLM, adapters: Mapping[str, Tensor]) -> Qwen2ForCausalLM:
    """W + alpha / rank * B A in float64, with B A as a sum of outer products."""
    whole = copy.deepcopy(model).double()
    for name, a in adapters.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            b = adapters[f"{module}.lora_B.weight"]
            for k in range(RANK):
                whole.get_submodule(module).weight += ALPHA / RANK * torch.outer(b[:, k].double(), a[k].double())
    return whole


def adapters_snapshot(adapters: Mapping[str, Tensor], base: Snapshot, folder: Path, version: int) -> Snapshot:
    """It carries its base along, for engines that do not hold it."""
    return snapshot_from(adapters, folder, version, base)
