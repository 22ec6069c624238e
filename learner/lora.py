"""LoRA: small adapters that are trained beside weights that stay as they are. The only file that imports peft.

Runs in every learner rank. A linear layer W x becomes W x + alpha / rank * B A x (Hu et al. 2021, section 4.1).
A [rank, in] is drawn from the run's seed, alike on all ranks; B [out, rank] is 0 at first, so a run starts from its
base model. That log-probabilities are never computed with dropout rests on `PolicyModel`, which turns every dropout
off, and on `dropping`, the only place that turns it on again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from protocol.algorithm import LoraConfig
from protocol.errors import ConfigError

ALL_LINEAR = "all-linear"
PEFT_PREFIX = "base_model.model."  # of every name in a file that peft reads


class Adapters:
    """The adapters of one model, put into it by the constructor; only they have a gradient from then on.

    Raises ConfigError if `settings.targets` names what cannot have one.
    """

    def __init__(self, lm: PreTrainedModel, settings: LoraConfig, seed: int) -> None:
        self._scale = settings.alpha / settings.rank
        self._dropout = settings.dropout
        self._seed = seed
        self._config = PeftConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=target_modules(lm, settings.targets),
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)
        inject_adapter_in_model(self._config, lm)
        self._layers = [module for module in lm.modules() if isinstance(module, LoraLayer)]
        parameters = list(lm.named_parameters())
        self.named = [(name.replace(".default.", "."), p) for name, p in parameters if p.requires_grad]
        """What is trained: MODULE.lora_A.weight [rank, in] and MODULE.lora_B.weight [out, rank]."""
        self.base = [(name.replace(".base_layer.", "."), p) for name, p in parameters if not p.requires_grad]
        """What stays, by the names that it has without adapters."""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is its base."""
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)

    @contextmanager
    def dropping(self, *moment: int) -> Iterator[None]:
        """Inside, forward and backward passes drop inputs of adapters; the same ones at the same `moment`."""
        if not self._dropout:
            yield
            return
        torch.manual_seed(int(np.random.SeedSequence([self._seed, *moment]).generate_state(1)[0]))
        self._set_dropout(self._dropout)
        try:
            yield
        finally:
            self._set_dropout(0.0)

    def _set_dropout(self, rate: float) -> None:
        for layer in self._layers:
            for dropout in layer.lora_dropout.values():
                dropout.p = rate

    def merged(self, base: Iterable[tuple[str, Tensor]], trained: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, weight) of the model without adapters that computes what `base` and `trained` do together.

        The sum is made in float32 and rounded once, to the dtype of the weight.
        """
        for name, weight in base:
            module = name.removesuffix(".weight")
            a, b = (trained.get(f"{module}.lora_{side}.weight") for side in "AB")
            if a is not None and b is not None:
                product = b.to(weight.device).float() @ a.to(weight.device).float()
                weight = (weight.float() + self._scale * product).to(weight.dtype)
            yield name, weight

    def save(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Local: write a folder that `PeftModel.from_pretrained` loads on top of the base model."""
        folder.mkdir(parents=True)
        self._config.inference_mode = True
        self._config.save_pretrained(folder)
        tensors = {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in trained.items()}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def target_modules(lm: PreTrainedModel, wanted: str) -> Sequence[str]:
    """What `lora.targets` names, as ends of modules' names. Raises ConfigError if one is no linear layer."""
    head = lm.get_output_embeddings()
    linear = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear) and module is not head]
    known = sorted({name.rpartition(".")[2] for name in linear})
    if wanted == ALL_LINEAR:
        return known
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module in linear):
            raise ConfigError(
                f"lora.targets must be {ALL_LINEAR} or name linear layers other than the output head, got {name!r}; "
                f"{type(lm).__name__} has {', '.join(known)}"
            )
    return names
