"""Adapters in a plain torch model, as hooks on its linear layers: the transformers engine's, and no library's.

Runs in the generator process. Written from the formula, so that the learner's peft and vLLM's kernels are held against
something that is neither: W x + alpha / rank * B A x, in the dtype of the model, never merged into W.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from actors.snapshot_tensors import snapshot_tensors
from protocol.errors import SnapshotError
from protocol.weights import Snapshot


class HookedAdapters:
    """One set of adapters on `model`, until the next is put in its place."""

    def __init__(self, model: nn.Module, alpha: float) -> None:
        self._model, self._alpha = model, alpha
        self._hooks: list[RemovableHandle] = []

    def put(self, snapshot: Snapshot) -> None:
        """Replace all adapters by those of `snapshot`. Raises SnapshotError if one has no place or no partner."""
        tensors = dict(snapshot_tensors(snapshot))
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        while tensors:
            name = next(iter(tensors)).rpartition(".lora_")[0]
            a, b = (tensors.pop(f"{name}.lora_{side}.weight", None) for side in "AB")
            if a is None or b is None:
                raise SnapshotError(
                    f"adapters are pairs of MODULE.lora_A.weight and lora_B.weight, half of {name!r} is"
                )
            self._hooks.append(self._hook(name, a, b))

    def _hook(self, name: str, a: Tensor, b: Tensor) -> RemovableHandle:
        """On the linear layer `name`: a [rank, in], b [out, rank]."""
        module = dict(self._model.named_modules()).get(name)
        if not isinstance(module, nn.Linear) or (*b.shape, a.shape[1]) != (
            len(module.weight),
            len(a),
            module.in_features,
        ):
            raise SnapshotError(f"the model has no linear layer {name} for adapters {tuple(a.shape)}, {tuple(b.shape)}")
        a, b = a.to(module.weight, copy=True), b.to(module.weight, copy=True)
        scale = self._alpha / len(a)

        def add(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + F.linear(F.linear(inputs[0], a), b) * scale

        return module.register_forward_hook(add)
