"""Rows of a batch, made from a seed."""

from __future__ import annotations

import numpy as np

from learner.batches import Row

VOCAB = 200


def random_rows(seed: int, number: int) -> list[Row]:
    """Rows of unlike lengths, with tools' tokens, missing log-probabilities and corrections of 0 among them."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        length = int(rng.integers(1, 30))
        behavior = rng.normal(-5.0, 1.0, length).astype(np.float32)
        behavior[rng.random(length) < 0.1] = np.nan
        rows.append(
            Row(
                prompt_tokens=rng.integers(2, VOCAB, int(rng.integers(1, 12))).astype(np.int32),
                completion_tokens=rng.integers(2, VOCAB, length).astype(np.int32),
                in_loss=rng.random(length) < 0.9,
                behavior_logprobs=behavior,
                versions=np.zeros(length, dtype=np.int32),
                advantages=np.full(length, rng.normal(), dtype=np.float32),
                proximal_logprobs=behavior,
                corrections=np.where(rng.random(length) < 0.1, 0.0, rng.uniform(0.5, 2.0, length)).astype(np.float32),
            )
        )
    return rows
