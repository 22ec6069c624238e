"""Whole batches as shares, made from a seed: with completions that were cut off, tools' tokens and a missing sample."""

from __future__ import annotations

import numpy as np

from protocol.types import Completion, FinishReason, Share, ShareItem, VersionSpan
from tests.rows import VOCAB

STEP = 5


def random_share(seed: int, groups: int = 3, size: int = 4, rank: int = 0, num_ranks: int = 1) -> Share:
    """The share of a rank of one batch; sample 0 of group 1 failed, and the last group's rewards are all equal."""
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 3, (groups, size)).astype(np.float32) / 2
    rewards[0, :2] = (0.0, 1.0)
    rewards[-1] = 0.1
    by_function = np.stack([rewards, rng.random((groups, size), np.float32)])
    rewards[1, 0] = np.nan
    items = []
    for place in np.flatnonzero(~np.isnan(rewards)).tolist():
        length = int(rng.integers(2, 20))
        middle = int(rng.integers(0, length))
        spans = [VersionSpan(STEP - 2, 0, middle), VersionSpan(STEP, middle, length)]
        logprobs = rng.normal(-5.0, 1.0, length).astype(np.float32)
        observed = rng.random(length) < 0.1
        completion = Completion(
            rng.integers(2, VOCAB, length).astype(np.int32),
            logprobs,
            tuple(span for span in spans if span.end > span.start),
            FinishReason.LENGTH if rng.random() < 0.3 else FinishReason.STOP,
            observed if observed.any() and not observed.all() else None,
        )
        prompt = rng.integers(2, VOCAB, int(rng.integers(1, 6))).astype(np.int32)
        items.append(ShareItem(place // size, place % size, 100 + place // size, prompt, completion))
    greedy = rng.random(groups, np.float32)
    return Share(
        9,
        STEP,
        b"d" * 16,
        rank,
        num_ranks,
        0,
        rewards,
        rewards,
        tuple(items[rank::num_ranks]),
        function_rewards=by_function,
        greedy_rewards=greedy,
    )
