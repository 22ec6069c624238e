"""The policy that is trained: a model under DeepSpeed with `logprobs`, `update` and access to its weights.

Runs in every learner rank; every method is collective unless it says otherwise. Which loss is used, in which order
things happen and what a version is, is the trainer's; what it has in common with the critic is in `trained_model.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from learner.batches import MicroBatch
from learner.deepspeed_engine import DeepSpeedEngine
from learner.losses import LossAndSums
from learner.model import PolicyModel, copy_tokenizer, load
from learner.ranks import Ranks
from learner.trained_model import OptimizerStep, TrainedModel, padded, resolved_dtype
from protocol.config import Config

Loss = Callable[[Tensor, Tensor, MicroBatch], LossAndSums]
"""(log-probabilities [K], entropies [K], micro-batch) -> this micro-batch's part of the loss, and sums to add up.

The parts of all micro-batches on all ranks add up to the loss of the batch; a loss must stand K = 0.
"""


@dataclass(frozen=True)
class Update(OptimizerStep):
    """One optimizer step of the policy."""

    logprobs: Sequence[Tensor]  # [K] of this rank's micro-batches, under the weights from before the step


class Policy(TrainedModel):
    """Made by `Policy.open`."""

    def __init__(
        self, lm: PreTrainedModel, engine: DeepSpeedEngine, model_path: str, temperature: float, ranks: Ranks
    ) -> None:
        super().__init__(list(lm.named_parameters()), engine, ranks)  # a tied head is in it once, as the embedding
        self._lm = lm
        self._model_path = model_path
        self._temperature = temperature

    @classmethod
    def open(cls, config: Config, model_path: str, ranks: Ranks) -> Policy:
        """Load the model and partition it. Raises ConfigError if model or `deepspeed:` settings cannot be used."""
        dtype = resolved_dtype(config.model.dtype, ranks.device)
        lm = load(model_path, dtype, ranks.device, config.model.trust_remote_code)
        model = PolicyModel(
            lm,
            config.learner.logprob_chunk_tokens,
            config.learner.gradient_checkpointing,
            entropy_gradient=config.algorithm.entropy_coef > 0,
        )
        model.check_reproduces()
        engine = DeepSpeedEngine(model, config.learner, dtype, config.deepspeed, ranks)
        return cls(lm, engine, model_path, config.sampling.temperature, ranks)

    @property
    def model_config(self) -> PretrainedConfig:
        return self._lm.config

    @property
    def vocab_size(self) -> int:
        return int(self._lm.config.get_text_config().vocab_size)

    @property
    def zero_stage(self) -> int:
        return self._engine.stage

    # Training.

    def logprobs(self, micro_batches: Sequence[MicroBatch], temperature: float | None = None) -> list[Tensor]:
        """Log-probabilities [K] of each micro-batch under the current weights. `temperature` None: that of sampling."""
        return [logprobs for logprobs, _ in self.logprobs_and_entropies(micro_batches, temperature)]

    @torch.no_grad()
    def logprobs_and_entropies(
        self, micro_batches: Sequence[MicroBatch], temperature: float | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Both [K], of each micro-batch, without gradient."""
        everywhere, _ = padded(micro_batches, self._ranks)
        return [self._forward(batch.to(self._ranks.device), temperature) for batch in everywhere][: len(micro_batches)]

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: Loss,
        learning_rate: float,
        temperature: float | None = None,
    ) -> Update:
        """One optimizer step, as `TrainedModel` makes it. `temperature` None: that of sampling."""
        seen: list[Tensor] = []

        def loss_of(batch: MicroBatch) -> LossAndSums:
            logprobs, entropies = self._forward(batch, temperature)
            seen.append(logprobs.detach())
            return loss(logprobs, entropies, batch)

        step = self._optimize(micro_batches, loss_of, learning_rate)
        return Update(**vars(step), logprobs=seen[: len(micro_batches)])

    def _forward(self, batch: MicroBatch, temperature: float | None) -> tuple[Tensor, Tensor]:
        heat = self._temperature if temperature is None else temperature
        return self._engine(batch.input_ids, batch.position_ids, batch.cuts, batch.positions, batch.targets, heat)

    def _token_outputs(self, batch: MicroBatch) -> Tensor:
        logprobs, _ = self._forward(batch, None)
        return logprobs

    # Weights.

    def owned(self) -> Iterator[tuple[str, int, Tensor]]:
        """Local: (name, first element, flat elements) that this rank writes; over the ranks each element comes once."""
        for name, parameter in self._named:
            owned = self._engine.owned(parameter)
            if owned is not None:
                yield name, *owned

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weights that compute), whole, on every rank; each is valid until the next is asked for."""
        yield from self._engine.gathered(self._named)

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that transformers and vLLM load as it is, tokenizer included; rank 0 writes."""
        weights = {}
        for name, whole in self.whole_weights():
            if self._ranks.is_first:
                weights[name] = whole.to("cpu", copy=True)
        if self._ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            self._lm.save_pretrained(folder, state_dict=weights)  # empties the dict
            copy_tokenizer(self._model_path, folder)
        self._ranks.barrier("save the model")
