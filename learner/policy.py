"""The policy that is trained: a model under DeepSpeed with `logprobs`, `update` and access to its weights.

Runs in every learner rank; every method is collective unless it says otherwise. Which loss is used, in which order
things happen and what a version is, is the trainer's; what it has in common with the critic is in `trained_model.py`.

With `lora.rank` adapters are trained in place of the weights (learner/lora.py): moments, master weights, checkpoints
and publications are then of the adapters alone, and `Policy.base` has the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from learner.base import Base
from learner.batches import MicroBatch
from learner.deepspeed_engine import DeepSpeedEngine
from learner.lora import Adapters
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
        self,
        lm: PreTrainedModel,
        engine: DeepSpeedEngine,
        model_path: str,
        temperature: float,
        ranks: Ranks,
        adapters: Adapters | None,
        base: Base | None,
    ) -> None:
        # what is trained; a tied head is in it once, as the embedding
        super().__init__(list(lm.named_parameters()) if adapters is None else adapters.named, engine, ranks)
        self._lm = lm
        self._adapters = adapters
        self.base = base  # None: the weights themselves are trained
        self._model_path = model_path
        self._temperature = temperature

    @classmethod
    def open(cls, config: Config, model_path: str, ranks: Ranks) -> Policy:
        """Load the model and partition it.

        Raises ConfigError if model, `lora:` or `deepspeed:` settings cannot be used.
        """
        dtype = resolved_dtype(config.model.dtype, ranks.device)
        lm = load(model_path, dtype, ranks.device, config.model.trust_remote_code)
        adapters = Adapters(lm, config.lora, config.run.seed) if config.lora.rank else None
        model = PolicyModel(
            lm,
            config.learner.logprob_chunk_tokens,
            config.learner.gradient_checkpointing,
            entropy_gradient=config.algorithm.entropy_coef > 0,
        )
        model.check_reproduces()
        engine = DeepSpeedEngine(model, config.learner, dtype, config.deepspeed, ranks)
        base = Base(adapters.base, engine, config.model.trust_remote_code) if adapters else None
        return cls(lm, engine, model_path, config.sampling.temperature, ranks, adapters, base)

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

        with self._dropping():
            step = self._optimize(micro_batches, loss_of, learning_rate)
        return Update(**vars(step), logprobs=seen[: len(micro_batches)])

    def _forward(self, batch: MicroBatch, temperature: float | None) -> tuple[Tensor, Tensor]:
        heat = self._temperature if temperature is None else temperature
        return self._engine(batch.input_ids, batch.position_ids, batch.cuts, batch.positions, batch.targets, heat)

    def _token_outputs(self, batch: MicroBatch) -> Tensor:
        logprobs, _ = self._forward(batch, None)
        return logprobs

    def _dropping(self) -> AbstractContextManager[None]:
        """Dropout of adapters: others on each rank and in each step, and the same again after a resume."""
        if self._adapters is None:
            return nullcontext()
        return self._adapters.dropping(self.num_applied, self._ranks.rank)

    def without_adapters(self) -> AbstractContextManager[None]:
        """Local: inside, log-probabilities are the base's."""
        assert self._adapters is not None
        return self._adapters.disabled()

    # Weights.

    def owned(self) -> Iterator[tuple[str, int, Tensor]]:
        """Local: (name, first element, flat elements) that this rank writes; over the ranks each element comes once."""
        return self._engine.owned_of(self._named)

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weights that compute), whole, on every rank; each is valid until the next is asked for.

        Adapters are merged into the base.
        """
        if self._adapters is None or self.base is None:
            return self._engine.gathered(self._named)
        return self._adapters.merged(self.base.whole_weights(), self._trained())

    def _trained(self) -> dict[str, Tensor]:
        """Whole copies of what is trained."""
        return {name: whole.clone() for name, whole in self._engine.gathered(self._named)}

    def export(self, folder: Path) -> None:
        """Write what others load as it is: `hf/` for transformers and vLLM, the adapter for peft; rank 0 writes.

        With adapters, `hf/` has them merged, and `adapter/` is what peft puts on the base: that is the model of
        `model.path`, or `base/`.
        """
        self.save_pretrained(folder / "hf")
        if self._adapters is None or self.base is None:
            return
        trained = self._trained()
        if self._ranks.is_first:
            self._adapters.save(folder / "adapter", {name: tensor.cpu() for name, tensor in trained.items()})
        if not self.base.is_model_path:
            self._save(folder / "base", self.base.whole_weights())

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that transformers and vLLM load as it is, tokenizer included; rank 0 writes."""
        self._save(folder, self.whole_weights())

    def _save(self, folder: Path, model: Iterator[tuple[str, Tensor]]) -> None:
        weights = {}
        for name, whole in model:
            if self._ranks.is_first:
                weights[name] = whole.to("cpu", copy=True)
        if self._ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            self._lm.save_pretrained(folder, state_dict=weights)  # empties the dict
            copy_tokenizer(self._model_path, folder)
        self._ranks.barrier("save the model")

    def close(self) -> None:
        """Local: let go of master weights and moments; the policy is of no use afterwards."""
        self._engine.close()
