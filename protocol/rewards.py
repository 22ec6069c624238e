"""Reward functions by name: which there are, and the identity of code that a user brings.

Both ends of a connection compare that identity; the code itself never travels.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.brought_code import brought_digest, is_brought, is_file, is_there, shown_name
from protocol.errors import ConfigError
from protocol.foreign_names import REWARDS
from protocol.reward_model import REWARD_MODEL, reward_model_digest
from protocol.rollouts import ENVIRONMENT, SINGLE_TURN

if TYPE_CHECKING:
    from protocol.config import Config
    from protocol.sections import RewardsConfig

BUILT_IN = (
    *("gsm8k", "gsm8k_flexible", "math_accuracy", "math_accuracy_reasoning", "math_accuracy_swift", "math_dapo"),
    *(
        "think_format",
        "think_answer_format",
        "cosine",
        "cosine_swift",
        "soft_overlong",
        "soft_overlong_swift",
        "length",
    ),
    *("repetition", "repetition_tokens"),
    *("xml_count", "xml_soft_format", "xml_strict_format", "xml_int", "xml_correctness"),
)
OVERLONG = "overlong"  # what results and curves call the punishment of completions near max_tokens


def check_rewards(uses: Sequence[str]) -> None:
    """Raises ConfigError unless each is a built-in name or a function in code that is there. Runs no code of it."""
    for use in uses:
        if use in BUILT_IN:
            continue
        if not (is_brought(use) and is_there(use)):
            near = [REWARDS[use]] if use in REWARDS else difflib.get_close_matches(use, BUILT_IN, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"expected a reward of {', '.join(BUILT_IN)}, FILE.py:NAME or package.module:NAME, with :NUMBER as its "
                f"weight, got {use}; {meant}set rewards.functions or --reward"
            )
        place = use.partition(":")[0]
        if is_file(use) and not Path(place).is_file():
            raise ConfigError(f"expected reward code in {place}, there is no such file; set --reward")


def scored_by(config: Config) -> list[tuple[str, float]]:
    """What a generator adds up, each by its shown name with its weight: functions, reward model, environment."""
    rewards = config.rewards
    found = [(shown_name(function.use), function.weight) for function in rewards.functions]
    if rewards.model.path:
        found.append((REWARD_MODEL, rewards.model.weight))
    if config.rollout.weight is not None:
        found.append((ENVIRONMENT, config.rollout.weight))
    return found


def weighted_functions(config: Config) -> list[tuple[str, float]]:
    """What a reward is the sum of once the broker has added its part."""
    found = scored_by(config)
    return [*found, (OVERLONG, 1.0)] if config.algorithm.overlong == "punish" else found


def names_in_results(config: Config, *, evaluating: bool) -> list[str]:
    """Under which names a generator may give rewards, and numbers beside them as NAME/KEY."""
    names = [name for name, _ in scored_by(config)]
    if config.rollout.use != SINGLE_TURN and config.rollout.weight is None:
        names.append(ENVIRONMENT)
    return [*names, *(shown_name(function.use) for function in config.rewards_of_evaluation)] if evaluating else names


def names_in_evaluation(config: Config) -> list[str]:
    """What the scores of an evaluation tell apart; the first decides its accuracy: a function where there is one."""
    functions = [shown_name(function.use) for function in config.all_rewards.functions]
    others = dict(scored_by(config))
    return [*functions, *(name for name in (ENVIRONMENT, REWARD_MODEL) if name in others)]


def reward_digest(uses: Sequence[str], model: str = "") -> str:
    """Of names and file contents, in order, and of the reward model in folder `model`; "" when all are built in.

    Raises ConfigError if a file is missing.
    """
    code = brought_digest(uses, "reward", "rewards.functions or --reward")
    return hashlib.sha256(f"{code}/{reward_model_digest(Path(model))}".encode()).hexdigest()[:32] if model else code


def with_files(rewards: RewardsConfig, uses: Sequence[str], model: str = "") -> RewardsConfig:
    """The run's rewards with code and model where this host has them: `uses` names the code in the run's order."""
    here = iter([use for use in uses if is_brought(use)])
    functions = [
        function.model_copy(update={"use": next(here)}) if is_brought(function.use) else function
        for function in rewards.functions
    ]
    here_too = {"model": rewards.model.model_copy(update={"path": model})} if model else {}
    return rewards.model_copy(update={"functions": tuple(functions), **here_too})
