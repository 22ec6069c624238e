"""One way from hidden states to log-probabilities and entropies, forward and backward: its peak memory and seconds.

A process measures one way, once: what an allocator keeps would count for the next one. Peak is what comes on top of
the hidden states [K, D] and the head's weight [V, D], so it contains the gradients of both. On a CPU it is resident
memory as Linux counts it, on CUDA what torch allocated.

    python bench/head_memory.py --way head --slice-tokens 512

Prints one JSON line. `bench/learner.py` runs this for every way.

Legend: K tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from protocol.own_python import use_own_python

    use_own_python()

import torch
from torch import Tensor, nn

from learner.head import ChunkedHead

WAYS = ("head", "slices")


def by_head(lm_head: nn.Linear, hidden: Tensor, targets: Tensor, factors: Tensor, size: int, entropies: bool) -> None:
    """The learner's head with chunks of `size` tokens; `size` K is without chunks."""
    logprobs, entropy = ChunkedHead(lm_head, size, entropies)(hidden, targets, 1.0)
    loss_of(logprobs, entropy, factors, entropies).backward()


def by_slices(lm_head: nn.Linear, hidden: Tensor, targets: Tensor, factors: Tensor, size: int, entropies: bool) -> None:
    """Plain torch on `size` tokens at a time, each slice's backward before the next one's forward."""
    for some, wanted, factor in zip(hidden.split(size), targets.split(size), factors.split(size), strict=True):
        logits = lm_head(some).float()
        all_logprobs = logits.log_softmax(-1)
        with torch.set_grad_enabled(entropies):
            entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
        loss_of(all_logprobs.gather(-1, wanted[:, None])[:, 0], entropy, factor, entropies).backward()


def loss_of(logprobs: Tensor, entropy: Tensor, factors: Tensor, entropies: bool) -> Tensor:
    """A number with an uneven gradient for each token."""
    return logprobs @ factors - (0.01 * entropy.sum() if entropies else 0.0)


class Peak:
    """Bytes allocated since `restart`, at most."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def restart(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
            self._before = self._status("VmRSS")

    def bytes(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self._before
        return self._status("VmHWM") - self._before

    def _status(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, default="head", help="the learner's head, or plain torch slice by slice")
    parser.add_argument("--slice-tokens", type=int, default=1024, help="tokens at a time")
    parser.add_argument("--tokens", type=int, default=4096, help="K")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="V")
    parser.add_argument("--hidden", type=int, default=896, help="D")
    parser.add_argument("--entropy-gradient", action="store_true", help="as an entropy bonus needs it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    lm_head = nn.Linear(args.hidden, args.vocabulary, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(args.tokens, args.hidden, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(args.vocabulary, (args.tokens,), device=device)
    factors = torch.randn(args.tokens, device=device)
    run = by_head if args.way == "head" else by_slices
    peak = Peak(device)
    with torch.no_grad():
        lm_head(hidden[:1])  # what the matrix products keep for themselves
    peak.restart()
    started = time.perf_counter()
    run(lm_head, hidden, targets, factors, args.slice_tokens, args.entropy_gradient)
    found = {"peak_mib": round(peak.bytes() / 2**20, 1), "seconds": round(time.perf_counter() - started, 3)}
    print(json.dumps({"way": args.way, "slice_tokens": args.slice_tokens, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
