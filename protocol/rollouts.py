"""How a prompt becomes a completion, by name: which rollouts there are, and the identity of one that a user brings.

Both ends of a connection compare that identity; the code itself never travels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from protocol.brought_code import brought_digest, is_brought, is_file, is_there
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from protocol.sections import RolloutConfig

SINGLE_TURN = "single_turn"
BUILT_IN = (SINGLE_TURN, "calculator")
ENVIRONMENT = "environment"
"""What results and curves call the reward that a rollout gives by itself, and the numbers beside it."""


def check_rollout(use: str) -> None:
    """Raises ConfigError unless it is a built-in name or a function in code that is there. Runs no code of it."""
    if use in BUILT_IN:
        return
    if not (is_brought(use) and is_there(use)):
        raise ConfigError(
            f"expected a rollout of {', '.join(BUILT_IN)}, FILE.py:NAME or package.module:NAME, got {use}; "
            "set rollout.use or --rollout"
        )
    place = use.partition(":")[0]
    if is_file(use) and not Path(place).is_file():
        raise ConfigError(f"expected rollout code in {place}, there is no such file; set rollout.use or --rollout")


def rollout_digest(use: str) -> str:
    """Of its name and file; "" when it is built in. Raises ConfigError if the file is missing."""
    return brought_digest([use], "rollout", "rollout.use or --rollout")


def with_own_file(rollout: RolloutConfig, use: str) -> RolloutConfig:
    """The run's rollout with its code where this host has it: at `use`."""
    return rollout.model_copy(update={"use": use}) if is_brought(rollout.use) else rollout
