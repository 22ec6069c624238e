"""The learning rate at every step of every schedule: between its ends, never up after warm-up, and symmetric."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.schedule import learning_rate

Kind = Literal["constant", "linear", "cosine"]
KINDS: st.SearchStrategy[Kind] = st.sampled_from(["constant", "linear", "cosine"])


@settings(max_examples=100)
@given(kind=KINDS, total=st.integers(1, 40), warmup=st.integers(0, 45), low=st.floats(0, 1))
def test_a_rate_rises_in_equal_steps_to_its_peak_and_then_falls_to_its_minimum(
    kind: Kind, total: int, warmup: int, low: float
) -> None:
    peak = 1.0
    rates = [learning_rate(step, total, peak, kind, warmup, low) for step in range(total + 1)]
    for step in range(min(warmup, total)):
        assert rates[step] == pytest.approx((step + 1) * peak / warmup)
    after = rates[warmup:]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(after))
    assert all(low - 1e-12 <= rate <= peak for rate in after)
    if after and warmup < total:
        assert after[0] == peak
        assert after[-1] == pytest.approx(peak if kind == "constant" else low, abs=1e-12)


@settings(max_examples=60)
@given(kind=st.sampled_from(["linear", "cosine"]), half=st.integers(1, 20), warmup=st.integers(0, 9))
def test_a_decay_is_symmetric_about_its_middle(kind: Kind, half: int, warmup: int) -> None:
    total = warmup + 2 * half
    for ahead in range(half + 1):
        early = learning_rate(warmup + ahead, total, 1.0, kind, warmup, 0.2)
        late = learning_rate(total - ahead, total, 1.0, kind, warmup, 0.2)
        assert early + late == pytest.approx(1.2)


@settings(max_examples=60)
@given(kind=KINDS, step=st.integers(0, 60), factor=st.floats(0.001, 1000), warmup=st.integers(0, 20))
def test_rates_scale_with_their_peak(kind: Kind, step: int, factor: float, warmup: int) -> None:
    whole = learning_rate(step, 40, 1.0, kind, warmup, 0.1)
    assert learning_rate(step, 40, factor, kind, warmup, 0.1 * factor) == pytest.approx(factor * whole)
