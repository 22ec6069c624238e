"""Shares on the wire: one rank's completions as pages of flat arrays, and back.

A page stays below the frame limit, so a batch of any size travels. `join_pages` is the inverse of `split_pages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from protocol.errors import ProtocolError
from protocol.messages import SharePage
from protocol.types import Completion, FinishReason, Share, ShareItem, VersionSpan

PAGE_BYTES = 4 << 20  # of token arrays; half of the codec's limit leaves room for the rest of the page


def split_pages(share: Share, page_bytes: int = PAGE_BYTES) -> list[SharePage]:
    """At least one page, even for an empty share; every page but the last is as full as it can be."""
    runs: list[list[ShareItem]] = [[]]
    size = 0
    for item in share.items:
        item_bytes = 4 * len(item.prompt_tokens) + 9 * len(item.completion.tokens)
        if runs[-1] and size + item_bytes > page_bytes:
            runs.append([])
            size = 0
        runs[-1].append(item)
        size += item_bytes
    return [_page(share, items, number, len(runs)) for number, items in enumerate(runs)]


def join_pages(pages: Sequence[SharePage], epoch: int, rank: int, num_ranks: int) -> Share:
    """The share whose pages these are, in any order; a page that came twice counts once.

    Raises ProtocolError if they are not all the pages of one share, or their arrays contradict each other.
    """
    pages = _complete(pages)
    first = pages[0]
    try:
        items = tuple(item for page in pages for item in _items(page))
        _check_places(items, first)
    except ValueError as error:
        raise ProtocolError(
            "share", f"the arrays of step {first.step}'s share contradict each other: {error}"
        ) from None
    return Share(
        epoch,
        first.step,
        first.batch_digest,
        rank,
        num_ranks,
        first.total_tokens,
        first.rewards,
        first.baseline_rewards,
        items,
        frozenset(first.remainder_groups.tolist()),
        first.function_rewards,
        first.greedy_rewards,
    )


def _page(share: Share, items: list[ShareItem], number: int, num_pages: int) -> SharePage:
    spans = [span for item in items for span in item.completion.spans]
    tables = number == 0
    empty = np.zeros((0, 0), np.float32)
    return SharePage(
        step=share.step,
        batch_digest=share.batch_digest,
        page=number,
        num_pages=num_pages,
        total_tokens=share.total_tokens,
        groups=_ints(item.group for item in items),
        samples=_ints(item.sample for item in items),
        prompts=np.fromiter((item.prompt for item in items), np.int64),
        prompt_lengths=_ints(len(item.prompt_tokens) for item in items),
        lengths=_ints(len(item.completion.tokens) for item in items),
        span_counts=_ints(len(item.completion.spans) for item in items),
        spans=np.array(spans, np.int32).reshape(-1),
        truncated=np.fromiter((item.completion.finish_reason is FinishReason.LENGTH for item in items), np.bool_),
        prompt_tokens=_joined([item.prompt_tokens for item in items], np.int32),
        tokens=_joined([item.completion.tokens for item in items], np.int32),
        behavior_logprobs=_joined([item.completion.behavior_logprobs for item in items], np.float32),
        observed=_joined([_observed(item.completion) for item in items], np.bool_),
        rewards=share.rewards if tables else empty,
        baseline_rewards=share.baseline_rewards if tables else empty,
        remainder_groups=_ints(sorted(share.remainder_groups) if tables else ()),
        function_rewards=share.function_rewards if tables else np.zeros((0, 0, 0), np.float32),
        greedy_rewards=share.greedy_rewards if tables else np.zeros(0, np.float32),
    )


def _complete(pages: Sequence[SharePage]) -> list[SharePage]:
    """Each page of the share once, in order."""
    shares = {(page.step, page.batch_digest, page.num_pages) for page in pages}
    if len(shares) != 1:
        raise ProtocolError("share", f"expected the pages of one share, got those of {len(shares)}")
    by_number = {page.page: page for page in pages}
    num_pages = pages[0].num_pages
    if len(by_number) != num_pages or max(by_number) >= num_pages:
        raise ProtocolError("share", f"expected {num_pages} pages, got numbers {sorted(by_number)[:8]}")
    return [by_number[number] for number in range(num_pages)]


def _items(page: SharePage) -> list[ShareItem]:
    """Raises ValueError if the arrays do not describe the same number of completions."""
    prompts = _cut(page.prompt_tokens, page.prompt_lengths)
    tokens = _cut(page.tokens, page.lengths)
    logprobs = _cut(page.behavior_logprobs, page.lengths)
    observed = _cut(page.observed, page.lengths)
    spans = _cut(page.spans.reshape(-1, 3), page.span_counts)
    columns = (page.groups, page.samples, page.prompts, page.truncated, prompts, tokens, spans)
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"they describe {sorted({len(column) for column in columns})} completions")
    items: list[ShareItem] = []
    for index in range(len(page.groups)):
        completion = Completion(
            tokens[index],
            logprobs[index],
            tuple(VersionSpan(*map(int, span)) for span in spans[index]),
            FinishReason.LENGTH if page.truncated[index] else FinishReason.STOP,
            observed[index] if observed[index].any() else None,
        )
        item = ShareItem(
            int(page.groups[index]), int(page.samples[index]), int(page.prompts[index]), prompts[index], completion
        )
        items.append(item)
    return items


def _check_places(items: Sequence[ShareItem], first: SharePage) -> None:
    """Raise ValueError unless every completion has a place in the reward table."""
    if first.baseline_rewards.shape != first.rewards.shape:
        raise ValueError(f"reward tables of {first.rewards.shape} and {first.baseline_rewards.shape}")
    if len(first.function_rewards) and first.function_rewards.shape[1:] != first.rewards.shape:
        raise ValueError(f"reward tables of {first.rewards.shape} and, by function, {first.function_rewards.shape}")
    if len(first.greedy_rewards) not in (0, len(first.rewards)):
        raise ValueError(f"{len(first.greedy_rewards)} greedy rewards of {len(first.rewards)} groups")
    rows, columns = first.rewards.shape
    for item in items:
        if not (0 <= item.group < rows and 0 <= item.sample < columns):
            raise ValueError(f"group {item.group}, sample {item.sample} of a reward table of {rows} by {columns}")


def _cut(flat: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Views of consecutive runs; their lengths must use up the array exactly."""
    if len(lengths) and lengths.min() < 0:
        raise ValueError(f"a length of {lengths.min()}")
    ends = list(accumulate(map(int, lengths), initial=0))
    if ends[-1] != len(flat):
        raise ValueError(f"lengths add up to {ends[-1]}, the array has {len(flat)}")
    return [flat[start:end] for start, end in pairwise(ends)]


def _ints(values: Any) -> np.ndarray[Any, Any]:
    return np.fromiter(values, np.int32)


def _joined(arrays: list[Any], dtype: Any) -> np.ndarray[Any, Any]:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def _observed(completion: Completion) -> np.ndarray[Any, Any]:
    return np.zeros(len(completion.tokens), np.bool_) if completion.observed is None else completion.observed
