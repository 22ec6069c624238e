"""The command line of `launch/cluster.py`: a few short flags, and every setting by its dotted name.

A short flag is another spelling of a setting: `--group-size 8` is `--batch.group_size 8`.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from launch.resumption import NEVER
from protocol.errors import ConfigError
from protocol.foreign_names import setting_of
from protocol.rewards import BUILT_IN
from protocol.setting_names import PASS_THROUGH, describe, is_section, known_keys, nearest, unknown
from protocol.settings import Value, from_text

GROUPS = {
    "what runs where": {
        "--generators": ("generators.count", "N"),
        "--learner-gpus": ("learner.ranks", "M"),
        "--device": ("run.device", "auto|cuda|npu|cpu"),
        "--share-gpu": ("run.share_gpu", ""),
        "--bind": ("network.bind", "tcp://HOST:PORT"),
    },
    "the task": {
        "--model": ("model.path", "M"),
        "--dataset": ("data.train", "D[#N][,D...]"),
        "--rollout": ("rollout.use", "NAME|FILE.py:NAME|package.module:NAME"),
        "--reward": ("rewards.functions", "NAME|FILE.py:NAME|package.module:NAME[:WEIGHT]"),
        "--reward-model": ("rewards.model.path", "FOLDER[:WEIGHT]"),
        "--eval-reward": ("evaluation.rewards", "NAME|FILE.py:NAME|package.module:NAME"),
    },
    "the algorithm": {
        "--max-staleness": ("staleness.max", "S"),
        "--prompts-per-step": ("batch.prompts", "P"),
        "--group-size": ("batch.group_size", "G"),
        "--steps": ("run.steps", "T"),
        "--zero": ("learner.zero", "0..3"),
        "--seed": ("run.seed", "N"),
    },
    "where it is written": {
        "--run-name": ("run.name", "NAME"),
        "--out": ("run.out", "DIR"),
    },
}
"""By topic: flag -> (setting, what stands for its value; "" for a switch)."""

REWARDS = ("rewards.functions", "evaluation.rewards")
"""Lists of functions: their flags may be repeated."""

OWN = {
    "--recipe": "start from a recipe: a name in launch/recipes, or a YAML file",
    "--resume": "go on with the run in PATH, or from its checkpoint PATH, with the settings it has (without a value: "
    "--run-name's, else the newest run); auto: with the newest of this name that is not complete, else a new one; "
    "never: a new one",
    "--dry-run": "print processes, devices and the arithmetic of a step, and start nothing",
    "--json": "with --dry-run: as JSON",
}
"""Flags that are no settings."""


@dataclass(frozen=True, slots=True)
class CommandLine:
    recipe: str
    resume: str | None  # as `launch/resumption.py` has it; None: never, "": without a value
    dry_run: bool
    as_json: bool
    values: list[Value]  # the layer of settings that the flags are


def parse(argv: Sequence[str]) -> CommandLine:
    """Raises ConfigError if a flag is unknown or lacks its value. `--help` prints and exits."""
    known, rest = _parser().parse_known_args(argv)
    given = vars(known)
    values = []
    for flag, (key, metavar) in _short_flags():
        value = given[_attribute(flag)]
        if key in REWARDS and value:
            values.append(Value(key, [_reward(text) for text in value], flag))
        elif key == "rewards.model.path" and value:
            values += _reward_model(value, flag)
        elif value not in (None, [], False):
            values.append(from_text(key, value, flag) if metavar else Value(key, True, flag))
    values += _dotted(rest)
    resume = None if known.resume == NEVER else known.resume
    return CommandLine(known.recipe, resume, known.dry_run, known.json, values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python launch/cluster.py",
        usage="python launch/cluster.py [--generators N] [--learner-gpus M] [--recipe R] [--SETTING VALUE ...]",
        description="Train a language model with asynchronous reinforcement learning on this machine.",
        epilog=_all_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for topic, flags in GROUPS.items():
        group = parser.add_argument_group(topic)
        for flag, (key, metavar) in flags.items():
            text = describe(key).replace("%", "%%")
            if key in REWARDS:
                group.add_argument(flag, action="append", default=[], metavar=metavar, help=f"{text} May be repeated.")
            elif metavar:
                group.add_argument(flag, metavar=metavar, help=text)
            else:
                group.add_argument(flag, action="store_true", help=text)
    own = parser.add_argument_group("this command")
    own.add_argument("--recipe", metavar="R", default="", help=OWN["--recipe"])
    own.add_argument("--resume", metavar="auto|never|PATH", nargs="?", const="", help=OWN["--resume"])
    own.add_argument("--dry-run", action="store_true", help=OWN["--dry-run"])
    own.add_argument("--json", action="store_true", help=OWN["--json"])
    return parser


def _dotted(words: Sequence[str]) -> Iterator[Value]:
    """Settings by their names: `--learner.learning_rate 2e-6` or `--learner.learning_rate=2e-6`.

    Raises ConfigError naming all that are none: a command of another system has many.
    """
    rest, refused = iter(words), list[str]()
    for word in rest:
        flag, equals, text = word.partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if not word.startswith("--") and setting_of(flag) is None:
            if not refused:  # else it is the value of what was refused
                raise ConfigError(f"expected a flag, got {word!r} on the command line; see --help")
            continue
        if not word.startswith("--") or not _is_setting(key):
            candidates = [*known_keys(), *(name for name, _ in _short_flags()), *OWN]
            meant, dashed = nearest(flag, candidates), flag if flag.startswith("--") else f"--{flag}"
            nearby = meant if meant.startswith("--") else f"--{meant}"
            refused.append(str(unknown(dashed, "on the command line", [nearby])))
            continue
        if not equals:
            text = next(rest, "--")
            if text.startswith("--"):
                raise ConfigError(f"{flag} needs a value, got none on the command line; it means: {describe(key)}")
        yield from_text(key, text, flag)
    if refused:
        raise ConfigError("\n".join(refused))


def _is_setting(key: str) -> bool:
    return key in known_keys() or key.split(".")[0] in PASS_THROUGH or (bool(key) and is_section(key))


def weighted(text: str) -> tuple[str, float | None]:
    """What stands before :WEIGHT, and the weight; None without one."""
    what, _, last = text.rpartition(":")
    try:
        return (what, float(last)) if what else (text, None)
    except ValueError:
        return text, None


def _reward(text: str) -> dict[str, object]:
    """NAME, FILE.py:NAME or package.module:NAME, each with :WEIGHT or without."""
    use, weight = weighted(text)
    return {"use": use} if weight is None else {"use": use, "weight": weight}


def _reward_model(text: str, flag: str) -> list[Value]:
    """FOLDER, with :WEIGHT or without."""
    folder, weight = weighted(text)
    given = {"path": folder} if weight is None else {"path": folder, "weight": weight}
    return [Value(f"rewards.model.{name}", value, flag) for name, value in given.items()]


def _short_flags() -> Iterator[tuple[str, tuple[str, str]]]:
    for flags in GROUPS.values():
        yield from flags.items()


def _attribute(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _all_settings() -> str:
    lines = ["every setting, as --SECTION.NAME VALUE (protocol/sections.py and algorithm.py say what each means):"]
    sections: dict[str, list[str]] = {}
    for key in known_keys():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(name)
    lines += [f"  {section:<12} {' '.join(names)}" for section, names in sections.items()]
    lines.append(f"  {', '.join(PASS_THROUGH):<12} anything: handed to the engine as it is")
    lines += ["", "built-in rewards (actors/rewards/ says what each gives):", *_wrapped(BUILT_IN)]
    return "\n".join(lines)


def _wrapped(names: Sequence[str]) -> list[str]:
    return textwrap.wrap(" ".join(names), 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
