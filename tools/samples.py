"""What a run has trained: prompts, completions, rewards by function, versions and lengths, newest step first.

    python tools/samples.py RUN                          the newest samples
    python tools/samples.py RUN --step 40:60 --worst     the lowest rewards of the steps 40 to 60
    python tools/samples.py RUN --equal-groups           of groups that teach nothing: all their rewards are equal

    python tools/samples.py RUN --evaluations            of its evaluations; a step is then the version

How many there are to see is up to `run.samples_per_step` and `run.samples_every`, of evaluations to
`evaluation.prompts_written`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from protocol.own_python import use_own_python

    use_own_python()

from launch.chart import printable
from protocol.errors import ConfigError, Exit, TetherError

Sample = Mapping[str, Any]

FIELDS = frozenset({
    "step", "prompt_number", "sample", "prompt", "completion", "reward", "rewards", "group_rewards", "prompt_tokens",
    "completion_tokens", "finish_reason", "versions",
})  # fmt: skip
"""What `learner/samples.py` writes."""

TRAINED = ("samples", "step_", "has made a step (run.samples_per_step must not be 0)")
EVALUATIONS = ("evaluations", "version_", "was evaluated (evaluation.prompts_written must not be 0)")
"""Folder, what its files begin with, and what a run has done that has them."""

ORDERS: Mapping[str, Callable[[Sample], float]] = {
    "longest": lambda sample: -sample["completion_tokens"],
    "worst": lambda sample: sample["reward"],
}


@dataclass(frozen=True, slots=True)
class Span:
    """Numbers from `low` to `high`, both among them: N, LOW:HIGH, LOW: or :HIGH on the command line."""

    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def parse(cls, flag: str, text: str) -> Span:
        """Raises ConfigError unless the text is one or two numbers, the lower one first."""
        low, colon, high = text.partition(":")
        try:
            first = float(low) if low or not colon else -math.inf
            last = float(high) if high else math.inf if colon else first
        except ValueError:
            raise ConfigError(f"expected a number or LOW:HIGH behind {flag}, got {text!r}; see --help") from None
        if not first <= last:
            raise ConfigError(f"expected LOW:HIGH with the lower number first behind {flag}, got {text!r}")
        return cls(first, last)

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high


def read_samples(run_dir: Path, steps: Span, evaluations: bool = False) -> Iterator[Sample]:
    """The samples of these steps, or of the evaluations of these versions, newest first; failed ones are left out.

    Raises ConfigError if there are none, or naming file and line if one is no sample.
    """
    folder, prefix, need = EVALUATIONS if evaluations else TRAINED
    files = {int(path.stem.removeprefix(prefix)): path for path in (run_dir / folder).glob(f"{prefix}*.jsonl")}
    if not files:
        raise ConfigError(f"expected samples in {run_dir / folder}, found none; name the folder of a run that {need}")
    wanted = sorted((step for step in files if step in steps), reverse=True)
    if not wanted:
        raise ConfigError(f"{run_dir} has samples of the steps {min(files)} to {max(files)}, none of those of --step")
    for step in wanted:
        with files[step].open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):  # str.splitlines would cut in the middle of some texts
                sample = _sample(line, f"{files[step]}:{number}")
                if sample is not None:
                    yield sample


def _sample(line: str, place: str) -> Sample | None:
    try:
        sample = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"expected a sample as JSON, {error} at {place}; remove the file") from None
    if isinstance(sample, dict) and "error" in sample:
        return None
    missing = sorted(FIELDS - set(sample)) if isinstance(sample, dict) else sorted(FIELDS)
    if missing:
        raise ConfigError(f"expected a sample with {', '.join(missing)} at {place}, got {line[:80]!r}; remove the file")
    return dict(sample)


def choose(samples: Iterable[Sample], reward: Span, equal_groups: bool, order: str, count: int) -> list[Sample]:
    """At most `count`, of those that the filters let through; `order`: of ORDERS, or "" as they come."""
    found = (
        sample for sample in samples if sample["reward"] in reward and (not equal_groups or is_of_equal_group(sample))
    )
    return list(islice(sorted(found, key=ORDERS[order]) if order else found, count))


def is_of_equal_group(sample: Sample) -> bool:
    """Whether all rewards of its group are the same; a completion by itself has none to be compared with."""
    rewards = sample["group_rewards"]
    return len(rewards) > 1 and min(rewards) == max(rewards)


def describe(sample: Sample) -> Iterator[str]:
    """The lines that show one sample."""
    functions = ", ".join(
        f"{name} {'no opinion' if value is None else format(value, 'g')}" for name, value in sample["rewards"].items()
    )
    group = sample["group_rewards"]
    spread = "all equal" if is_of_equal_group(sample) else f"{min(group):g} to {max(group):g}"
    versions = [version for version, _, _ in sample["versions"]]
    written_by = f"version {versions[0]}" if len(versions) == 1 else f"versions {versions[0]} to {versions[-1]}"
    cut = ", cut off" if sample["finish_reason"] == "length" else ""
    yield f"step {sample['step']}  prompt {sample['prompt_number']}  sample {sample['sample']}  {written_by}"
    yield f"  reward      {sample['reward']:g}  ({functions}; its group of {len(group)}: {spread})"
    told = f", {observed} of them observed" if (observed := sample.get("observed_tokens", 0)) else ""
    yield f"  tokens      {sample['prompt_tokens']} + {sample['completion_tokens']}{told}{cut}"
    for label in ("prompt", "completion"):
        for number, line in enumerate(sample[label].splitlines() or [""]):
            yield f"  {label if number == 0 else '':<12}{printable(line)}".rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--step", default=":", metavar="N|A:B", help="of this step, or of the steps A to B")
    parser.add_argument(
        "--reward", default=":", metavar="R|LOW:HIGH", help="with such a reward; a negative one as --reward=-1:0"
    )
    parser.add_argument("--evaluations", action="store_true", help="of held-out prompts, by the version evaluated")
    parser.add_argument("--equal-groups", action="store_true", help="of groups whose rewards are all equal")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--longest", dest="order", action="store_const", const="longest", default="", help="first")
    order.add_argument("--worst", dest="order", action="store_const", const="worst", help="the lowest reward first")
    parser.add_argument("--count", type=int, default=4, metavar="N", help="show at most so many (default: 4)")
    parser.add_argument("--json", action="store_true", help="as lines of JSON")
    args = parser.parse_args(argv)
    try:
        steps, reward = Span.parse("--step", args.step), Span.parse("--reward", args.reward)
        if args.count < 1:
            raise ConfigError(f"--count must be at least 1, got {args.count}")
        chosen = choose(
            read_samples(args.run, steps, args.evaluations), reward, args.equal_groups, args.order, args.count
        )
        for sample in chosen:
            print(json.dumps(sample, ensure_ascii=False) if args.json else "\n".join([*describe(sample), ""]))
        if not chosen:
            print("no sample is like that", file=sys.stderr)
    except TetherError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(Exit.DONE)


if __name__ == "__main__":
    sys.exit(main())
