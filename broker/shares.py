"""One batch -> one token-balanced share per learner rank.

Runs in the broker process; pure. Every share carries the reward table of the whole batch, so all ranks compute the
same advantages, whoever trains which completion. That they train the same batch rests on `batch_digest`. `cut_shares`
asserts once more that no token is staler than allowed, except in remainders, where the learner leaves it out of the
loss.

Legend: P groups of the batch, G completions of one prompt, T tokens of one completion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

from protocol.types import Completion, Group, Share, ShareItem

Table = NDArray[np.float32]


def cut_shares(
    epoch: int,
    step: int,
    groups: Sequence[Group],
    num_ranks: int,
    group_size: int,
    max_staleness: int,
    functions: Sequence[str] = (),
    has_greedy: bool = False,
) -> list[Share]:
    """The shares of ranks 0 .. num_ranks - 1: each completion goes whole to one rank; a rank may get none.

    `functions`: those whose rewards travel one by one. `has_greedy`: sample G of each prompt is a baseline, of which
    the learner needs the reward alone.
    """
    greedy_rewards = _greedy_rewards(groups, group_size) if has_greedy else np.zeros(0, np.float32)
    groups = [_without_greedy(group, group_size) for group in groups]
    items: list[ShareItem] = []
    total_tokens = 0
    for row, group in enumerate(groups):
        for trajectory in group.trajectories:
            completion = trajectory.completion
            assert completion is not None, f"a failed sample of prompt {trajectory.prompt} in a batch"
            stale = _stale_tokens(completion, step - max_staleness)
            assert group.remainder or not stale.any(), f"prompt {trajectory.prompt} is too old for step {step}"
            outside = stale if completion.observed is None else stale | completion.observed
            total_tokens += len(completion.tokens) - int(outside.sum())
            items.append(ShareItem(row, trajectory.sample, trajectory.prompt, group.prompt.tokens, completion))
    rewards, baseline_rewards = reward_tables(groups, group_size)
    remainders = frozenset(row for row, group in enumerate(groups) if group.remainder)
    by_function = function_rewards(groups, group_size, functions)
    digest = batch_digest(groups)
    return [
        Share(
            epoch,
            step,
            digest,
            rank,
            num_ranks,
            total_tokens,
            rewards,
            baseline_rewards,
            tuple(part),
            remainders,
            by_function,
            greedy_rewards,
        )
        for rank, part in enumerate(balance(items, num_ranks))
    ]


def balance(items: Iterable[ShareItem], num_ranks: int) -> list[list[ShareItem]]:
    """Items by rank: the longest first, each to the rank with the fewest tokens so far.

    No rank then has more than 4/3 - 1/(3 num_ranks) of the best possible maximum (Graham 1969, longest processing time
    first). Equal inputs give equal shares.
    """
    parts: list[list[ShareItem]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    heapify(loads)
    for item in sorted(items, key=lambda item: (-_num_tokens(item), item.group, item.sample)):
        tokens, rank = loads[0]
        heapreplace(loads, (tokens + _num_tokens(item), rank))
        parts[rank].append(item)
    return parts


def reward_tables(groups: Sequence[Group], group_size: int) -> tuple[Table, Table]:
    """Rewards [P, G] by sample, NaN where one is missing; baseline rewards [P, G], what statistics are taken from.

    The two differ for remainders only: their baseline is that of all samples of the prompt, in no particular column.
    """
    rewards = np.full((len(groups), group_size), np.nan, np.float32)
    for row, group in enumerate(groups):
        for trajectory in group.trajectories:
            rewards[row, trajectory.sample] = trajectory.reward
    baselines = rewards.copy()
    for row, group in enumerate(groups):
        if group.baseline_rewards:
            baselines[row] = np.nan
            baselines[row, : len(group.baseline_rewards)] = group.baseline_rewards
    return rewards, baselines


def function_rewards(groups: Sequence[Group], group_size: int, functions: Sequence[str]) -> Table:
    """Rewards [F, P, G] by function and sample, before any weight; NaN where one is missing or has no opinion."""
    table = np.full((len(functions), len(groups), group_size), np.nan, np.float32)
    for row, group in enumerate(groups):
        for trajectory in group.trajectories:
            for place, name in enumerate(functions):
                value = trajectory.rewards.get(name)
                if value is not None:
                    table[place, row, trajectory.sample] = value
    return table


def batch_digest(groups: Sequence[Group]) -> bytes:
    """16 bytes that name what is trained: prompts, attempts, samples and their tokens, in any order of the groups."""
    digest = hashlib.blake2b(digest_size=16)
    trajectories = (trajectory for group in groups for trajectory in group.trajectories)
    for trajectory in sorted(trajectories, key=lambda t: (t.prompt, t.attempt, t.sample)):
        assert trajectory.completion is not None, f"a failed sample of prompt {trajectory.prompt} in a batch"
        tokens = np.ascontiguousarray(trajectory.completion.tokens, dtype="<i4")
        head = (trajectory.prompt, trajectory.attempt, trajectory.sample, len(tokens))
        digest.update(np.array(head, dtype="<i8").tobytes())
        digest.update(tokens.tobytes())
    return digest.digest()


def _greedy_rewards(groups: Sequence[Group], group_size: int) -> Table:
    """Reward [P] of each group's sample G; NaN where it failed."""
    rewards = np.full(len(groups), np.nan, np.float32)
    for row, group in enumerate(groups):
        for trajectory in group.trajectories:
            if trajectory.sample == group_size:
                rewards[row] = trajectory.reward
    return rewards


def _without_greedy(group: Group, group_size: int) -> Group:
    sampled = tuple(trajectory for trajectory in group.trajectories if trajectory.sample < group_size)
    return replace(group, trajectories=sampled)


def _stale_tokens(completion: Completion, oldest_allowed: int) -> NDArray[np.bool_]:
    """Tokens [T] that are older than the bound lets into a loss."""
    stale = np.zeros(len(completion.tokens), np.bool_)
    for span in completion.spans:
        stale[span.start : span.end] = span.version < oldest_allowed
    return stale


def _num_tokens(item: ShareItem) -> int:
    """What a completion costs a rank: its tokens and its prompt's."""
    return len(item.prompt_tokens) + len(item.completion.tokens)
