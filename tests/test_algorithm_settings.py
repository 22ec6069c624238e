"""Settings of the algorithm that exclude each other: refused, with what to set instead."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from protocol.algorithm import GROUP_RELATIVE
from protocol.config import Config

REFUSED: list[tuple[dict[str, dict[str, Any]], str]] = [
    *(
        ({"batch": {"group_size": 1}, "algorithm": {"advantage": name}}, "group_size must be at least 2")
        for name in GROUP_RELATIVE
    ),
    *(
        ({"algorithm": {"advantage": name, "filter_equal_groups": True}}, f"equal rewards have a signal for {name}")
        for name in ("gae", "gdpo", "remax", "reinforce_plus_plus")
    ),
    (
        {"algorithm": {"updates_per_batch": 9}, "batch": {"prompts": 2, "group_size": 4}},
        "at most the completions of a batch, 8, got 9",
    ),
    (
        {"lora": {"rank": 4}, "vllm": {"pipeline_parallel_size": 2}},
        "one pipeline stage, got vllm.pipeline_parallel_size 2",
    ),
    (
        {"lora": {"rank": 4}, "kl": {"coef": 0.1, "reference_update_every": 5}},
        "with adapters the reference model is the weights below them",
    ),
    ({"algorithm": {"dual_clip": 1.0}}, "dual_clip bounds the ratio from above and must be more than 1, got 1"),
    ({"kl": {"coef": 0.1, "place": "reward"}}, "a KL in the reward is a reward of each token, which grpo does not"),
    (
        {"algorithm": {"advantage": "remax"}, "staleness": {"at_bound": "split"}},
        "remax compares with a greedy completion",
    ),
    ({"algorithm": {"ratio": "behavior"}}, "set corrections.weight none, or algorithm.ratio proximal"),
    ({"corrections": {"low": 1.5}}, "have 1 between them, .* got 1.5 and 2"),
    ({"corrections": {"high": 0.5}}, "have 1 between them, .* got 0 and 0.5"),
    ({"corrections": {"weight": "none", "bound": "mask"}}, "mask is a bound of weights"),
    (
        {"algorithm": {"advantage": "gae"}, "critic": {"warmup_steps": 5}, "run": {"steps": 5}},
        "warmup_steps must be less than run.steps, .* 5 and 5",
    ),
    ({"kl": {"target": 0.1}}, "kl.target moves what a coefficient of 0 leaves out"),
    ({"kl": {"reference_update_every": 5}}, "kl.reference_update_every moves what"),
    *(
        (
            {"kl": {"coef": 0.1, "place": "reward", name: True}, "algorithm": {"advantage": "gae"}},
            f"kl.{name} shapes a gradient",
        )
        for name in ("straight_through", "with_ratio")
    ),
    (
        {"algorithm": {"overlong": "punish", "overlong_buffer_tokens": 40}, "sampling": {"max_tokens": 40}},
        "less than sampling.max_tokens, .* got 40 and 40",
    ),
    ({"rewards": {"functions": [{"use": "a/r.py:f"}, {"use": "b/r.py:f"}]}}, "got two called r:f"),
]

ACCEPTED: list[dict[str, dict[str, Any]]] = [
    *(
        {"batch": {"group_size": 1}, "algorithm": {"advantage": name}}
        for name in ("gae", "reinforce_plus_plus", "remax")
    ),
    *({"algorithm": {"advantage": name, "filter_equal_groups": True}} for name in ("grpo", "rloo")),
    {"algorithm": {"dual_clip": 3.0}},
    {"algorithm": {"updates_per_batch": 8}, "batch": {"prompts": 2, "group_size": 4}},
    {"vllm": {"pipeline_parallel_size": 2}},
    {"lora": {"rank": 4}, "vllm": {"tensor_parallel_size": 2}},
    {"critic": {"warmup_steps": 5}, "run": {"steps": 5}},
    {"kl": {"coef": 0.0, "place": "reward"}},
    {"kl": {"coef": 0.1, "place": "reward"}, "algorithm": {"advantage": "reinforce_plus_plus"}},
    {"algorithm": {"ratio": "behavior"}, "corrections": {"weight": "none", "negative_kl_mask": 0.1}},
    {"corrections": {"low": 1.0, "high": 1.0}},
    {"algorithm": {"overlong": "punish", "overlong_buffer_tokens": 39}, "sampling": {"max_tokens": 40}},
    {"rewards": {"functions": [{"use": "a.py:f"}, {"use": "b.py:f"}]}},
]


@pytest.mark.parametrize(("sections", "said"), REFUSED, ids=str)
def test_settings_that_contradict_each_other_are_refused(sections: dict[str, dict[str, Any]], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Config.model_validate(sections)


@pytest.mark.parametrize("sections", ACCEPTED, ids=str)
def test_settings_that_fit_together_are_accepted(sections: dict[str, dict[str, Any]]) -> None:
    Config.model_validate(sections)
