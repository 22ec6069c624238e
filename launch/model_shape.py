"""How large a model is, from its config.json alone: parameters, adapters, cache. Pure; used by `launch/memory.py`.

Counts are exact for the families in FAMILIES (a test holds them against the real classes); others have no shape here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""By `model_type`. All are: embedding, layers of attention and a gated MLP with two norms, a norm, a head."""

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of one model."""

    family: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    is_tied: bool  # the head is the embedding
    attention_bias: bool  # as config.json has it; qwen2 has a bias of its own kind
    mlp_bias: bool

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> ModelShape | None:
        """From what config.json says; None if it is no model of FAMILIES, or incomplete."""
        if config is None or config.get("model_type") not in FAMILIES:
            return None
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = [config.get(name) for name in names]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return None
        vocabulary, hidden, intermediate, layers, heads = (int(size) for size in sizes if size is not None)
        return cls(
            family=str(config["model_type"]),
            vocabulary=vocabulary,
            hidden=hidden,
            intermediate=intermediate,
            layers=layers,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or hidden // heads,
            is_tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )

    @property
    def num_parameters(self) -> int:
        """All of them; a tied head counts once."""
        norms = 2 * self.hidden + (2 * self.head_size if self.family == "qwen3" else 0)
        layer = sum(a * b for a, b in self._linear.values()) + self._biases + norms
        return self.vocabulary * self.hidden + self.layers * layer + self.hidden + self.num_head_parameters

    @property
    def num_head_parameters(self) -> int:
        """Of a head of its own."""
        return 0 if self.is_tied else self.vocabulary * self.hidden

    @property
    def cache_elements_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size

    def num_adapter_parameters(self, rank: int, targets: str) -> int:
        """Of LoRA on the layers whose names end as one of `targets` (lora.targets); on all of them otherwise."""
        named = {name.strip().rpartition(".")[2] for name in targets.split(",")}
        chosen = named & set(LINEAR) or set(LINEAR)
        return self.layers * rank * sum(sum(self._linear[name]) for name in chosen)

    @property
    def _linear(self) -> dict[str, tuple[int, int]]:
        """In and out of each linear layer of one transformer layer."""
        wide, narrow = self.heads * self.head_size, self.kv_heads * self.head_size
        ends = [(self.hidden, wide), (self.hidden, narrow), (self.hidden, narrow), (wide, self.hidden)]
        ends += [(self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden)]
        return dict(zip(LINEAR, ends, strict=True))

    @property
    def _biases(self) -> int:
        """Of one layer."""
        outs = {name: ends[1] for name, ends in self._linear.items()}
        of_qkv = outs["q_proj"] + outs["k_proj"] + outs["v_proj"]
        if self.family == "qwen2":
            return of_qkv
        attention = (of_qkv + outs["o_proj"]) * (self.attention_bias and self.family != "mistral")
        return attention + (outs["gate_proj"] + outs["up_proj"] + outs["down_proj"]) * self.mlp_bias
