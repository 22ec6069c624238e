"""Settings of the algorithm: advantages, losses, KL, off-policy corrections, critic and adapters.

Every formula is in docs/algorithms.md, with its name elsewhere. What excludes what: the rules of `protocol/config.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from protocol.sections import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Section,
)

GROUP_RELATIVE = ("grpo", "rloo", "reinforce_plus_plus_baseline", "gdpo")
"""Advantages that compare the completions of one prompt with each other."""


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
