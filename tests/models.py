"""Tiny Qwen2 models made on the spot, their snapshots, and the slow reference that engines are held against."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from protocol.types import Completion, Tokens
from protocol.weights import Snapshot, SnapshotWriter, lay_out

EOS = 1


def make_tiny_qwen2(folder: Path, tied: bool, vocab: int = 200, seed: int = 0, num_layers: int = 2) -> Qwen2ForCausalLM:
    """Write config and tokenizer, no weights, into `folder`; return the model with random weights in float32.

    The vocabulary is no multiple of 64, so that vLLM pads it. The end of sequence has logit zero, far below the others.
    """
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=EOS,
        torch_dtype="float32",
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(folder)
    words = {"<unk>": 0, "<eos>": EOS} | {f"w{i}": i for i in range(2, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    return random_weights(Qwen2ForCausalLM(config).float().eval(), seed)


def random_weights(model: Qwen2ForCausalLM, seed: int) -> Qwen2ForCausalLM:
    """Fill every parameter of `model`, biases and norms too, so that none of them can be forgotten unseen.

    The layers outweigh the embedding: a tied model would else repeat its last token for ever, whatever its weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.14 + ("norm" in name))
        head = model.get_output_embeddings().weight
        head *= 3.0
        head[EOS] = 0.0
    return model


def twin(model: Qwen2ForCausalLM, seed: int) -> Qwen2ForCausalLM:
    """A model of the same shape with other weights: the next policy version."""
    return random_weights(Qwen2ForCausalLM(model.config).float().eval(), seed)


_numbers = itertools.count()


def snapshot_of(model: Qwen2ForCausalLM, folder: Path, version: int) -> Snapshot:
    """Write the model's parameters, a tied one once, as a snapshot below `folder`."""
    return snapshot_from({name: parameter.detach() for name, parameter in model.named_parameters()}, folder, version)


def snapshot_from(
    tensors: Mapping[str, torch.Tensor], folder: Path, version: int, base: Snapshot | None = None
) -> Snapshot:
    layout = lay_out((name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items())
    writer = SnapshotWriter(folder / f"snapshot_{next(_numbers)}", layout)
    for spec in layout:
        writer.view(spec)[:] = tensors[spec.name].contiguous().view(torch.uint8).flatten().numpy()
    return writer.finish(version, base)


@torch.no_grad()
def reference_logprobs(
    model: Qwen2ForCausalLM, prompt: Tokens, completion: Completion, temperature: float
) -> NDArray[np.float32]:
    """Log-probabilities [T] of a completion's tokens in one full forward of `model`."""
    ids = torch.from_numpy(np.concatenate([prompt, completion.tokens])).long()
    return _logprobs_of(model(ids[None]).logits[0, len(prompt) - 1 : -1], ids[len(prompt) :], temperature)


@torch.no_grad()
def hybrid_logprobs(
    old: Qwen2ForCausalLM, new: Qwen2ForCausalLM, prompt: Tokens, completion: Completion, temperature: float
) -> NDArray[np.float32]:
    """Log-probabilities of the tokens behind the first version span, from `new` weights on the cache of `old` ones.

    The last token before the update had not been run through the model when the weights changed.
    """
    ids = torch.from_numpy(np.concatenate([prompt, completion.tokens])).long()
    cut = len(prompt) + completion.spans[0].end
    cache = old(ids[None, : cut - 1], use_cache=True).past_key_values
    logits = new(ids[None, cut - 1 : -1], past_key_values=cache).logits[0]
    return _logprobs_of(logits, ids[cut:], temperature)


def _logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> NDArray[np.float32]:
    logprobs = torch.log_softmax(logits.double() / temperature, dim=-1)
    return logprobs.gather(1, tokens[:, None])[:, 0].float().numpy()
