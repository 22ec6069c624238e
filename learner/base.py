"""The base: the weights below the adapters of a run. Nothing trains them, so they are published once.

Runs in every learner rank, where `lora.rank` is not 0; every method is collective unless it says otherwise. The base is
the model of `model.path`, or what a supervised warm start made of it (`take`). Then every checkpoint has it, too: a
folder that transformers loads, and on which peft can put the checkpoint's adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from learner.deepspeed_engine import DeepSpeedEngine
from learner.model import load

if TYPE_CHECKING:
    from learner.policy import Policy


class Base:
    """Part of a `Policy` with adapters. `named`: parameters by the names they have without adapters."""

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], engine: DeepSpeedEngine, trust_remote_code: bool
    ) -> None:
        self._named, self._engine, self._trust_remote_code = named, engine, trust_remote_code
        self.is_model_path = True  # False: not those of `model.path` any more

    def layout(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Local: (name, dtype, shape) of every parameter."""
        return self._engine.layout(self._named)

    def owned(self) -> Iterator[tuple[str, int, Tensor]]:
        """Local: as `Policy.owned`."""
        return self._engine.owned_of(self._named)

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weight), whole, on every rank; each is valid until the next is asked for."""
        return self._engine.gathered(self._named)

    def take(self, policy: Policy) -> None:
        """Become the weights of `policy`, which has no adapters."""
        self._set(policy.whole_weights())

    def restore(self, folder: Path) -> None:
        """Become the model that a checkpoint has in `folder`; every rank reads it."""
        dtype = self._named[0][1].dtype
        lm = load(str(folder), dtype, torch.device("cpu"), self._trust_remote_code)
        self._set(iter(lm.named_parameters()))

    @torch.no_grad()
    def _set(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        for (name, own), (given, weight) in zip(self._engine.opened(self._named), weights, strict=True):
            assert name == given
            own.copy_(weight)
        self.is_model_path = False
