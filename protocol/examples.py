"""Prompts with wanted answers as flat arrays in one .npz file; the broker writes it for the learner's warm start."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protocol.errors import ConfigError
from protocol.types import Tokens

WARMUP_FILE = "warmup.npz"  # in the run folder


class Example(NamedTuple):
    """A prompt and the answer that is wanted, tokenised; the answer ends with the end-of-sequence token."""

    prompt_tokens: Tokens
    answer_tokens: Tokens


def write_examples(path: Path, examples: Iterable[tuple[Tokens, Tokens]]) -> int:
    """Write them whole or not at all; returns how many. Raises ConfigError if there are none."""
    pairs = list(examples)
    if not pairs:
        raise ConfigError(
            "the supervised warm start needs rows with a text answer, there are none; "
            "set warmup.steps=0 or data.answer_column"
        )
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        np.savez(
            file,
            prompts=np.concatenate([prompt for prompt, _ in pairs]),
            prompt_lengths=[len(prompt) for prompt, _ in pairs],
            answers=np.concatenate([answer for _, answer in pairs]),
            answer_lengths=[len(answer) for _, answer in pairs],
        )
    os.replace(aside, path)
    return len(pairs)


def read_examples(path: Path) -> list[Example]:
    with np.load(path, allow_pickle=False) as arrays:
        prompts = _cut(arrays["prompts"], arrays["prompt_lengths"])
        answers = _cut(arrays["answers"], arrays["answer_lengths"])
    return [Example(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _cut(flat: np.ndarray, lengths: np.ndarray) -> list[Tokens]:
    ends = list(accumulate(lengths.tolist(), initial=0))
    return [flat[start:end].astype(np.int32) for start, end in pairwise(ends)]
