"""The demo's task: word problems in GSM8K's form (question, reasoning, `#### 12`), generated with a seed.

Pure; `tools/tiny_task.py` writes its rows before a demo starts. A story has one or two changes. Most rows answer in one go
("Tom has 8 apples."), the others write the sums down first ("7+5=12, 12-4=8."). A tiny model that was warmed up on these rows
has both habits and prefers the first, which it does badly. Which one is worth having is what the reward teaches it.
No question of the held-out rows is asked in the training rows: `split` draws both from one list without repeats.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

LOWEST, HIGHEST = 2, 12
"""The numbers in the questions, both included."""
TWO_CHANGES = 0.7
"""Share of the stories with two changes."""
WORKED = 0.4
"""Share of the rows that write their sums down."""

NAMES = ("Ann", "Ben", "Eva", "Finn", "Ida", "Leo", "Mia", "Noah", "Ola", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "kites", "pens", "shells", "stamps", "stones")
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("drops", "loses", "sells", "uses")
OPENINGS = ("{name} has {first} {things}", "{name} starts with {first} {things}")
QUESTIONS = ("How many {things} does {name} have now?", "How many {things} are there now?", "How many are there in the end?")


class Problem(NamedTuple):
    """One row, with GSM8K's column names."""

    question: str
    answer: str


def split(seed: int, num_train: int, num_held_out: int) -> tuple[list[Problem], list[Problem]]:
    """Training rows and held-out rows; all questions differ."""
    rng = np.random.Generator(np.random.PCG64(seed))
    rows: dict[str, Problem] = {}
    while len(rows) < num_train + num_held_out:
        problem = draw(rng)
        rows.setdefault(problem.question, problem)
    problems = list(rows.values())
    return problems[:num_train], problems[num_train:]


def draw(rng: np.random.Generator) -> Problem:
    """One problem; no amount in it falls below `LOWEST`."""
    numbers = [_number(rng)]
    changes: list[tuple[str, int]] = []
    for _ in range(1 + (rng.random() < TWO_CHANGES)):
        change = _number(rng)
        gains = rng.random() < 0.5 or numbers[-1] - change < LOWEST
        changes.append((_choice(rng, GAINS if gains else LOSSES), change if gains else -change))
        numbers.append(numbers[-1] + changes[-1][1])
    words = {"name": _choice(rng, NAMES), "things": _choice(rng, THINGS), "first": str(numbers[0]), "last": str(numbers[-1])}
    story = " and ".join(f"{verb} {abs(change)}" for verb, change in changes)
    question = f"{_choice(rng, OPENINGS)}, {story}. {_choice(rng, QUESTIONS)}".format(**words)
    if rng.random() < WORKED:
        sums = zip(numbers, changes, numbers[1:], strict=False)
        reasoning = ", ".join(f"{before}{change:+d}={after}" for before, (_, change), after in sums) + "."
    else:
        reasoning = "{name} has {last} {things}.".format(**words)
    return Problem(question, f"{reasoning}\n#### {numbers[-1]}")


def _number(rng: np.random.Generator) -> int:
    return int(rng.integers(LOWEST, HIGHEST, endpoint=True))


def _choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]
