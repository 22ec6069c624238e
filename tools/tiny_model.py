"""Writes a model folder that is made on the spot: a small tokenizer with a chat template, and a tiny random Qwen2.

Run by `tools/demo_task.py`, without torch: the weights are drawn with numpy, so a seed gives the same file everywhere.
`transformers` and vLLM load the folder like any other. The tokenizer gives single digits, because a tiny model adds
digit by digit, and decodes to exactly the text that was encoded, so rewards that read text work.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

PAD, USER, ASSISTANT, SYSTEM, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
SPECIAL_TOKENS = (PAD, USER, ASSISTANT, SYSTEM, END)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2's tokenizer splits text before it merges; `transformers` puts this in whatever a Qwen2 folder says."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Qwen2 with tied embeddings."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    intermediate: int = 512
    positions: int = 512
    std: float = 0.05  # of the random weights; after 500 steps of one seed 89% right, with the usual 0.02 only 72%


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Qwen2's byte-level BPE, trained on the texts until `vocabulary` tokens or until every word is one token.

    It gives single digits and can write any text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_model(folder: Path, tokenizer: Tokenizer, shape: Shape, seed: int) -> int:
    """Writes tokenizer, config and random weights; returns the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(shape))
    end, pad = (SPECIAL_TOKENS.index(token) for token in (END, PAD))  # the trainer numbers them first, in this order
    _write_json(folder / "config.json", _model_config(shape, tokenizer.get_vocab_size(), end, pad))
    _write_json(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": pad})
    weights = dict(_weights(shape, tokenizer.get_vocab_size(), np.random.Generator(np.random.PCG64(seed))))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(weight.size for weight in weights.values())


def _weights(shape: Shape, vocabulary: int, rng: np.random.Generator) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names and shapes as Qwen2ForCausalLM has them; normal, but for biases and norms."""

    def normal(*size: int) -> NDArray[np.float32]:
        return (shape.std * rng.standard_normal(size)).astype(np.float32)

    hidden, wide = shape.hidden, shape.intermediate
    yield "model.embed_tokens.weight", normal(vocabulary, hidden)
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        for part in ("q", "k", "v"):
            yield f"{name}.self_attn.{part}_proj.weight", normal(hidden, hidden)
            yield f"{name}.self_attn.{part}_proj.bias", np.zeros(hidden, np.float32)
        yield f"{name}.self_attn.o_proj.weight", normal(hidden, hidden)
        yield f"{name}.mlp.gate_proj.weight", normal(wide, hidden)
        yield f"{name}.mlp.up_proj.weight", normal(wide, hidden)
        yield f"{name}.mlp.down_proj.weight", normal(hidden, wide)
        yield f"{name}.input_layernorm.weight", np.ones(hidden, np.float32)
        yield f"{name}.post_attention_layernorm.weight", np.ones(hidden, np.float32)
    yield "model.norm.weight", np.ones(hidden, np.float32)


def _model_config(shape: Shape, vocabulary: int, end: int, pad: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "float32",
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
    }


def _tokenizer_config(shape: Shape) -> dict[str, object]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.positions,
    }


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
