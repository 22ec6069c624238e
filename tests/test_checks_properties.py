"""What may enter a batch, token by token: each must have exactly one version, possible and not older than the last."""

from __future__ import annotations

from itertools import product
from operator import itemgetter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.checks import MAX_LOGPROB, MAX_MISSING_SHARE
from tests.test_checks import LIMITS, refusal


def test_spans_are_taken_exactly_when_each_token_has_one_possible_version() -> None:
    """Tried with every pair of spans there is, of two possible versions, one that is too old and one too new."""
    possible = LIMITS["versions"]
    versions = (possible.start - 1, possible.start, possible.start + 1, possible.stop)
    every_span = list(product(versions, range(4), range(4)))
    num_taken = 0
    for length, spans in product((1, 2, 3), [(), *product(every_span), *product(every_span, every_span)]):
        by_token = [[version for version, start, end in spans if start <= place < end] for place in range(length)]
        has_one_each = all(len(found) == 1 for found in by_token)
        found = [version for versions in by_token for version in versions]
        is_tidy = all(start < end <= length for _, start, end in spans) and list(spans) == sorted(
            spans, key=itemgetter(1)
        )
        is_right = has_one_each and is_tidy and found == sorted(found) and set(found) <= set(possible)
        assert (refusal(length=length, spans=list(spans)) == "") == is_right, (length, spans)
        num_taken += is_right
    assert num_taken == 15  # of each length one span of 2 versions; two spans of 3 pairs of versions, cut anywhere


@settings(max_examples=80)
@given(data=st.data(), length=st.sampled_from([1, 3, 100, 200]), num_missing=st.integers(0, 3))
def test_log_probabilities_are_taken_exactly_when_they_can_be_some(
    data: st.DataObject, length: int, num_missing: int
) -> None:
    values = np.full(length, -1.0, np.float32)
    values[: min(num_missing, length)] = np.nan
    values[-1] = odd = data.draw(st.floats(width=32) | st.floats(-1 / 64, 1 / 64, width=32))
    observed = data.draw(st.none() | st.lists(st.booleans(), min_size=length, max_size=length))
    is_possible = odd != odd or (odd <= MAX_LOGPROB and odd != float("-inf"))
    own = [value for value, told in zip(values.tolist(), observed or [False] * length, strict=True) if not told]
    missing = sum(value != value for value in own)
    marks = np.zeros(0, np.bool_) if observed is None else np.array(observed)
    said = refusal(length=length, behavior_logprobs=values, has_observed=observed is not None, observed=marks)
    assert (said == "") == (bool(own) and is_possible and missing <= MAX_MISSING_SHARE * len(own))
