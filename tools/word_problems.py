"""The demo's task: word problems in GSM8K's form (question, reasoning, `#### 12`), generated with a seed.

Pure; `tools/demo_task.py` writes the rows before a demo starts. A story has one or two changes, and there are two ways
to answer: to write the sums down ("7+5=12, 12-4=8."), or hastily, with a number at once that is right now and then. In
large problems the sums stand in GSM8K's own brackets ("<<407+125=532>>532"). The rows to train and to test with are
all worked. Those of the supervised warm start are of mixed quality, as collected answers are, and most are hasty,
about some people more than about others: a tiny model that imitates them has both habits and prefers the worse one.
Which one is worth having is what the reward teaches it. No question of the held-out rows stands in any other row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

LOWEST, HIGHEST = 2, 12
"""The numbers in the questions, both included."""
LARGE_LOWEST, LARGE_HIGHEST = 20, 99
"""The same of large problems, which a tiny model needs a calculator for."""
TWO_CHANGES = 0.6
"""Share of the stories with two changes; the others have one."""
LEAST_HASTY, MOST_HASTY = 0.5, 0.95
"""Shares of the demonstrations that answer at once: about the first of NAMES, and about the last."""
HASTY_AND_RIGHT = 0.5
"""How often such an answer is right."""

NAMES = ("Ann", "Ben", "Eva", "Finn", "Ida", "Leo", "Mia", "Noah", "Ola", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "kites", "pens", "shells", "stamps", "stones")
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("drops", "loses", "sells", "uses")
OPENINGS = ("{name} has {first} {things}", "{name} starts with {first} {things}")
QUESTIONS = (
    "How many {things} does {name} have now?",
    "How many {things} are there now?",
    "How many are there in the end?",
)


class Problem(NamedTuple):
    """One row, with GSM8K's column names."""

    question: str
    answer: str


def split(seed: int, num_train: int, num_held_out: int, *, large: bool = False) -> tuple[list[Problem], list[Problem]]:
    """Training rows and held-out rows; all questions differ."""
    problems = list(itertools.islice(_different(seed, large), num_held_out + num_train))
    return problems[num_held_out:], problems[:num_held_out]


def demonstrations(seed: int, number: int, num_held_out: int, *, large: bool = False) -> list[Problem]:
    """Rows of mixed quality to imitate; none has a question of the `num_held_out` rows that `split` holds out."""
    rng = np.random.Generator(np.random.PCG64([seed, 1]))
    problems = itertools.islice(_different(seed, large), num_held_out, num_held_out + number)
    shares = dict(zip(NAMES, np.linspace(LEAST_HASTY, MOST_HASTY, len(NAMES)), strict=True))
    return [
        _hasty(problem, rng) if rng.random() < shares[problem.question.split()[0]] else problem for problem in problems
    ]


def _different(seed: int, large: bool) -> Iterator[Problem]:
    """Problems without end, no question twice."""
    rng = np.random.Generator(np.random.PCG64(seed))
    seen: set[str] = set()
    while True:
        problem = _worked(rng, large)
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def _worked(rng: np.random.Generator, large: bool) -> Problem:
    """One problem with its sums; no amount in it falls below the lowest number."""
    lowest, highest = (LARGE_LOWEST, LARGE_HIGHEST) if large else (LOWEST, HIGHEST)
    numbers = [_number(rng, lowest, highest)]
    changes: list[tuple[str, int]] = []
    for _ in range(1 + (rng.random() < TWO_CHANGES)):
        change = _number(rng, lowest, highest)
        gains = rng.random() < 0.5 or numbers[-1] - change < lowest
        changes.append((_choice(rng, GAINS if gains else LOSSES), change if gains else -change))
        numbers.append(numbers[-1] + changes[-1][1])
    words = {"name": _choice(rng, NAMES), "things": _choice(rng, THINGS), "first": str(numbers[0])}
    story = " and ".join(f"{verb} {abs(change)}" for verb, change in changes)
    question = f"{_choice(rng, OPENINGS)}, {story}. {_choice(rng, QUESTIONS)}".format(**words)
    sums = zip(numbers, changes, numbers[1:], strict=False)
    form = "<<{}{:+d}={}>>{}" if large else "{}{:+d}={}"
    reasoning = ", ".join(form.format(before, change, after, after) for before, (_, change), after in sums)
    return Problem(question, f"{reasoning}.\n#### {numbers[-1]}")


def _hasty(problem: Problem, rng: np.random.Generator) -> Problem:
    """The same question, answered at once."""
    result = int(problem.answer.rpartition(" ")[2])
    if rng.random() >= HASTY_AND_RIGHT:
        result = int(rng.choice([result + error for error in range(-5, 6) if error and result + error >= LOWEST]))
    return Problem(problem.question, f"That makes {result}.\n#### {result}")


def _number(rng: np.random.Generator, lowest: int, highest: int) -> int:
    return int(rng.integers(lowest, highest, endpoint=True))


def _choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]
