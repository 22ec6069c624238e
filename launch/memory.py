"""Who takes how much of a card that learner and generators share. Pure; called by `launch/plan.py`.

Exact, and held against DeepSpeed's own tensors by a test: weights, master copy, moments and gradients of a learner of
one rank; reference and critic are the same arithmetic. A reward model's weights are counted in its files, once for
each generator, whose worker loads it. vLLM's share is exact because it is told to take it
(vllm.gpu_memory_utilization, a part of the whole card), and so are its weights and the cache in it. Rules of thumb,
marked ~: activations, logits, what vLLM needs to compute, and what driver and libraries take. That a run which surely
does not fit never starts rests on `MemorySplit.check`; one that passes may still run out of memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.model_shape import ModelShape
from protocol.config import Config
from protocol.errors import PreflightError

GIB = 1 << 30
CONTEXT_BYTES = GIB // 2
"""What driver, kernels and collective library take for each process, about."""
GRAPHS_BYTES = GIB
"""What vLLM's captured graphs take, about."""
PROFILED_TOKENS = 8192
"""Tokens that vLLM puts through the model at once where vllm.max_num_batched_tokens does not say, about."""


@dataclass(frozen=True, slots=True)
class Part:
    what: str
    size: int  # bytes
    is_exact: bool = True


@dataclass(frozen=True, slots=True)
class RewardModelSize:
    num_parameters: int
    shape: ModelShape | None  # None: of a family that is not known, so that what a forward takes is not either


@dataclass(frozen=True, slots=True)
class GeneratorShare:
    """One generator's part of the card."""

    budget_bytes: int
    weights_bytes: int
    compute_bytes: int  # a rule of thumb
    cache_bytes: int  # what is left; negative if nothing is, by that rule


def itemsize(config: Config) -> int:
    """Bytes of a number that an accelerator computes with: auto is bfloat16 there."""
    return 4 if config.model.dtype == "float32" else 2


def generator_share(config: Config, shape: ModelShape, budget: int) -> GeneratorShare:
    """How vLLM divides `budget` bytes."""
    tokens = int(config.vllm.get("max_num_batched_tokens", PROFILED_TOKENS))
    width = 2 * shape.intermediate + 4 * shape.hidden
    logits = 2 * 4 * config.generators.max_running * shape.vocabulary
    graphs = 0 if config.vllm.get("enforce_eager") else GRAPHS_BYTES
    compute = tokens * width * itemsize(config) + logits + graphs
    weights = shape.num_parameters * itemsize(config)
    return GeneratorShare(budget, weights, compute, budget - weights - compute)


def training_parts(trained: int, frozen: int, config: Config) -> list[Part]:
    """What DeepSpeed keeps on one rank, at its largest, of a model with so many parameters."""
    item = itemsize(config)
    stage = max(1, config.learner.zero) if item == 2 else config.learner.zero  # as the learner does
    shared = config.learner.ranks if stage else 1
    whole = trained + frozen
    master = 4 * trained // shared if stage else 0  # at ZeRO 0 the weights themselves are float32
    sums = 4 * trained if stage < 2 else 4 * trained // shared
    sums += 2 * trained if stage == 1 and item == 2 else 0  # each bfloat16 gradient, until it is added to its sum
    return [
        Part("weights", whole * item // (shared if stage == 3 else 1)),
        Part("master copy", master),
        Part("moments", 8 * trained // shared),
        Part("gradients", sums),
    ]


def learner_parts(config: Config, shape: ModelShape) -> list[Part]:
    """All that one rank takes. A critic of another model is taken to be as large as the policy."""
    rank, whole = config.lora.rank, shape.num_parameters
    trained = shape.num_adapter_parameters(rank, config.lora.targets) if rank else whole
    parts = training_parts(trained, whole if rank else 0, config)
    if config.kl.coef and not rank:
        parts.append(
            Part("reference", whole * itemsize(config) // (config.learner.ranks if config.learner.zero == 3 else 1))
        )
    if config.algorithm.advantage == "gae":
        size = whole - shape.num_head_parameters + shape.hidden + 1
        kept = sum(part.size for part in training_parts(size, 0, config))
        parts.append(Part("critic", kept, is_exact=not config.critic.path))
    if config.warmup.steps and rank:  # all weights are warmed, in a policy of its own
        parts.append(Part("warm start", sum(part.size for part in training_parts(whole, 0, config))))
    tokens = max(config.learner.micro_batch_tokens, config.data.max_prompt_tokens + config.sampling.max_tokens)
    kept = tokens * _activations_per_token(config, shape) * itemsize(config)
    chunk = 3 * 4 * min(tokens, config.learner.logprob_chunk_tokens) * shape.vocabulary
    return [*parts, Part("activations", kept, False), Part("logits", chunk, False)]


def reward_model_parts(config: Config, size: RewardModelSize | None) -> list[Part]:
    """What the worker of one generator takes of the card; nothing if there is no reward model, or it is elsewhere."""
    settings = config.rewards.model
    if size is None or settings.device == "cpu":
        return []
    item = 4 if settings.dtype == "float32" else 2
    parts = [Part("weights", size.num_parameters * item)]
    if size.shape is not None:
        longest = settings.max_tokens or config.data.max_prompt_tokens + config.sampling.max_tokens
        width = 2 * size.shape.intermediate + 4 * size.shape.hidden
        parts.append(Part("compute", settings.batch_size * longest * width * item, is_exact=False))
    return parts


def _activations_per_token(config: Config, shape: ModelShape) -> int:
    """Numbers that the backward pass needs of one token, about; with checkpoints those of one layer and all borders."""
    attention = (3 * shape.heads + 4 * shape.kv_heads) * shape.head_size
    layer = 8 * shape.hidden + attention + 4 * shape.intermediate
    if config.learner.gradient_checkpointing:
        return shape.layers * shape.hidden + layer
    return shape.layers * layer


@dataclass(frozen=True, slots=True)
class MemorySplit:
    """One card, shared by the learner and all generators."""

    card_bytes: int  # 0: not known
    num_generators: int
    utilization: float  # what part of the card one generator takes
    learner: Sequence[Part] = ()  # empty: the model's size is not known
    generator: GeneratorShare | None = None
    cache_tokens: int = 0  # that fit into the cache of one generator
    reward_model: Sequence[Part] = ()  # of one generator's worker
    num_reward_models: int = 0
    has_adapters: bool = False

    @classmethod
    def of(
        cls, config: Config, shape: ModelShape | None, card_bytes: int, reward_model: RewardModelSize | None = None
    ) -> MemorySplit:
        count = config.generators.count if config.generators.engine == "vllm" else 0
        utilization = float(config.vllm.get("gpu_memory_utilization", 0.0))
        if shape is None:
            return cls(card_bytes, count, utilization)
        share = generator_share(config, shape, int(utilization * card_bytes))
        if "kv_cache_memory_bytes" in config.vllm:
            cache = int(config.vllm["kv_cache_memory_bytes"])
            share = replace(share, cache_bytes=cache, budget_bytes=share.weights_bytes + share.compute_bytes + cache)
        tokens = max(0, share.cache_bytes) // (shape.cache_elements_per_token * itemsize(config))
        scores = reward_model_parts(config, reward_model)
        copies = config.generators.count if scores else 0
        parts, has_adapters = learner_parts(config, shape), config.lora.rank > 0
        return cls(card_bytes, count, utilization, parts, share, tokens, scores, copies, has_adapters)

    @property
    def needed(self) -> int:
        """Bytes that the learner surely takes."""
        return sum(part.size for part in self.learner if part.is_exact)

    @property
    def scoring(self) -> int:
        """Bytes that reward models surely take."""
        return self.num_reward_models * sum(part.size for part in self.reward_model if part.is_exact)

    def check(self) -> None:
        """Raises PreflightError, naming what to set, if this surely does not fit."""
        if not self.card_bytes or self.generator is None:
            return
        card, smaller = gib(self.card_bytes), "take a smaller model, or leave --share-gpu out"
        smaller = smaller if self.has_adapters else f"set lora.rank 16, {smaller}"
        scored, beside = "", self.needed + self.scoring
        if self.scoring:
            smaller = f"set rewards.model.device cpu, {smaller}"
            scored = f" and the reward model's weights, {gib(self.scoring)},"
        weights, count = self.generator.weights_bytes, self.num_generators
        if beside + count * weights > self.card_bytes:
            also = f", the reward model's {gib(self.scoring)}" if self.scoring else ""
            raise PreflightError(
                f"--share-gpu: expected learner and generators to fit on one card of {card}, but weights and optimizer "
                f"of the learner take {gib(self.needed)} and the generators' weights {gib(count * weights)}{also}; "
                f"{smaller}"
            )
        budget = self.generator.budget_bytes
        if count and weights >= budget:
            raise PreflightError(
                f"--share-gpu: expected a generator's weights, {gib(weights)}, to fit into its share of the card, "
                f"{gib(budget)} of {card}; set vllm.gpu_memory_utilization higher than {self.utilization:g}, or fewer "
                "--generators"
            )
        if beside + count * budget > self.card_bytes:
            most = math.floor(100 * (self.card_bytes - beside) / self.card_bytes / count) / 100
            raise PreflightError(
                f"--share-gpu: expected the learner's weights and optimizer, {gib(self.needed)},{scored} to fit beside "
                f"the generators' share, {gib(count * budget)} of {card}; set vllm.gpu_memory_utilization to "
                f"{most:.2f} or less, or {smaller}"
            )

    def notes(self) -> tuple[tuple[str, str], ...]:
        """(whose part, sentence) of the card, for the console."""
        size = gib(self.card_bytes) if self.card_bytes else "of unknown size"
        each = f"{self.utilization:g} of the card for each of {self.num_generators} (vllm.gpu_memory_utilization)"
        if self.generator is None or not self.card_bytes:
            whose = "the card's" if self.generator else "the model's"
            return (
                ("memory", f"one card, {size}; {whose} size is not known here, so nothing is checked"),
                ("  generator", each),
            )
        learner = sum(part.size for part in self.learner)
        scoring = self.num_reward_models * sum(part.size for part in self.reward_model)
        contexts = CONTEXT_BYTES * (1 + self.num_generators + self.num_reward_models)
        share = self.generator
        left = self.card_bytes - learner - self.num_generators * share.budget_bytes - scoring - contexts
        lower = "" if left > 0 else "; too little, if they hold: set learner.micro_batch_tokens lower"
        divided = [Part("weights", share.weights_bytes), Part("KV cache", share.cache_bytes)]
        divided.append(Part("compute", share.compute_bytes, is_exact=False))
        whose = f"{self.num_reward_models} {'generator' if self.num_reward_models == 1 else 'generators'}"
        notes = [
            ("memory", f"one card, {size}; ~: a rule of thumb"),
            ("  learner", f"{gib(learner)}: {_listed(self.learner)}"),
            ("  generator", f"{gib(share.budget_bytes)}, {each}: {_listed(divided)}; {self.cache_tokens:,} tokens"),
            ("  scoring", f"{gib(scoring)}, a reward model for each of {whose}: {_listed(self.reward_model)}"),
            ("  left", f"~{gib(left)}, after ~{gib(contexts)} of driver and libraries{lower}"),
        ]
        there = (True, True, bool(self.num_generators), bool(self.num_reward_models), True)
        return tuple(itertools.compress(notes, there))


def gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _listed(parts: Sequence[Part]) -> str:
    shown = [part for part in parts if part.size]
    return ", ".join(f"{part.what} {'' if part.is_exact else '~'}{part.size / GIB:.2f}" for part in shown)
