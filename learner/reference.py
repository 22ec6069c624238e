"""The reference model: what the KL keeps the policy near. Loaded only where `kl.coef` is not 0.

Runs in every learner rank; every method is collective. It is the model that reinforcement learning starts from, and
nothing trains it: it stays as it is, or follows the policy slowly (`follow`). Where it is not simply the model of
`model.path` it is in the checkpoint. With adapters it needs no weights of its own (`BaseReference`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from learner.batches import MicroBatch
from learner.deepspeed_engine import FrozenEngine
from learner.model import PolicyModel, load
from learner.policy import Policy
from learner.ranks import Ranks
from learner.trained_model import padded, resolved_dtype
from protocol.config import Config


class Reference:
    """Made by `Reference.open`."""

    num_applied = 0  # of its optimizer's steps: it has none

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], engine: FrozenEngine, temperature: float, ranks: Ranks
    ) -> None:
        self._named, self._engine, self._temperature, self._ranks = named, engine, temperature, ranks

    @classmethod
    def open(cls, config: Config, model_path: str, ranks: Ranks) -> Reference:
        """Load the model a second time; under ZeRO 3 it is partitioned as the policy is."""
        dtype = resolved_dtype(config.model.dtype, ranks.device)
        lm = load(model_path, dtype, ranks.device, config.model.trust_remote_code)
        named = list(lm.named_parameters())
        module = PolicyModel(lm, config.learner.logprob_chunk_tokens, gradient_checkpointing=False)
        return cls(named, FrozenEngine(module, config.learner, dtype), config.sampling.temperature, ranks)

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probabilities [K] of each micro-batch at the temperature of sampling."""
        found = []
        for batch in padded(micro_batches, self._ranks)[0]:
            batch = batch.to(self._ranks.device)
            inputs = (batch.input_ids, batch.position_ids, batch.cuts, batch.positions, batch.targets)
            found.append(self._engine(*inputs, self._temperature)[0])
        return found[: len(micro_batches)]

    @torch.no_grad()
    def follow(self, policy: Policy, rate: float, seed: int = 0) -> None:
        """Each weight becomes rate * policy + (1 - rate) * reference.

        TR-DPO's soft update (Gorbatovski et al. 2024, eq. 5), as TRL's ref_model_mixup_alpha; rate 1 copies the policy.
        In bfloat16 two weights are often neighbours, and the nearest number to what lies between them is always the
        same one of the two; so the result is rounded up or down by chance, right in the mean, equally on all ranks.
        """
        chance = torch.Generator(self._ranks.device).manual_seed(seed)
        pairs = zip(self._engine.opened(self._named), policy.whole_weights(), strict=True)
        for (name, own), (of_policy, weight) in pairs:
            assert name == of_policy
            mixed = own.float().lerp_(weight.float(), rate)
            own.copy_(mixed if own.dtype == torch.float32 or rate == 1 else rounded_by_chance(mixed, chance))

    # What a checkpoint holds of it.

    def layout(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Local: (name, dtype, shape) of every parameter."""
        return [(name, str(p.dtype).removeprefix("torch."), self._engine.shape(p)) for name, p in self._named]

    def training_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, weights as "fp32"), whole, on every rank; one parameter at a time."""
        for name, weight in self._engine.opened(self._named):
            yield name, {"fp32": weight.float()}

    @torch.no_grad()
    def restore(self, num_applied: int, read: Callable[[str], Mapping[str, Tensor]]) -> None:
        """Set what `training_state` gave; `read` gives it by parameter name."""
        assert num_applied == self.num_applied
        for name, weight in self._engine.opened(self._named):
            weight.copy_(read(name)["fp32"])


class BaseReference:
    """The reference of a policy with adapters: its own forward pass, with the adapters switched off."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """As `Reference.logprobs`."""
        with self._policy.without_adapters():
            return self._policy.logprobs(micro_batches)


def rounded_by_chance(values: Tensor, chance: torch.Generator) -> Tensor:
    """Float32 numbers to one of their two neighbours in bfloat16, the nearer one with the greater probability."""
    noise = torch.randint(0, 1 << 16, values.shape, generator=chance, dtype=torch.int32, device=values.device)
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()
