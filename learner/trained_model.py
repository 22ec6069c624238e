"""What policy and critic have in common: a module under DeepSpeed that learns, and what training goes on from.

Runs in every learner rank; every method is collective unless it says otherwise. What a forward pass gives and which
loss is used is the model's own. That a step with a non-finite loss or gradient changes nothing on any rank, and that
ranks with unlike numbers of micro-batches make one step together, rests on `TrainedModel._optimize`.

Legend: K tokens inside the loss of one micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from learner.batches import MicroBatch, empty_micro_batch
from learner.deepspeed_engine import DeepSpeedEngine
from learner.losses import LossAndSums
from learner.ranks import Ranks


@dataclass(frozen=True)
class OptimizerStep:
    """What one optimizer step was; equal on all ranks."""

    applied: bool  # False: loss or gradient was not finite, and nothing changed
    grad_norm: float  # before clipping
    sums: Mapping[str, float]  # the loss function's, over all ranks, and "loss"
    num_micro_batches: int  # of each rank


class TrainedModel(ABC):
    """`named`: the parameters by the names that a checkpoint has for them."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], engine: DeepSpeedEngine, ranks: Ranks) -> None:
        self._named, self._engine, self._ranks = named, engine, ranks

    @abstractmethod
    def _token_outputs(self, batch: MicroBatch) -> Tensor:
        """A number [K] of each token, with its gradient."""

    def _optimize(
        self,
        micro_batches: Sequence[MicroBatch],
        loss_of: Callable[[MicroBatch], LossAndSums],
        learning_rate: float,
    ) -> OptimizerStep:
        """One optimizer step on the batch that all ranks' micro-batches make.

        `loss_of` does the forward pass. Ranks may bring different numbers of micro-batches; one with fewer runs empty
        ones, because backward is a collective.
        """
        everywhere, count = padded(micro_batches, self._ranks)
        totals: dict[str, Tensor] = {}
        for batch in everywhere:
            part, sums = loss_of(batch.to(self._ranks.device))
            self._engine.backward(part)
            sums |= {"loss": part.detach(), "non_finite": ~part.detach().isfinite()}
            totals = {name: value.double() + totals.get(name, 0.0) for name, value in sums.items()}
        values = torch.stack(list(totals.values())).tolist()  # the step's only wait for the device
        reduced = self._ranks.sum_across(dict(zip(totals, values, strict=True)))
        if reduced.pop("non_finite"):
            self._poison()
        norm, applied = self._engine.step(learning_rate)
        return OptimizerStep(applied, norm, reduced, count)

    def _poison(self) -> None:
        """Make the gradient NaN, so that the engine drops it: a loss may be infinite while its gradient is finite."""
        one = torch.zeros(1, dtype=torch.int64)
        batch = replace(empty_micro_batch(), positions=one, targets=one).to(self._ranks.device)
        self._engine.backward(self._token_outputs(batch).sum() * torch.nan)

    def reset_optimizer(self) -> None:
        """Local: forget the moments; the weights stay."""
        self._engine.reset_moments()

    # What a checkpoint holds of it.

    @property
    def num_applied(self) -> int:
        """Local: steps that AdamW has taken."""
        return self._engine.num_applied

    def layout(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Local: (name, dtype, shape) of every parameter, in one order everywhere."""
        return self._engine.layout(self._named)

    def training_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, float32 weights and moments by key), whole, on every rank; one parameter at a time."""
        for name, parameter in self._named:
            yield name, self._engine.training_state(parameter)

    def restore(self, num_applied: int, read: Callable[[str], Mapping[str, Tensor]]) -> None:
        """Set what `training_state` gave; `read` gives it by parameter name."""
        self._engine.begin_restore(num_applied)
        for name, parameter in self._named:
            self._engine.restore(parameter, read(name))
        self._engine.end_restore()


def padded(micro_batches: Sequence[MicroBatch], ranks: Ranks) -> tuple[list[MicroBatch], int]:
    """As many micro-batches as the rank with the most has, and how many that are; collective."""
    count = max(1, int(ranks.max_across({"micro_batches": len(micro_batches)})["micro_batches"]))
    return [*micro_batches, *[empty_micro_batch()] * (count - len(micro_batches))], count


def resolved_dtype(setting: str, device: torch.device) -> torch.dtype:
    """What "auto" means: bfloat16 on accelerators, float32 on a CPU."""
    if setting == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[setting]
