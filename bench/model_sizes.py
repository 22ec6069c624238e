"""Shapes of models and the batches they are measured with. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

GROUP_SIZE = 8


class Size(NamedTuple):
    """A model's shape, as Qwen2 names it, and its batch."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    prompts: int
    prompt_tokens: int  # of each prompt
    completion_tokens: int  # of the longest; lengths are spread evenly


SIZES: Mapping[str, Size] = {
    "tiny": Size(500, 32, 64, 2, 2, 1, 2, 8, 24),
    "small": Size(8_192, 256, 1_024, 4, 4, 2, 2, 40, 200),
    "0.5B": Size(151_936, 896, 4_864, 24, 14, 2, 16, 200, 1_000),
    "1.5B": Size(151_936, 1_536, 8_960, 28, 12, 2, 16, 200, 1_000),
}
