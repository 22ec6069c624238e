"""The demo's task: word problems in GSM8K's form (question, reasoning, `#### 12`), generated with a seed.

Pure; run by `tools/tiny_task.py` before a demo starts. Sums and differences of numbers between 2 and 25. No question of the
held-out rows is asked in the training rows: `split` draws both from one list without repeats.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

LOWEST, HIGHEST = 2, 25
"""The numbers in the questions, both included."""

NAMES = ("Ann", "Ben", "Eva", "Finn", "Ida", "Leo", "Mia", "Noah", "Ola", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "kites", "pens", "shells", "stamps", "stones")


class Template(NamedTuple):
    """One way to ask; `sign` is what the reasoning computes."""

    sign: str
    question: str
    reasoning: str


TEMPLATES = (
    Template("+", "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?", "{name} has {sum} {things}."),
    Template("+", "{name} has {a} {things} and {other} has {b}. How many do they have together?", "They have {sum} {things}."),
    Template("+", "There are {a} {things} in a box and {b} in a bag. How many {things} are there?", "There are {sum} {things}."),
    Template("+", "{name} needs {a} {things} on Monday and {b} on Friday. How many is that?", "{name} needs {sum} {things}."),
    Template("-", "{name} has {a} {things} and gives {b} to {other}. How many does {name} have now?", "{name} has {sum} {things}."),
    Template("-", "{name} has {a} {things} and {other} has {b}. How many more does {name} have?", "{name} has {sum} more {things}."),
    Template("-", "There are {a} {things} in a box. {name} takes {b}. How many are left?", "There are {sum} {things} left."),
    Template("-", "{name} needs {a} {things} and has {b}. How many are missing?", "{name} needs {sum} more {things}."),
)


class Problem(NamedTuple):
    """One row, with GSM8K's column names."""

    question: str
    answer: str


def split(seed: int, num_train: int, num_held_out: int) -> tuple[list[Problem], list[Problem]]:
    """Training rows and held-out rows; all questions differ."""
    seen: dict[str, Problem] = {}
    for problem in _endless(seed):
        seen.setdefault(problem.question, problem)
        if len(seen) == num_train + num_held_out:
            break
    rows = list(seen.values())
    return rows[:num_train], rows[num_train:]


def every_wording() -> Iterator[Problem]:
    """Each template with each name and thing: all words that `split` can ever use."""
    for template, (name, other), things in itertools.product(TEMPLATES, zip(NAMES, reversed(NAMES), strict=True), THINGS):
        yield _fill(template, name, other, things, HIGHEST, LOWEST)


def _endless(seed: int) -> Iterator[Problem]:
    rng = np.random.Generator(np.random.PCG64(seed))
    while True:
        template = TEMPLATES[rng.integers(len(TEMPLATES))]
        name, other = (NAMES[i] for i in rng.choice(len(NAMES), size=2, replace=False))
        a, b = (int(n) for n in rng.integers(LOWEST, HIGHEST, size=2, endpoint=True))
        if template.sign == "-":
            if abs(a - b) < 2:
                continue
            a, b = max(a, b), min(a, b)
        yield _fill(template, name, other, THINGS[rng.integers(len(THINGS))], a, b)


def _fill(template: Template, name: str, other: str, things: str, a: int, b: int) -> Problem:
    result = a + b if template.sign == "+" else a - b
    words = {"name": name, "other": other, "things": things, "a": a, "b": b, "sum": f"{a}{template.sign}{b}={result}"}
    return Problem(template.question.format(**words), f"{template.reasoning.format(**words)}\n#### {result}")
