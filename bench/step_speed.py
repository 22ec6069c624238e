"""Tokens a second of the learner's whole step against a bare PyTorch loop on the same tokens, in turns.

The learner's step is everything from a share to new weights: rows, packing, advantages, corrections, the packed passes
through DeepSpeed, the optimizer, the mismatch. The bare loop is given packed tensors for nothing: forward, a clipped
loss, backward, clipping, torch's AdamW. Both have the same model, attention, head and packing. A turn measures each
once; their order changes from turn to turn.

    python bench/step_speed.py [--size small] [--turns 7]

Prints one JSON line, with the median of the turns. `bench/learner.py` runs this and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from protocol.own_python import use_own_python

    use_own_python()

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from bench.model_sizes import GROUP_SIZE, SIZES, Size
from learner.batches import MicroBatch, pack
from learner.mini_batches import loss_rows
from learner.model import PolicyModel, load
from learner.models import Models
from learner.policy import resolved_dtype
from learner.preparation import Preparation
from learner.ranks import Ranks, environment
from protocol.config import Config
from protocol.types import Completion, FinishReason, Share, ShareItem, VersionSpan

RATE = 1e-6
CLIP = 1.0


def write_model(size: Size, folder: Path) -> str:
    """A model with random weights, small ones: every token has about the same probability."""
    disable_progress_bar()
    torch.manual_seed(0)
    shape = {name: value for name, value in size._asdict().items() if name in Qwen2Config().to_dict()}
    Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)).save_pretrained(folder)
    return str(folder)


def make_share(size: Size) -> Share:
    """One batch of one rank, as the broker sends it: sampled by the version that is trained."""
    rng = np.random.default_rng(0)
    items = []
    for place in range(size.prompts * GROUP_SIZE):
        length = int(rng.integers(2, size.completion_tokens + 1))
        completion = Completion(
            rng.integers(0, size.vocab_size, length).astype(np.int32),
            np.full(length, -np.log(size.vocab_size), np.float32),
            (VersionSpan(0, 0, length),),
            FinishReason.STOP,
        )
        prompt = rng.integers(0, size.vocab_size, size.prompt_tokens).astype(np.int32)
        group = place // GROUP_SIZE
        items.append(ShareItem(group, place % GROUP_SIZE, group, prompt, completion))
    rewards = rng.integers(0, 2, (size.prompts, GROUP_SIZE)).astype(np.float32)
    return Share(1, 0, b"d" * 16, 0, 1, 0, rewards, rewards, tuple(items))


class Step:
    """The learner's: from a share to new weights."""

    def __init__(self, config: Config, ranks: Ranks, models: Models) -> None:
        self._models, self._preparation = models, Preparation(config, ranks, models)
        self._device = ranks.device

    def run(self, share: Share) -> tuple[float, float]:
        """Seconds of the whole, and of what comes before the first update."""
        started = now(self._device)
        prepared = self._preparation.prepare(share)
        prepare_s = now(self._device) - started
        for mini_batch in prepared.mini_batches:
            update = self._models.policy.update(mini_batch.micro_batches, self._preparation.loss(mini_batch), RATE)
            assert update.applied
        if prepared.mismatch is None:
            self._preparation.mismatch(mini_batch.micro_batches, update.logprobs, share.step)
        return now(self._device) - started, prepare_s


class Bare:
    """A loop as one writes it on an afternoon; what it trains was packed before."""

    def __init__(self, config: Config, micro_batches: Sequence[MicroBatch], device: torch.device) -> None:
        dtype, learner = resolved_dtype(config.model.dtype, device), config.learner
        lm = load(config.model.path, dtype, device, False)
        self._model = PolicyModel(lm, learner.logprob_chunk_tokens, learner.gradient_checkpointing)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=RATE)
        self._batches = [batch.to(device) for batch in micro_batches]
        self._num_tokens = sum(len(batch.targets) for batch in micro_batches)
        self._device = device

    def run(self) -> float:
        """Seconds of one step."""
        started = now(self._device)
        for batch in self._batches:
            logprobs, _ = self._model(
                batch.input_ids, batch.position_ids, batch.cuts, batch.positions, batch.targets, 1.0
            )
            ratio = (logprobs - batch.behavior_logprobs).exp()
            advantages = torch.ones_like(ratio)
            surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            (-surrogate.sum() / self._num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return now(self._device) - started


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def settings(path: str, learner: Mapping[str, Any], dtype: str, device: str) -> Config:
    sections = {"model": {"path": path, "dtype": dtype}, "run": {"device": device}}
    return Config.model_validate(sections | {"learner": {"learning_rate": RATE, "clip_grad": CLIP, **learner}})


def with_updates(config: Config, number: int) -> Config:
    """The same with so many updates of each batch."""
    sections = config.model_dump()
    return Config.model_validate(sections | {"algorithm": sections["algorithm"] | {"updates_per_batch": number}})


def measure(config: Config, size: Size, turns: int, updates: int, ranks: Ranks) -> dict[str, Any]:
    """Medians over the turns; a turn more, the first, is thrown away."""
    share = make_share(size)
    micro_batches = pack(loss_rows(share, 0, False), config.learner.micro_batch_tokens)
    num_tokens = sum(batch.input_ids.numel() for batch in micro_batches)
    models = Models.open(config, ranks)
    one, several = (Step(with_updates(config, number), ranks, models) for number in (1, updates))
    bare = Bare(config, micro_batches, ranks.device)
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "one": lambda: one.run(share),
        "bare": lambda: (bare.run(), 0.0),
        "several": lambda: several.run(share),
    }
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name in [*ways] if turn % 2 else [*ways][::-1]:
            seconds = ways[name]()
            if turn > 0:
                seen[name].append(seconds)
    whole_s = {name: median(whole for whole, _ in seconds) for name, seconds in seen.items()}
    shares = {name: median(before / whole for whole, before in seconds) for name, seconds in seen.items()}
    return {
        "parameters": sum(int(np.prod(shape)) for _, _, shape in models.policy.layout()),
        "tokens": num_tokens,
        "micro_batches": len(micro_batches),
        "tokens_per_s": round(num_tokens / whole_s["one"], 1),
        "bare_tokens_per_s": round(num_tokens / whole_s["bare"], 1),
        "of_bare": round(whole_s["bare"] / whole_s["one"], 3),
        "updates": updates,
        "updates_tokens_per_s": round(num_tokens / whole_s["several"], 1),
        "prepare_share": round(shares["one"], 4),
        "updates_prepare_share": round(shares["several"], 4),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="of the model and its batch")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--updates", type=int, default=4, help="of a batch, beside a step with one")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--zero", type=int, choices=range(4), default=0, help="DeepSpeed's ZeRO stage")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    for name, value in environment(args.device).items():
        os.environ.setdefault(name, value)
    learner = {name: getattr(args, name) for name in ("micro_batch_tokens", "zero", "gradient_checkpointing")}
    ranks = Ranks.open({}, args.device)
    with tempfile.TemporaryDirectory() as folder:
        config = settings(write_model(SIZES[args.size], Path(folder)), learner, args.dtype, args.device)
        found = measure(config, SIZES[args.size], args.turns, args.updates, ranks)
    ranks.close()
    print(json.dumps({"size": args.size, "turns": args.turns, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
