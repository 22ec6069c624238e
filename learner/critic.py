"""The critic of PPO: a second model that learns what the rest of a completion will be rewarded with.

Runs in every learner rank; every method is collective unless it says otherwise. A transformer of its own with a value
head, its own DeepSpeed engine and AdamW, at the policy's ZeRO stage and with its gradient clipping, betas and weight
decay. How it learns is `value_loss.py`; what its values are for is `returns.py`. That a value knows nothing of the
token it belongs to rests on `MicroBatch.positions`.

Legend: T packed input tokens of a micro-batch, K tokens of it inside the loss, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.batches import MicroBatch
from learner.deepspeed_engine import DeepSpeedEngine
from learner.losses import LossAndSums
from learner.model import PackedModel, load
from learner.policy import Policy
from learner.ranks import Ranks
from learner.trained_model import OptimizerStep, TrainedModel, padded, resolved_dtype
from protocol.config import Config

Loss = Callable[[Tensor, MicroBatch], LossAndSums]
"""(values [K], micro-batch) -> this micro-batch's part of the loss, and sums to add up; see `policy.Loss`."""


class ValueHead(nn.Linear):
    """Hidden states [K, D] -> values [K], in float32 whatever the weights are kept in.

    It starts at zero, so the first values are 0 whatever the hidden states are: the first advantages are those without
    a critic, no random number has to be the same on all ranks, and the backbone's first gradient is 0.
    """

    def __init__(self, hidden_size: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, 1, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float(), self.bias.float())[:, 0]


class CriticModel(PackedModel):
    """A transformer without its language head, and a value head, as one module with one forward."""

    def __init__(self, backbone: PreTrainedModel, gradient_checkpointing: bool) -> None:
        super().__init__(backbone, gradient_checkpointing)
        size = backbone.config.get_text_config().hidden_size
        self.head = ValueHead(size, backbone.device, backbone.dtype)

    def forward(self, input_ids: Tensor, position_ids: Tensor, cuts: tuple[int, ...], positions: Tensor) -> Tensor:
        """Values [K] of the states at `positions` [K] of the row [1, T]: what was read up to there, that included."""
        values: Tensor = self.head(self.hidden(input_ids, position_ids, cuts, positions))
        return values


class Critic(TrainedModel):
    """Made by `Critic.open`."""

    @classmethod
    def open(cls, config: Config, ranks: Ranks) -> Critic:
        """Load the backbone, without its language head, and partition it. Raises ConfigError if it cannot be used.

        A parameter's name is that in a Hugging Face model for token classification of the same architecture; those of
        the backbone are the policy's, where it has the policy's model.
        """
        dtype = resolved_dtype(config.model.dtype, ranks.device)
        path, setting = (config.critic.path, "critic.path") if config.critic.path else (config.model.path, "model.path")
        backbone = load(path, dtype, ranks.device, config.model.trust_remote_code, setting).base_model
        model = CriticModel(backbone, config.learner.gradient_checkpointing)
        named = [(f"{backbone.base_model_prefix}.{name}", weight) for name, weight in backbone.named_parameters()]
        named += [(f"score.{name}", weight) for name, weight in model.head.named_parameters()]
        engine = DeepSpeedEngine(model, config.learner, dtype, config.deepspeed, ranks)
        return cls(named, engine, ranks)

    @torch.no_grad()
    def values(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Values [K] of each micro-batch, float32: of each token that of the state before it, where it is predicted."""
        everywhere, _ = padded(micro_batches, self._ranks)
        found = [self._token_outputs(batch.to(self._ranks.device)) for batch in everywhere]
        return found[: len(micro_batches)]

    def update(self, micro_batches: Sequence[MicroBatch], loss: Loss, learning_rate: float) -> OptimizerStep:
        """One optimizer step, as `TrainedModel` makes it."""
        return self._optimize(micro_batches, lambda batch: loss(self._token_outputs(batch), batch), learning_rate)

    def start_from(self, policy: Policy) -> None:
        """The backbone becomes the policy's, as it computes; for a critic that has not learned yet."""
        backbone = dict(self._named)
        self._engine.begin_restore(0)
        for name, weight in policy.whole_weights():
            if name in backbone:  # all but the language head
                self._engine.restore(backbone[name], {"fp32": weight.float()})
        self._engine.end_restore()

    def _token_outputs(self, batch: MicroBatch) -> Tensor:
        values: Tensor = self._engine(batch.input_ids, batch.position_ids, batch.cuts, batch.positions)
        return values
