"""Settings by section, but for those of the algorithm (`protocol/algorithm.py`): meaning, unit, range, default.

`protocol/config.py` puts them together. Nothing here imports a heavy library.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from protocol.fields import MAX_RUNNING
from protocol.sources import from_list
from protocol.types import SamplingParams

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Sources = Annotated[str, BeforeValidator(from_list)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]


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
    train: Sources = "openai/gsm8k"
    """Training rows: files (.jsonl, .json, .parquet, .csv), folders or Hub NAME[:SUBSET], by commas; #N: N rows."""
    eval: Sources = ""
    """Held-out rows, as `train`. Empty: the test split of its folders and datasets that have one."""
    prompt_column: str = ""
    """Column with the question or the chat messages, or COLUMN.FIELD. Empty: recognised by name."""
    answer_column: str = ""
    """Column with the reference answer, or COLUMN.FIELD. Empty: recognised by name."""
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


class RolloutConfig(Section):
    use: str = "single_turn"
    """How a prompt becomes a completion: single_turn, calculator, FILE.py:NAME or package.module:NAME."""
    args: dict[str, Any] = {}
    """Keyword arguments of the rollout, beside engine and prompt."""
    weight: float | None = None
    """Factor, in the sum, of the reward that the rollout gives by itself (environment). null: it gives none."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that one sample may spend in the rollout's own code and tools; the time of the engine is not counted."""


class StalenessConfig(Section):
    max: NonNegativeInt = 2
    """S: a token may be at most this many policy versions old when it is trained. 0 is the synchronous algorithm."""
    at_bound: AtBound = AtBound.WAIT
    """What happens to a group that still runs at its deadline."""
    pacing: bool = True
    """Start no more groups than the learner needs to stay busy."""
    pacing_margin: NonNegativeFloat = 2.0
    """Standard deviations of groups to keep open beyond one batch and those that usually still run when a step ends."""


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
    """A built-in name (those in protocol/rewards.py), FILE.py:NAME or package.module:NAME."""
    weight: float = 1.0
    """Factor in the sum."""
    args: dict[str, Any] = {}
    """Keyword arguments of the function, such as format_score of gsm8k."""


class RewardModelConfig(Section):
    path: str = ""
    """Folder of a sequence-classification model whose output is one more reward. Empty: none."""
    weight: float = 1.0
    """Factor in the sum."""
    label: Annotated[int, Field(ge=0)] | None = None
    """Which of the model's outputs is the reward, from 0. None: its only one."""
    max_tokens: NonNegativeInt = 0
    """Longest conversation in the reward model's own tokens; a longer one is an error. 0: as its config says."""
    batch_size: PositiveInt = 16
    """Completions of one forward, at most: those that wait when it starts."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|(cuda|npu)(:\d+)?)$")] = "auto"
    """Where it computes: cpu, or a card among those that the generator sees (cuda, cuda:1). auto: as the generator."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What it computes in. auto: bfloat16 on accelerators, float32 on a CPU."""
    timeout_s: PositiveFloat = 60.0
    """Deadline of one forward; past it the worker is killed and its completions are errors."""


class RewardsConfig(Section):
    functions: tuple[RewardConfig, ...] = (RewardConfig(use="gsm8k"),)
    """What scores a completion; the reward is the weighted sum."""
    model: RewardModelConfig = RewardModelConfig()
    """A model that scores conversations, beside the functions."""
    workers: PositiveInt = 1
    """Processes that score, per generator."""
    timeout_s: PositiveFloat = 30.0
    """Deadline of scoring one completion; past it the worker is killed and the completion is an error."""


class EvaluationConfig(Section):
    every: NonNegativeInt = 10
    """Evaluate after every so many steps, before the first and after the last. 0: never."""
    before_training: bool = True
    """Evaluate the model as it is before the first step."""
    max_prompts: PositiveInt = 256
    """Held-out prompts of one evaluation, spread evenly over their data sources."""
    max_tokens: NonNegativeInt = 0
    """Longest completion of an evaluation. 0: as in training."""
    samples: Annotated[int, Field(ge=1, le=MAX_RUNNING)] = 1
    """k: completions of each held-out prompt. More than one need a temperature."""
    temperature: NonNegativeFloat = 0.0
    """Of an evaluation's completions. 0: greedy."""
    rewards: tuple[RewardConfig, ...] = ()
    """What scores held-out completions beside the functions of training: a lenient scorer beside the strict one."""
    prompts_written: NonNegativeInt = 64
    """Prompts of each evaluation whose completions are written to evaluations/."""


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
    data: Sources = ""
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
    """Where to compute; AMD is cuda too. auto: the first of NVIDIA, AMD, Ascend that has a card, else cpu."""
    share_gpu: bool = False
    """Learner and generators share one card."""
    evaluation_only: bool = False
    """Evaluate the model as it is, once, and train nothing: no card for the learner, and no training rows."""
    drain_s: PositiveFloat = 60.0
    """How long the first Ctrl-C lets running work end before a checkpoint is written."""
    samples_per_step: NonNegativeInt = 4
    """Trajectories written to samples/ at a step."""
    samples_every: PositiveInt = 1
    """They are written at every so many steps, the first among them."""
