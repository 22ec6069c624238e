"""One batch prepared and trained by each of several ranks, and what must not depend on how many they are."""

from __future__ import annotations

from typing import Any

from learner.models import Models
from learner.preparation import Preparation
from learner.ranks import Ranks
from protocol.config import Config
from tests.batch_shares import STEP, random_share
from tests.critics import give_head
from tests.learning import RATE, config

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "one update": {"learner": {"zero": 2}},
    "whitened over completions": {
        "learner": {"zero": 1},
        "algorithm": {"advantage": "gdpo", "updates_per_batch": 2, "epochs_per_batch": 2},
        "rewards": {"functions": [{"use": "gsm8k"}, {"use": "gsm8k_flexible", "weight": 0.5}]},
        "kl": {"coef": 0.1, "target": 0.01, "horizon": 50},
    },
    "whitened over tokens": {
        "learner": {"zero": 3},
        "algorithm": {"advantage": "reinforce_plus_plus", "gamma": 0.9, "top_entropy_frac": 0.3},
        "kl": {"coef": 0.1, "place": "reward"},
    },
    "with a critic": {
        "learner": {"zero": 3},
        "algorithm": {"advantage": "gae", "gamma": 0.9, "lam": 0.9, "updates_per_batch": 2},
    },
    "gspo": {
        "learner": {"zero": 2},
        "algorithm": {
            "loss": "gspo",
            "aggregation": "sequence_mean_token_mean",
            "scale": "batch",
            "updates_per_batch": 2,
        },
        "corrections": {"weight": "sequence", "sequence_ratio": "geometric_mean", "bound": "mask", "high": 1.5},
    },
    "cispo": {
        "learner": {"zero": 3},
        "algorithm": {
            "loss": "cispo",
            "aggregation": "sequence_mean_token_sum",
            "overlong": "mask",
            "epochs_per_batch": 2,
        },
        "kl": {"coef": 0.1, "form": "k1", "straight_through": True, "with_ratio": True},
    },
    "dppo": {
        "learner": {"zero": 1},
        "algorithm": {"loss": "dppo_kl", "aggregation": "sequence_mean_token_sum_norm", "scale": "none"},
        "corrections": {"negative_kl_mask": 0.1},
    },
    "sapo": {
        "learner": {"zero": 0},
        "algorithm": {"advantage": "remax", "loss": "sapo", "aggregation": "token_sum", "entropy_coef": 0.01},
    },
}


def prepared(model: str, ranks: Ranks) -> dict[str, Any]:
    """By setting: losses, norms and sums of all ranks; target, advantage, correction and value of this one's tokens."""
    return {name: _prepared(_config(model, sections), ranks) for name, sections in SETTINGS.items()}


def _config(model: str, sections: dict[str, dict[str, Any]]) -> Config:
    base = config(micro_batch_tokens=40, clip_grad=0.0).model_dump()
    base["model"]["path"] = model
    return Config.model_validate(base | {name: base[name] | values for name, values in sections.items()})


def _prepared(config: Config, ranks: Ranks) -> dict[str, Any]:
    models = Models.open(config, ranks)
    if models.critic is not None:
        give_head(models.critic)
    preparation = Preparation(config, ranks, models)
    found = preparation.prepare(random_share(7, rank=ranks.rank, num_ranks=ranks.num_ranks))
    updates, critic_steps, tokens = [], [], []
    for mini_batch in found.mini_batches:
        for batch in mini_batch.micro_batches:
            columns = (batch.targets, batch.advantages, batch.corrections, batch.values.nan_to_num())
            tokens += zip(*(column.tolist() for column in columns), strict=True)
        if models.critic is not None:
            value_loss = preparation.value_loss(mini_batch)
            critic_steps.append(models.critic.update(mini_batch.micro_batches, value_loss, RATE))
        updates.append(models.policy.update(mini_batch.micro_batches, preparation.loss(mini_batch), RATE))
    (first, *_), (update, *_) = found.mini_batches, updates
    return {
        "places": [mini_batch.places.tolist() for mini_batch in found.mini_batches],
        "totals": [list(mini_batch.totals) for mini_batch in found.mini_batches],
        "losses": [update.sums["loss"] for update in updates],
        "norms": [update.grad_norm for update in updates],
        "critic_losses": [step.sums["loss"] for step in critic_steps],
        "critic_norms": [step.grad_norm for step in critic_steps],
        "mismatch": found.mismatch or preparation.mismatch(first.micro_batches, update.logprobs, STEP),
        "reward_kl": found.reward_kl,
        "tokens": tokens,
    }
