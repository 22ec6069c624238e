"""A task that a tiny model learns within a few steps: to write words of odd number, of a vocabulary of 12.

The model has one layer and small logits, so that it begins with all words alike, the end of sequence among them: of
completions of up to ten tokens half end by themselves.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.models import make_tiny_qwen2

VOCABULARY = 12
MAX_TOKENS = 10
NUM_ROWS = 80
REWARDS = """def odd(completion, answer):
    words = completion.split()
    return sum(int(word[1:]) % 2 for word in words) / max(1, len(words))


def low(completion, answer):
    words = completion.split()
    return sum(int(word[1:]) < 7 for word in words) / max(1, len(words))
"""
"""Each is 0.5 of random words."""


def make_easy_task(folder: Path) -> Path:
    """Model, data and reward code in `folder`."""
    model = make_tiny_qwen2(folder / "model", tied=False, vocab=VOCABULARY, num_layers=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.1)
    model.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    questions = [f"w{2 + row % 10} w{2 + row * 7 % 10}" for row in range(NUM_ROWS)]
    rows = [json.dumps({"question": question, "answer": "none"}) for question in questions]
    (folder / "data" / "train.jsonl").write_text("\n".join(rows))
    (folder / "reward.py").write_text(REWARDS)
    return folder
