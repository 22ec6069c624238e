"""The policy's network: a causal language model whose forward gives log-probabilities of packed sequences.

Runs in every learner rank, under DeepSpeed; the critic's network shares its trunk, `PackedModel`. Everything with
weights is inside `PolicyModel.forward`, which ZeRO-3 needs. That sequences in one row do not see each other rests on
`packed_sdpa`; that [T, V] logits never stand in memory whole rests on `ChunkedHead`; that both compute what the model
itself would rests on `check_reproduces`.

Legend: T packed input tokens, K chosen tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from learner.head import ChunkedHead
from protocol.errors import ConfigError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# What an attention call of transformers may carry that changes its result and that `packed_sdpa` does not do.
UNSUPPORTED_BY_SDPA = ("sliding_window", "softcap", "s_aux", "position_bias")
MAX_LOGPROB_ERROR = 0.05


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequence_cuts: tuple[int, ...] = (),
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each packed sequence by itself: query [1, heads, T, size] -> [1, T, heads, size].

    The lengths are given, never inferred: transformers' own detection switches off in silence when a cache or a mask is
    there.
    """
    assert query.shape[0] == 1, f"one row of packed sequences expected, got {query.shape[0]} rows"
    assert sequence_cuts
    assert attention_mask is None
    assert dropout == 0.0
    refused = [name for name in UNSUPPORTED_BY_SDPA if others.get(name) is not None]
    if refused:
        raise ConfigError(
            f"the learner's packed attention has no {', '.join(refused)}, which this model uses; set model.path"
        )
    grouped = query.shape[1] != key.shape[1]
    lengths = [b - a for a, b in pairwise(sequence_cuts)]
    # split, not slices: the backward pass of a slice fills and adds a tensor of the whole row for each sequence
    sequences = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in sequences
    ]
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("packed_sdpa", packed_sdpa)


def attention_for(device: torch.device, dtype: torch.dtype) -> str:
    """Flash attention where it is installed and can run, `packed_sdpa` everywhere else."""
    flash = device.type == "cuda" and dtype == torch.bfloat16 and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "packed_sdpa"


def load(
    path: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool, setting: str = "model.path"
) -> PreTrainedModel:
    """Read a causal language model from a folder or the Hugging Face hub; errors name the `setting` it comes from.

    Raises ConfigError if there is none, or if the learner cannot reproduce its attention.
    """
    disable_progress_bar()
    attention = attention_for(device, dtype)
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"no causal language model can be loaded from {path}: {error}; set {setting}") from error
    if attention == "packed_sdpa" and uses_sliding_window(lm.config):
        raise ConfigError(
            f"{path} attends through a sliding window, which needs flash attention in the learner; set {setting}"
        )
    return lm.to(device)


def uses_sliding_window(config: PretrainedConfig) -> bool:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return any(layer_type != "full_attention" for layer_type in layer_types)
    return getattr(config, "sliding_window", None) is not None


class PackedModel(nn.Module):
    """A transformer that reads packed sequences, without dropout; `lm` may be without its language head."""

    def __init__(self, lm: PreTrainedModel, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.lm = lm
        if gradient_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.train()  # checkpointing acts in training mode only
        for module in self.modules():  # a ratio compares two passes of the same function
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0

    def hidden(self, input_ids: Tensor, position_ids: Tensor, cuts: tuple[int, ...], positions: Tensor) -> Tensor:
        """Last hidden states [K, D] at `positions` [K] of the row [1, T]; part of a subclass's forward."""
        states: Tensor = self.lm.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=None,
            use_cache=False,
            **self.attention_arguments(cuts, input_ids.device),
        ).last_hidden_state[0]
        return states.index_select(0, positions)

    def attention_arguments(self, cuts: tuple[int, ...], device: torch.device) -> dict[str, Any]:
        if self.lm.config._attn_implementation == "packed_sdpa":
            return {"sequence_cuts": cuts}
        ends = torch.tensor(cuts, dtype=torch.int32, device=device)
        longest = max(b - a for a, b in pairwise(cuts))
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


class PolicyModel(PackedModel):
    """The language model and its chunked head as one module with one forward."""

    def __init__(
        self, lm: PreTrainedModel, chunk_tokens: int, gradient_checkpointing: bool, entropy_gradient: bool = False
    ) -> None:
        super().__init__(lm, gradient_checkpointing)
        self.head = ChunkedHead(lm.get_output_embeddings(), chunk_tokens, entropy_gradient)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cuts: tuple[int, ...],
        positions: Tensor,
        targets: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities [K] and entropies [K] of `targets`, predicted at `positions` [K] of the row [1, T]."""
        return self.head(self.hidden(input_ids, position_ids, cuts, positions), targets, temperature)

    @torch.no_grad()
    def check_reproduces(self) -> None:
        """Raise ConfigError unless packing and head give the log-probabilities of the model's own forward."""
        device = next(self.parameters()).device
        ids = torch.arange(12, device=device) % self.lm.config.get_text_config().vocab_size
        places = torch.cat([torch.arange(5), torch.arange(7)])[None].to(device)
        seen = torch.tensor([0, 3, 5, 10], device=device)
        ours, _ = self(ids[None], places, (0, 5, 12), seen, ids[seen + 1], 1.0)
        wanted = []
        for start, end in ((0, 5), (5, 12)):
            logits = self.lm(
                input_ids=ids[None, start:end],
                position_ids=places[:, start:end],
                use_cache=False,
                **self.attention_arguments((0, end - start), device),
            ).logits[0]
            wanted.append(logits.float().log_softmax(-1)[:-1].gather(-1, ids[start + 1 : end, None])[:, 0])
        error = (ours - torch.cat(wanted)[torch.tensor([0, 3, 4, 9], device=device)]).abs().max().item()
        if not error < MAX_LOGPROB_ERROR:
            raise ConfigError(
                f"log-probabilities of {type(self.lm).__name__} must be those of a linear head, but differ by "
                f"{error:.3g}: the model scales, caps or biases its logits, as the learner does not; set model.path"
            )


def copy_tokenizer(model_path: str, folder: Path) -> None:
    """Copy the model's tokenizer files, byte for byte, so that `folder` can be served as it is."""
    for name in TOKENIZER_FILES:
        source = cached_file(model_path, name, _raise_exceptions_for_missing_entries=False)
        if source is not None:
            shutil.copyfile(source, folder / name)
