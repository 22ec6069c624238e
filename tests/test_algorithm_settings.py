"""Settings of the algorithm that exclude each other: refused, with what to set instead."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from protocol.config import GROUP_RELATIVE, Config

REFUSED: list[tuple[dict[str, dict[str, Any]], str]] = [
    *(
        ({"batch": {"group_size": 1}, "algorithm": {"advantage": name}}, "group_size must be at least 2")
        for name in GROUP_RELATIVE
    ),
    *(
        ({"algorithm": {"advantage": name, "filter_equal_groups": True}}, f"equal rewards have a signal for {name}")
        for name in ("gae", "gdpo", "remax", "reinforce_plus_plus")
    ),
    ({"algorithm": {"dual_clip": 1.0}}, "dual_clip bounds the ratio from above and must be more than 1, got 1"),
    ({"kl": {"coef": 0.1, "place": "reward"}}, "a KL in the reward is a reward of each token, which grpo does not"),
    (
        {"algorithm": {"advantage": "remax"}, "staleness": {"at_bound": "split"}},
        "remax compares with a greedy completion",
    ),
    ({"algorithm": {"ratio": "behavior"}}, "set corrections.weight none, or algorithm.ratio proximal"),
    ({"corrections": {"low": 3.0}}, "between corrections.low and corrections.high, got 3 and 2"),
]

ACCEPTED: list[dict[str, dict[str, Any]]] = [
    *(
        {"batch": {"group_size": 1}, "algorithm": {"advantage": name}}
        for name in ("gae", "reinforce_plus_plus", "remax")
    ),
    *({"algorithm": {"advantage": name, "filter_equal_groups": True}} for name in ("grpo", "rloo")),
    {"algorithm": {"dual_clip": 3.0}},
    {"kl": {"coef": 0.0, "place": "reward"}},
    {"kl": {"coef": 0.1, "place": "reward"}, "algorithm": {"advantage": "reinforce_plus_plus"}},
    {"algorithm": {"ratio": "behavior"}, "corrections": {"weight": "none", "negative_kl_mask": 0.1}},
    {"corrections": {"low": 2.0}},
]


@pytest.mark.parametrize(("sections", "said"), REFUSED, ids=str)
def test_settings_that_contradict_each_other_are_refused(sections: dict[str, dict[str, Any]], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Config.model_validate(sections)


@pytest.mark.parametrize("sections", ACCEPTED, ids=str)
def test_settings_that_fit_together_are_accepted(sections: dict[str, dict[str, Any]]) -> None:
    Config.model_validate(sections)
