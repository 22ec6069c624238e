"""A batch's rows, and the mini-batches they are cut into. Pure.

Runs in every learner rank. That every rank cuts the same completions into the same mini-batches, without a word between
them, rests on `mini_batch_places`, which looks at the batch's reward table and at seeds only. Staleness is asserted
here, where it is used (`loss_rows`).

Legend: P groups of the batch, G completions of one group. A completion's place is group * G + sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learner.aggregation import Totals
from learner.batches import Mask, MicroBatch, Row, share_rows
from protocol.types import FinishReason, Share


@dataclass(frozen=True, eq=False)
class MiniBatch:
    """What one optimizer step trains."""

    micro_batches: list[MicroBatch]  # of this rank
    totals: Totals
    places: NDArray[np.int64]  # of its completions, of all ranks


def loss_rows(share: Share, bound: int, without_truncated: bool) -> list[Row]:
    """Rows of a share, without tokens older than `bound` where a remainder brings them.

    `without_truncated`: completions that were cut off at max_tokens have no token in the loss (DAPO's overlong
    filtering); their rewards stay in the baseline of their group.
    """
    left_out: list[Mask | None] = []
    for item in share.items:
        completion = item.completion
        mask = np.zeros(len(completion.tokens), np.bool_)
        if item.group in share.remainder_groups:
            for span in completion.spans:
                mask[span.start : span.end] = share.step - span.version > bound
        mask |= without_truncated and completion.finish_reason is FinishReason.LENGTH
        left_out.append(mask)
    rows = share_rows(share, left_out)
    for row in rows:
        oldest = row.versions[row.kept].min(initial=share.step)
        assert share.step - oldest <= bound, (
            f"step {share.step}: a token of version {oldest} is in the loss, S is {bound}"
        )
    return rows


def mini_batch_places(
    present: Mask, num_updates: int, num_epochs: int, seed: tuple[int, int]
) -> Iterator[NDArray[np.int64]]:
    """Places of the completions of each mini-batch, from the table [P, G] of which there are.

    Each epoch goes over the groups in an order of its own and is cut into `num_updates` parts of equal numbers of
    completions, to one; so a group is as a rule in one part. Parts without a completion are left out.
    """
    size = present.shape[1]
    for epoch in range(num_epochs):
        order = np.random.default_rng((*seed, epoch)).permutation(len(present))
        of_groups = [group * size + np.flatnonzero(present[group]) for group in order]
        places = np.concatenate([np.zeros(0, np.int64), *of_groups])
        yield from (part for part in np.array_split(places, num_updates) if len(part))
