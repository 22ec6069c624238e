"""Tiny reward models made on the spot: a folder that `rewards.model.path` may name, and what a plain call says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

EOS, PAD = "<end>", "<pad>"
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_reward_model(
    folder: Path,
    *,
    pad: str | None = PAD,
    chat: bool = True,
    labels: int = 1,
    broken: bool = False,
    encoder: bool = False,
) -> Path:
    """Random weights, and a tokenizer of single characters: not one of any policy.

    `broken`: every score is NaN. `encoder`: a model that reads in both directions, and scores its first token.
    """
    names = ["<unk>", EOS, PAD, *map(chr, range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=EOS, pad_token=pad)
    fast.chat_template = TEMPLATE if chat else None
    fast.save_pretrained(folder)
    sizes = {
        "vocab_size": len(names),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "num_labels": labels,
        "pad_token_id": None if pad is None else names.index(pad),
    }
    model: Any
    if encoder:
        model = BertForSequenceClassification(BertConfig(**sizes)).float()
    else:
        model = Qwen2ForSequenceClassification(Qwen2Config(num_key_value_heads=1, **sizes)).float()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name))
        if broken:
            model.score.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def plain_score(folder: Path, messages: Sequence[Mapping[str, str]], completion: str, label: int = 0) -> float:
    """One conversation, one call of transformers, nothing padded."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    if tokenizer.chat_template:
        whole = [*messages, {"role": "assistant", "content": completion}]
        text = tokenizer.apply_chat_template(whole, tokenize=False)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        text = "\n".join(message["content"] for message in messages) + completion
        inputs = tokenizer(text, return_tensors="pt")
    return float(model(**inputs).logits[0, label])
