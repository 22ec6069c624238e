"""Reward functions by name: which there are, and the identity of code that a user brings.

Both ends of a connection compare that identity; the code itself never travels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.errors import ConfigError
from protocol.reward_model import REWARD_MODEL, reward_model_digest

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
        place, _, name = use.partition(":")
        if not name or not (is_file(use) or _is_module(place)):
            raise ConfigError(
                f"expected a reward of {', '.join(BUILT_IN)}, FILE.py:NAME or package.module:NAME, with :NUMBER as its "
                f"weight, got {use}; set rewards.functions or --reward"
            )
        if is_file(use) and not Path(place).is_file():
            raise ConfigError(f"expected reward code in {place}, there is no such file; set --reward")


def is_file(use: str) -> bool:
    """Whether a reward is FILE.py:NAME."""
    return use.partition(":")[0].endswith(".py")


def is_brought(use: str) -> bool:
    """Whether a reward is a user's code, and not a built-in."""
    return ":" in use


def shown_name(use: str) -> str:
    """What results and curves call it: the built-in's name, or the module's without its folder or package."""
    place, _, name = use.partition(":")
    if not is_brought(use):
        return use
    return f"{Path(place).stem if is_file(use) else place.rpartition('.')[2]}:{name}"


def scored_by(rewards: RewardsConfig) -> list[tuple[str, float]]:
    """What a generator scores with, by shown name with its weight: the functions, and the reward model if there is one.

    In the order of every list of rewards.
    """
    found = [(shown_name(function.use), function.weight) for function in rewards.functions]
    return [*found, (REWARD_MODEL, rewards.model.weight)] if rewards.model.path else found


def weighted_functions(config: Config) -> list[tuple[str, float]]:
    """What a reward is the sum of, each by its shown name with its weight."""
    found = scored_by(config.rewards)
    return [*found, (OVERLONG, 1.0)] if config.algorithm.overlong == "punish" else found


def reward_digest(uses: Sequence[str], model: str = "") -> str:
    """Of names and file contents, in order, and of the reward model in folder `model`; "" when all are built in.

    Raises ConfigError if a file is missing.
    """
    digest = hashlib.sha256()
    brought = [use for use in uses if is_brought(use)]
    for use in brought:
        place, _, name = use.partition(":")
        try:
            content = (Path(place) if is_file(use) else _file_of_module(place)).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"expected reward code in {place}, {(error.strerror or 'unreadable').lower()}; set rewards.functions "
                "or --reward"
            ) from None
        digest.update(name.encode() + b"\0" + content + b"\0")
    if model:
        digest.update(reward_model_digest(Path(model)).encode())
    return digest.hexdigest()[:32] if brought or model else ""


def with_files(rewards: RewardsConfig, uses: Sequence[str], model: str = "") -> RewardsConfig:
    """The run's rewards with code and model where this host has them: `uses` names the code in the run's order."""
    here = iter([use for use in uses if is_brought(use)])
    functions = [
        function.model_copy(update={"use": next(here)}) if is_brought(function.use) else function
        for function in rewards.functions
    ]
    here_too = {"model": rewards.model.model_copy(update={"path": model})} if model else {}
    return rewards.model_copy(update={"functions": tuple(functions), **here_too})


def _is_module(name: str) -> bool:
    try:
        _file_of_module(name)
    except ConfigError:
        return False
    return True


def _file_of_module(name: str) -> Path:
    """Where Python would import it from, without running its packages. Raises ConfigError if that is nowhere."""
    folders, spec = None, None
    for depth in range(1, name.count(".") + 2):
        spec = PathFinder.find_spec(".".join(name.split(".")[:depth]), folders)
        folders = list(spec.submodule_search_locations or []) if spec else []
    if spec is None or not spec.has_location or spec.origin is None:
        raise ConfigError(
            f"expected reward code in a module {name}, Python finds none; install it, or put its folder into PYTHONPATH"
        )
    return Path(spec.origin)
