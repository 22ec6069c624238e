"""Reward functions by name: which there are, and the identity of code that a user brings.

Both ends of a connection compare that identity; the code itself never travels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.errors import ConfigError

if TYPE_CHECKING:
    from protocol.config import Config
    from protocol.sections import RewardsConfig

BUILT_IN = ("gsm8k", "gsm8k_flexible")
OVERLONG = "overlong"  # what results and curves call the punishment of completions near max_tokens


def check_rewards(uses: Sequence[str]) -> None:
    """Raises ConfigError unless each is a built-in name or a function in a file that is there. Runs no code of it."""
    for use in uses:
        file, colon, name = use.partition(":")
        if use in BUILT_IN or (is_file(use) and name and Path(file).is_file()):
            continue
        if is_file(use) and colon:
            raise ConfigError(f"expected reward code in {file}, there is no such file; set --reward")
        raise ConfigError(
            f"expected a reward of {', '.join(BUILT_IN)} or FILE.py:NAME, with :NUMBER as its weight, got {use}; "
            "set rewards.functions or --reward"
        )


def is_file(use: str) -> bool:
    """Whether a reward is FILE.py:NAME, and not a built-in."""
    return use.partition(":")[0].endswith(".py")


def shown_name(use: str) -> str:
    """What results and curves call it: the built-in's name, or the file's name without its folder."""
    file, _, name = use.partition(":")
    return f"{Path(file).stem}:{name}" if is_file(use) else use


def weighted_functions(config: Config) -> list[tuple[str, float]]:
    """What a reward is the sum of, each by its shown name with its weight."""
    functions = [(shown_name(function.use), function.weight) for function in config.rewards.functions]
    return [*functions, (OVERLONG, 1.0)] if config.algorithm.overlong == "punish" else functions


def reward_digest(uses: Sequence[str]) -> str:
    """Of names and file contents, in order; "" when all are built in. Raises ConfigError if a file is missing."""
    digest = hashlib.sha256()
    brought = [use for use in uses if is_file(use)]
    for use in brought:
        file, _, name = use.partition(":")
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"expected reward code in {file}, {(error.strerror or 'unreadable').lower()}; set rewards.functions "
                "or --reward"
            ) from None
        digest.update(name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()[:32] if brought else ""


def with_files(rewards: RewardsConfig, uses: Sequence[str]) -> RewardsConfig:
    """The run's rewards with their files where this host has them: `uses` names them in the run's order."""
    here = iter([use for use in uses if is_file(use)])
    functions = [
        function.model_copy(update={"use": next(here)}) if is_file(function.use) else function
        for function in rewards.functions
    ]
    return rewards.model_copy(update={"functions": tuple(functions)})
