"""A whole run's settings, and which of them exclude each other. Nothing here imports a heavy library.

What each means: `protocol/sections.py`, `protocol/algorithm.py`.
Defaults < recipe < environment (TETHER__LEARNER__LEARNING_RATE) < flags (--learner.learning_rate);
`protocol/settings.py` merges them. Engine settings pass through verbatim under `vllm:` and `deepspeed:`.
`Config.result_digest` is what both ends of a connection compare: it covers what changes results, nothing else.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import Field, model_validator

from protocol.algorithm import GROUP_RELATIVE, AlgorithmConfig, CorrectionsConfig, CriticConfig, KlConfig, LoraConfig
from protocol.brought_code import shown_name
from protocol.fields import MAX_NAME, MAX_REWARDS
from protocol.rewards import names_in_results, scored_by
from protocol.rollouts import SINGLE_TURN
from protocol.sections import (
    AtBound,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GeneratorConfig,
    LearnerConfig,
    ModelConfig,
    NetworkConfig,
    RewardConfig,
    RewardsConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    Section,
    StalenessConfig,
    WarmupConfig,
    WatchdogConfig,
)
from protocol.types import SamplingParams

CHANGES_RESULTS = ("model", "sampling", "rollout", "rewards", "batch", "algorithm", "data", "lora")
"""Sections that change what a completion or its reward is."""
CHANGES_EVALUATIONS = ("samples", "temperature", "max_tokens", "rewards")
"""Of the evaluation's settings, likewise."""


class Config(Section):
    """A whole run. P = batch.prompts, G = batch.group_size, S = staleness.max, T = steps_for(rows)."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    batch: BatchConfig = BatchConfig()
    sampling: SamplingConfig = SamplingConfig()
    staleness: StalenessConfig = StalenessConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    kl: KlConfig = KlConfig()
    corrections: CorrectionsConfig = CorrectionsConfig()
    critic: CriticConfig = CriticConfig()
    lora: LoraConfig = LoraConfig()
    learner: LearnerConfig = LearnerConfig()
    generators: GeneratorConfig = GeneratorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    warmup: WarmupConfig = WarmupConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    network: NetworkConfig = NetworkConfig()
    run: RunConfig = RunConfig()
    vllm: dict[str, Any] = Field(default={})
    """Passed verbatim to vLLM's AsyncEngineArgs."""
    deepspeed: dict[str, Any] = Field(default={})
    """Merged verbatim into DeepSpeed's config."""

    @model_validator(mode="after")
    def _cross_field_rules(self) -> Config:
        for key in ("top_p", "top_k", "min_p"):
            if key in self.vllm:
                raise ValueError(
                    f"truncated sampling (vllm.{key}) is refused for training: the learner cannot reproduce the "
                    f"truncated distribution, so every ratio would be biased; remove vllm.{key}"
                )
        self._algorithm_rules()
        self._kl_rules()
        if not scored_by(self):
            raise ValueError(
                "at least one reward is needed, got none; set rewards.functions or --reward NAME, --reward-model, or "
                "rollout.weight for a rollout that gives one"
            )
        if self.rollout.use == SINGLE_TURN and self.rollout.weight is not None:
            raise ValueError(
                f"a single turn gives no reward of its own to weigh, got rollout.weight {self.rollout.weight:g}; set "
                "rollout.use to one that does, or leave rollout.weight out"
            )
        self._check_rewards_fit_a_result()
        self._evaluation_rules()
        return self

    def _algorithm_rules(self) -> None:
        algorithm, corrections = self.algorithm, self.corrections
        if algorithm.advantage in GROUP_RELATIVE and self.batch.group_size < 2:
            raise ValueError(
                f"group_size must be at least 2 for group-relative advantages, got {self.batch.group_size}; "
                "set batch.group_size"
            )
        compared = ("grpo", "rloo", "reinforce_plus_plus_baseline")
        if algorithm.filter_equal_groups and algorithm.advantage not in compared:
            raise ValueError(
                f"groups of equal rewards have a signal for {algorithm.advantage}: filter_equal_groups would drop it; "
                f"set algorithm.filter_equal_groups false, or algorithm.advantage to one of {', '.join(compared)}"
            )
        completions = self.batch.prompts * self.batch.group_size
        if algorithm.updates_per_batch > completions:
            raise ValueError(
                f"updates_per_batch must be at most the completions of a batch, {completions}, got "
                f"{algorithm.updates_per_batch}; set algorithm.updates_per_batch lower, or batch.prompts higher"
            )
        if self.lora.rank and self.vllm.get("pipeline_parallel_size", 1) != 1:
            raise ValueError(
                "adapters are loaded into one pipeline stage, got vllm.pipeline_parallel_size "
                f"{self.vllm['pipeline_parallel_size']}; set vllm.tensor_parallel_size instead, or lora.rank 0"
            )
        if 0 < algorithm.dual_clip <= 1:
            raise ValueError(
                f"dual_clip bounds the ratio from above and must be more than 1, got {algorithm.dual_clip:g}; set "
                "algorithm.dual_clip, or 0 for no bound"
            )
        if algorithm.advantage == "remax" and self.staleness.at_bound is AtBound.SPLIT:
            raise ValueError(
                "remax compares with a greedy completion, which a group that is split may not have yet; set "
                "staleness.at_bound wait"
            )
        if not corrections.low <= 1 <= corrections.high:
            raise ValueError(
                f"corrections.low and corrections.high must have 1 between them, the weight of a token whose "
                f"probability has not changed, got {corrections.low:g} and {corrections.high:g}"
            )
        if corrections.weight == "none" and corrections.bound == "mask":
            raise ValueError("corrections.bound mask is a bound of weights; set corrections.weight token or sequence")
        if algorithm.ratio == "behavior" and corrections.weight != "none":
            raise ValueError(
                "a ratio over the policy that sampled corrects for it already, and importance weights would do so "
                "twice; set corrections.weight none, or algorithm.ratio proximal"
            )
        if algorithm.advantage == "gae" and 0 < self.run.steps <= self.critic.warmup_steps:
            raise ValueError(
                f"critic.warmup_steps must be less than run.steps, or the policy is never trained, got "
                f"{self.critic.warmup_steps} and {self.run.steps}"
            )
        if algorithm.overlong == "punish" and algorithm.overlong_buffer_tokens >= self.sampling.max_tokens:
            raise ValueError(
                f"overlong_buffer_tokens must be less than sampling.max_tokens, or every completion loses reward, got "
                f"{algorithm.overlong_buffer_tokens} and {self.sampling.max_tokens}; set "
                "algorithm.overlong_buffer_tokens"
            )

    def _kl_rules(self) -> None:
        kl, algorithm = self.kl, self.algorithm
        per_token = ("gae", "reinforce_plus_plus")
        if kl.coef == 0:
            for name in ("target", "reference_update_every"):
                if getattr(kl, name):
                    raise ValueError(f"kl.{name} moves what a coefficient of 0 leaves out; set kl.coef above 0")
        elif self.lora.rank and kl.reference_update_every:
            raise ValueError(
                f"with adapters the reference model is the weights below them, which stay as they are, got "
                f"kl.reference_update_every {kl.reference_update_every}; set it 0, or lora.rank 0"
            )
        elif kl.place == "reward":
            if algorithm.advantage not in per_token:
                raise ValueError(
                    f"a KL in the reward is a reward of each token, which {algorithm.advantage} does not have; set "
                    f"kl.place loss, or algorithm.advantage to one of {', '.join(per_token)}"
                )
            for name in ("straight_through", "with_ratio"):
                if getattr(kl, name):
                    raise ValueError(f"kl.{name} shapes a gradient, which a reward has none of; set kl.place loss")

    def _evaluation_rules(self) -> None:
        evaluation = self.evaluation
        if evaluation.samples > 1 and evaluation.temperature == 0:
            raise ValueError(
                f"evaluation.samples {evaluation.samples} with evaluation.temperature 0 would be the same completion "
                "every time; set evaluation.temperature above 0, or evaluation.samples 1"
            )
        weighted = next((function for function in evaluation.rewards if function.weight != 1), None)
        if weighted is not None:
            raise ValueError(
                f"functions that only evaluation uses are no part of a sum, {shown_name(weighted.use)} has weight "
                f"{weighted.weight:g}; leave its weight out of evaluation.rewards"
            )

    def _check_rewards_fit_a_result(self) -> None:
        names = names_in_results(self, evaluating=True)
        if len(names) > MAX_REWARDS:
            raise ValueError(
                f"at most {MAX_REWARDS} reward functions can be told apart, got {len(names)}; let one function return "
                "the sum of several, or shorten rewards.functions and evaluation.rewards"
            )
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(
                f"rewards are told apart by function and file name, got two called {repeated}; rename one of them in "
                "rewards.functions or evaluation.rewards"
            )
        for name in names:
            if len(name) > MAX_NAME:
                raise ValueError(
                    f"a reward's name may have {MAX_NAME} characters, got {len(name)}: {name[:40]}...; give the "
                    "function or its file a shorter name in rewards.functions"
                )

    @property
    def all_rewards(self) -> RewardsConfig:
        """With the functions of training, and behind them those that only evaluation uses."""
        return self.rewards.model_copy(update={"functions": (*self.rewards.functions, *self.rewards_of_evaluation)})

    @property
    def rewards_of_evaluation(self) -> tuple[RewardConfig, ...]:
        """What only evaluation scores with: what training scores with too is not called twice."""
        trained = [(function.use, function.args) for function in self.rewards.functions]
        return tuple(function for function in self.evaluation.rewards if (function.use, function.args) not in trained)

    @property
    def evaluates(self) -> bool:
        return self.evaluation.every > 0 or self.run.evaluation_only

    def steps_for(self, num_rows: int) -> int:
        """T, the training steps of a run over so many rows."""
        if self.run.evaluation_only:
            return 0
        if self.run.steps:
            return self.run.steps
        return -(-int(self.run.epochs * num_rows) // self.batch.prompts)

    @property
    def samples_per_lease(self) -> int:
        """Completions that are made of one training prompt: G, and with remax a greedy one, the last, as baseline."""
        return self.batch.group_size + (self.algorithm.advantage == "remax")

    @property
    def context_tokens(self) -> int:
        """The longest sequence that a generator makes: prompt and completion, of training or evaluation."""
        return self.data.max_prompt_tokens + max(self.sampling.max_tokens, self.evaluation.max_tokens)

    def evaluation_params(self) -> SamplingParams:
        settings = self.evaluation
        return SamplingParams(settings.max_tokens or self.sampling.max_tokens, settings.temperature)

    def result_digest(self) -> str:
        """Hex digest of the settings that change what a completion or its reward is."""
        part = self.model_dump(mode="json", include=set(CHANGES_RESULTS))
        part["model"].pop("path")
        part["evaluation"] = self.evaluation.model_dump(mode="json", include=set(CHANGES_EVALUATIONS))
        return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:32]
