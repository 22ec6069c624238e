"""Every setting of a run: meaning, unit, range, default. Nothing here imports a heavy library.

Defaults < recipe < environment (TETHER__LEARNER__LEARNING_RATE) < flags (--learner.learning_rate);
`protocol/settings.py` merges them. Engine settings pass through verbatim under `vllm:` and `deepspeed:`.
`Config.result_digest` is what both ends of a connection compare: it covers what changes results, nothing else.
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from protocol.fields import MAX_NAME, MAX_REWARDS, MAX_RUNNING
from protocol.rewards import shown_name
from protocol.types import SamplingParams

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]


GROUP_RELATIVE = ("grpo", "rloo", "reinforce_plus_plus_baseline", "gdpo")
"""Advantages that compare the completions of one prompt with each other."""


CHANGES_RESULTS = ("model", "sampling", "rewards", "batch", "algorithm", "data", "lora")
"""Sections that change what a completion or its reward is."""


class Section(BaseModel):
    """A group of settings. Unknown keys are errors; values are frozen once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class AtBound(StrEnum):
    WAIT = "wait"
    """The learner waits for a straggler at its deadline."""
    SPLIT = "split"
    """The finished completions of a straggling group train at its deadline, the rest as a remainder."""


class ModelConfig(Section):
    path: str = "Qwen/Qwen2.5-0.5B-Instruct"
    """Folder or Hugging Face name of a causal language model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What learner and generators compute in. auto: bfloat16 on accelerators, float32 on a CPU."""
    trust_remote_code: bool = False
    """Run Python code that lies beside the model. Only for models whose code you have read."""


class DataConfig(Section):
    train: str = "openai/gsm8k"
    """Training rows: a .jsonl, .json, .parquet or .csv file, a folder of them, or a Hugging Face NAME[:SUBSET]."""
    eval: str = ""
    """Held-out rows, as `train`. Empty: the folder's or dataset's test split where it has one."""
    prompt_column: str = ""
    """Column with the question or the chat messages. Empty: recognised by name."""
    answer_column: str = ""
    """Column with the reference answer. Empty: recognised by name."""
    system: str = ""
    """System message put before every prompt: text, or a path to a text file."""
    suffix: str = ""
    """Text appended to every plain question."""
    max_prompt_tokens: PositiveInt = 512
    """Longer prompts are skipped and counted."""
    shuffle: bool = True
    """Each pass over the rows goes in a new order, drawn from `run.seed`."""
    max_rows: NonNegativeInt = 0
    """Use only the first rows of the training data. 0: all."""


class BatchConfig(Section):
    prompts: PositiveInt = 64
    """P: prompts (groups) of one training step."""
    group_size: PositiveInt = 8
    """G: completions of one prompt."""


class SamplingConfig(Section):
    max_tokens: PositiveInt = 512
    """Longest completion, in tokens."""
    temperature: PositiveFloat = 1.0
    """Of training completions; the learner applies it too."""

    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature)


class StalenessConfig(Section):
    max: NonNegativeInt = 2
    """S: a token may be at most this many policy versions old when it is trained. 0 is the synchronous algorithm."""
    at_bound: AtBound = AtBound.WAIT
    """What happens to a group that still runs at its deadline."""
    pacing: bool = True
    """Start no more groups than the learner needs to stay busy."""
    pacing_margin: NonNegativeFloat = 2.0
    """Standard deviations of groups to keep open beyond one batch and those that usually still run when a step ends."""


class AlgorithmConfig(Section):
    advantage: Literal[
        "grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gdpo", "remax", "gae"
    ] = "grpo"
    """How rewards become advantages. gae trains a critic beside the policy (PPO)."""
    scale: Literal["group", "batch", "none"] = "group"
    """What group-relative advantages are divided by: a standard deviation, or nothing (Dr.GRPO)."""
    gamma: Fraction = 1.0
    """Discount per token, of gae and reinforce_plus_plus."""
    lam: Fraction = 1.0
    """Lambda of gae."""
    loss: Literal["ppo", "gspo", "cispo", "sapo", "dppo_tv", "dppo_kl", "reinforce"] = "ppo"
    """What holds the policy near an older one (`ratio` says which)."""
    ratio: Literal["proximal", "behavior"] = "proximal"
    """What the loss's ratio is over: the policy before the batch (decoupled PPO), or the one that sampled the token.

    With behavior there is nothing left to correct: it needs corrections.weight none. DPPO's ratio is always over the
    policy that sampled, and reinforce has none.
    """
    clip_low: PositiveFloat = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped above 1 + clip_high."""
    dual_clip: NonNegativeFloat = 0.0
    """Where the advantage is negative, the ratio counts at most this much; above 1. 0: without limit."""
    sapo_tau_positive: PositiveFloat = 1.0
    """Temperature of SAPO's gate where the advantage is positive."""
    sapo_tau_negative: PositiveFloat = 1.05
    """Temperature of SAPO's gate where the advantage is negative."""
    dppo_bound: PositiveFloat = 0.2
    """Divergence of a token (difference of probabilities, or binary KL) beyond which DPPO leaves it out."""
    aggregation: Literal[
        "token_mean",
        "token_sum",
        "sequence_mean_token_mean",
        "sequence_mean_token_sum",
        "sequence_mean_token_sum_norm",
    ] = "token_mean"
    """How the losses of tokens are added up; sequence_mean_token_sum_norm is Dr.GRPO's."""
    aggregation_length: NonNegativeInt = 0
    """What sequence_mean_token_sum_norm divides by, in tokens. 0: sampling.max_tokens."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus in the loss."""
    top_entropy_frac: PositiveFraction = 1.0
    """Share of the batch's tokens, those of highest entropy, that keep their policy loss. 1: all."""
    updates_per_batch: PositiveInt = 1
    """Optimizer steps of one pass over a batch: it is cut into as many mini-batches."""
    epochs_per_batch: PositiveInt = 1
    """Passes over a batch."""
    filter_equal_groups: bool = False
    """Drop groups whose rewards are all equal before they reach a batch, and refill it."""
    overlong: Literal["keep", "mask", "punish"] = "keep"
    """Completions cut off at max_tokens: train them, leave them out of the loss, or take reward off as they near it."""
    overlong_buffer_tokens: PositiveInt = 128
    """Over how many tokens before max_tokens the reward falls by 1, with `overlong: punish`."""


class KlConfig(Section):
    coef: NonNegativeFloat = 0.0
    """Weight of the KL to the reference model. 0: there is none, and no reference model is loaded."""
    form: Literal["k1", "k2", "k3", "abs"] = "k3"
    """How it is estimated per token (Schulman 2020)."""
    straight_through: bool = False
    """The estimate's value with the gradient of k2, which is that of the KL."""
    with_ratio: bool = False
    """Multiply by the importance ratio, which corrects for tokens that another policy sampled. In the loss only."""
    place: Literal["loss", "reward"] = "loss"
    """Part of the loss, or taken off each token's reward (k1); the latter needs gae or reinforce_plus_plus."""
    target: NonNegativeFloat = 0.0
    """The coefficient follows this KL per token. 0: it is fixed."""
    horizon: PositiveInt = 10_000
    """In so many completions the coefficient changes by at most a fifth."""
    reference_update_every: NonNegativeInt = 0
    """Move the reference model towards the policy after every so many steps. 0: it stays."""
    reference_update_rate: PositiveFraction = 0.6
    """How far."""


class CorrectionsConfig(Section):
    weight: Literal["none", "token", "sequence"] = "token"
    """Importance weights of the policy that trains against the one that sampled: none, per token, or per completion."""
    sequence_ratio: Literal["product", "geometric_mean"] = "product"
    """What the ratio of a completion is, of those of its tokens."""
    bound: Literal["truncate", "mask"] = "truncate"
    """What happens to weights outside [low, high]: set to the bound, or to 0 (IcePop)."""
    low: NonNegativeFloat = 0.0
    """Smallest weight."""
    high: PositiveFloat = 2.0
    """Largest weight."""
    negative_kl_mask: NonNegativeFloat = 0.0
    """Leave out completions of negative advantage whose KL per token, sampling against training policy, is above this.

    0: none.
    """


class CriticConfig(Section):
    """The value model of `algorithm.advantage: gae`, which learns all its weights."""

    path: str = ""
    """Folder or Hugging Face name of the model that it starts from, which gets a value head. Empty: model.path.

    It then starts from the supervised warm start, too, where there is one.
    """
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate of its AdamW, of the schedule that learner.learning_rate has; all else is as in `learner`."""
    clip: NonNegativeFloat = 0.5
    """Values are clipped to this distance from those before the batch. 0: no clipping."""
    loss: Literal["squared", "huber"] = "squared"
    """Of the difference between value and return."""
    warmup_steps: NonNegativeInt = 0
    """First steps in which the critic learns alone, on completions of a policy that stays as it is."""


class LoraConfig(Section):
    rank: Annotated[int, Field(ge=0, le=512)] = 0
    """Rank of the adapters that are trained instead of the weights. 0: the weights are trained."""
    alpha: PositiveFloat = 32.0
    """Adapters count alpha / rank."""
    targets: str = "all-linear"
    """Which modules get one: all-linear (all linear layers but the output head), or names with commas between."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is dropped while it is trained, and only then.

    Above 0 the log-probabilities from before a batch need a forward pass of their own.
    """


class LearnerConfig(Section):
    ranks: PositiveInt = 1
    """Learner processes, one per device."""
    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes from its peak to `min_learning_rate` at the last step."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly to its peak; step 0 already has a share of it."""
    min_learning_rate: NonNegativeFloat = 0.0
    """Where a decaying schedule ends."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's decoupled weight decay."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest gradient norm. 0: no clipping."""
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed's ZeRO stage."""
    micro_batch_tokens: PositiveInt = 8192
    """Packed tokens (prompt and completion) of one forward and backward; a longer sequence runs alone."""
    logprob_chunk_tokens: PositiveInt = 512
    """Tokens whose logits exist at one time."""
    gradient_checkpointing: bool = False
    """Trade compute for memory in the backward pass."""


class GeneratorConfig(Section):
    count: NonNegativeInt = 1
    """Generator processes that `launch/cluster.py` starts. 0: only standalone ones that connect."""
    engine: Literal["vllm", "transformers", "fake"] = "vllm"
    """What samples: vLLM, the slow transformers oracle, or the fake engine of the tests."""
    max_running: Annotated[int, Field(ge=1, le=MAX_RUNNING)] = 64
    """Completions that one generator runs at a time. For more than its limit start more generators."""
    recompute_cache: bool = True
    """After a weight update, running requests re-prefill with the new weights. False: they keep their old cache."""
    restarts: NonNegativeInt = 5
    """How often one generator is restarted before it is given up."""


class RewardConfig(Section):
    use: str
    """A built-in name (gsm8k, gsm8k_flexible) or FILE.py:NAME."""
    weight: float = 1.0
    """Factor in the sum."""
    args: dict[str, Any] = {}
    """Keyword arguments of the function, such as format_score of gsm8k."""


class RewardsConfig(Section):
    functions: tuple[RewardConfig, ...] = (RewardConfig(use="gsm8k"),)
    """What scores a completion; the reward is the weighted sum."""
    workers: PositiveInt = 1
    """Processes that score, per generator."""
    timeout_s: PositiveFloat = 30.0
    """Deadline of scoring one completion; past it the worker is killed and the completion is an error."""


class EvaluationConfig(Section):
    every: NonNegativeInt = 10
    """Evaluate after every so many steps, before the first and after the last. 0: never."""
    max_prompts: PositiveInt = 256
    """Held-out prompts of one evaluation."""
    max_tokens: NonNegativeInt = 0
    """Longest completion of an evaluation. 0: as in training. Evaluation is greedy."""


class CheckpointConfig(Section):
    every: NonNegativeInt = 50
    """A checkpoint after every so many steps, and after the last. 0: only the last."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""


class WatchdogConfig(Section):
    warn_s: PositiveFloat = 120.0
    """Without progress for so long: who waits for whom, and the leases, are written to the broker's log."""
    stop_s: PositiveFloat = 900.0
    """Without progress for so long: the run ends with a verdict."""
    lease_ttl_s: PositiveFloat = 30.0
    """A lease that was not renewed for so long is lost."""
    heartbeat_s: PositiveFloat = 2.0
    """How often every process reports."""
    orphan_s: PositiveFloat = 900.0
    """A generator or learner leaves when it heard nothing of the broker for so long."""


class NetworkConfig(Section):
    bind: str = ""
    """Address for standalone generators, tcp://HOST:PORT (the bulk socket takes PORT+1).

    Empty: tcp on loopback, free ports.
    """


class WarmupConfig(Section):
    steps: NonNegativeInt = 0
    """Supervised steps before reinforcement learning. 0: none."""
    data: str = ""
    """Rows whose answers are imitated, given as data.train is. Empty: the training rows."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate; it falls linearly to 0."""
    batch_size: PositiveInt = 32
    """Rows of one supervised step."""


class RunConfig(Section):
    name: str = ""
    """Folder of the run below `out`. Empty: made from recipe and time."""
    out: str = "runs"
    """Where runs are written."""
    steps: NonNegativeInt = 0
    """T: training steps. 0: as `epochs` says."""
    epochs: PositiveFloat = 1.0
    """Passes over the training rows, when `steps` is 0."""
    seed: NonNegativeInt = 0
    """Of sampling, data order and made models."""
    device: Literal["auto", "cuda", "npu", "cpu"] = "auto"
    """Where learner and generators compute. npu is planned for and has not been run yet."""
    share_gpu: bool = False
    """Learner and generators share one card."""
    drain_s: PositiveFloat = 60.0
    """How long the first Ctrl-C lets running work end before a checkpoint is written."""
    samples_per_step: NonNegativeInt = 4
    """Trajectories written to samples/ at each step."""


class Config(Section):
    """A whole run. P = batch.prompts, G = batch.group_size, S = staleness.max, T = steps_for(rows)."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
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
    vllm: dict[str, Any] = {}
    """Passed verbatim to vLLM's AsyncEngineArgs."""
    deepspeed: dict[str, Any] = {}
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
        if not self.rewards.functions:
            raise ValueError("at least one reward function is needed, got none; set rewards.functions or --reward NAME")
        self._check_rewards_fit_a_result()
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

    def _check_rewards_fit_a_result(self) -> None:
        names = [shown_name(function.use) for function in self.rewards.functions]
        if len(names) > MAX_REWARDS:
            raise ValueError(
                f"at most {MAX_REWARDS} reward functions can be told apart, got {len(names)}; let one function return "
                "the sum of several, or shorten rewards.functions"
            )
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(
                f"rewards are told apart by function and file name, got two called {repeated}; rename one of them in "
                "rewards.functions"
            )
        for name in names:
            if len(name) > MAX_NAME:
                raise ValueError(
                    f"a reward's name may have {MAX_NAME} characters, got {len(name)}: {name[:40]}...; give the "
                    "function or its file a shorter name in rewards.functions"
                )

    def steps_for(self, num_rows: int) -> int:
        """T, the training steps of a run over so many rows."""
        if self.run.steps:
            return self.run.steps
        return -(-int(self.run.epochs * num_rows) // self.batch.prompts)

    @property
    def samples_per_lease(self) -> int:
        """Completions that are made of one training prompt: G, and with remax a greedy one, the last, as baseline."""
        return self.batch.group_size + (self.algorithm.advantage == "remax")

    def evaluation_params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.evaluation.max_tokens or self.sampling.max_tokens, temperature=0.0)

    def result_digest(self) -> str:
        """Hex digest of the settings that change what a completion or its reward is."""
        part = self.model_dump(mode="json", include=set(CHANGES_RESULTS))
        part["model"].pop("path")
        return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:32]
