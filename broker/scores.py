"""What k completions of each held-out prompt come to: mean@k, pass@j and maj@k, by data source and reward function.

Runs in the broker; pure. A completion is right for a function that gives it `FULL_MARK` or more. What failed (the
generation or a reward), and what a function has no opinion on, is in none of that function's numbers: it is counted
apart, and never stands for a wrong answer. Every number is a mean over prompts, each with the same weight.

    mean@k  the share of a prompt's completions that are right
    pass@j  the probability that at least one of j completions, drawn from a prompt's n, is right: the unbiased estimate
            1 - C(n - c, j) / C(n, j) with c right ones (Chen et al. 2021, equation 1); over prompts with n >= j
    maj@k   whether the answer that most of a prompt's completions give is right; of answers with as many votes, the one
            that came first. Who gives no answer has no vote, and a prompt without votes counts as wrong
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import comb, sqrt
from statistics import fmean, variance
from typing import Any, NamedTuple

from protocol.types import Trajectory

FULL_MARK = 1.0
Z = 1.959963984540054  # of the 95% interval
ALL = ""  # all sources together


class Scored(NamedTuple):
    """One completion, as one function sees it."""

    value: float
    answer: str | None = None  # None: the function found no answer in the text

    @property
    def is_right(self) -> bool:
        return self.value >= FULL_MARK


Prompts = Sequence[Sequence[Scored]]  # by prompt, then sample


def score_table(groups: Iterable[tuple[str, Sequence[Trajectory]]], functions: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of plain data: for all sources together, and behind that for each source, one for each function.

    `groups`: the source and the trajectories of each prompt.
    """
    by_source: dict[str, list[Sequence[Trajectory]]] = {ALL: []}
    for source, trajectories in groups:
        by_source[ALL].append(trajectories)
        by_source.setdefault(source, []).append(trajectories)
    k = max((len(trajectories) for trajectories in by_source[ALL]), default=1)
    return [
        {"source": source, "function": function, **score([scored(one, function) for one in found], k)}
        for source, found in by_source.items()
        for function in functions
    ]


def scored(trajectories: Sequence[Trajectory], function: str) -> list[Scored]:
    """Those of a prompt's completions that the function has an opinion on."""
    values = ((one, one.rewards.get(function)) for one in trajectories if not one.error)
    return [Scored(value, one.answers.get(function)) for one, value in values if value is not None]


def score(prompts: Prompts, k: int) -> dict[str, Any]:
    """Counts, the mean value, the numbers above by name, and the 95% interval of mean@k; None where none is scored."""
    prompts = [prompt for prompt in prompts if prompt]
    completions = [one for prompt in prompts for one in prompt]
    counts = {"prompts": len(prompts), "completions": len(completions)}
    if not completions:
        return counts | {"value": None, "low": None, "high": None, "metrics": {}}
    shares = [fmean(one.is_right for one in prompt) for prompt in prompts]
    low, high = interval(shares, len(completions))
    metrics = {f"mean@{k}": fmean(shares)}
    if k > 1:
        metrics |= pass_at(prompts, k)
        if any(one.answer is not None for one in completions):
            metrics[f"maj@{k}"] = fmean(majority_is_right(prompt) for prompt in prompts)
    return counts | {"value": fmean(one.value for one in completions), "low": low, "high": high, "metrics": metrics}


def pass_at(prompts: Prompts, k: int) -> dict[str, float]:
    """pass@j for j = 1, 2, 4 and so on, and k."""
    found = {}
    for j in sorted({*(1 << power for power in range(k.bit_length())), k}):
        counts = [(len(prompt), sum(one.is_right for one in prompt)) for prompt in prompts if len(prompt) >= j]
        if counts:
            found[f"pass@{j}"] = fmean(chance_of_one(n, c, j) for n, c in counts)
    return found


def chance_of_one(n: int, c: int, j: int) -> float:
    """That j of n completions, c of them right, have a right one among them. 1 <= j <= n."""
    return 1.0 - comb(n - c, j) / comb(n, j)


def majority_is_right(prompt: Sequence[Scored]) -> bool:
    """Of an answer that was scored more than once, the first score counts."""
    first: dict[str, Scored] = {}
    for one in prompt:
        if one.answer is not None:
            first.setdefault(one.answer, one)
    votes = Counter(one.answer for one in prompt if one.answer is not None)  # in order of the first of each
    return bool(votes) and first[max(votes, key=lambda answer: votes[answer])].is_right


def interval(shares: Sequence[float], num_completions: int) -> tuple[float, float]:
    """95% interval of the mean of `shares`, one share of right completions for each prompt.

    Wilson's (1927), with the number of completions that would say as much if each were of a prompt of its own: the
    variance of that many equals the variance between prompts (the design effect of Kish 1965). One completion of each
    prompt: Wilson's own interval, but for n - 1 in the place of n.
    """
    mean, n = fmean(shares), float(len(shares))
    spread = variance(shares) if len(shares) > 1 else 0.0
    if spread > 0:
        n = min(n * mean * (1 - mean) / spread, num_completions)
    centre = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
