"""What does the learner cost beside what it cannot do without? Memory of its head, and speed of its step.

Memory: peak of hidden states -> log-probabilities and entropies, forward and backward, with chunks
(`learner.logprob_chunk_tokens`) and without, against plain torch that never has logits of more than a small slice of
tokens (`bench/head_memory.py`, a process for each). Speed: tokens a second of a whole training step against a bare
PyTorch loop on the same tokens (`bench/step_speed.py`), and the part of a step before its first update.

    python bench/learner.py [--only memory] [--size small] [--device cuda --dtype bfloat16 --size 0.5B]

Prints two tables and one JSON line. About 5 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from protocol.own_python import use_own_python

    use_own_python()

import torch

from bench.model_sizes import SIZES
from learner.ranks import environment
from protocol.sections import LearnerConfig

BENCH = Path(__file__).resolve().parent
SLICE_TOKENS = 32  # of plain torch


def machine(device: str) -> str:
    """What it ran on, for people."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def child(name: str, arguments: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """The JSON line of another file of this folder, run by itself."""
    common = ["--device", args.device, "--dtype", args.dtype]
    threads = {"OMP_NUM_THREADS": str(args.threads), **environment(args.device)}
    command = [sys.executable, str(BENCH / name), *arguments, *common]
    ended = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way, the reference first; `of_reference` is peak over the reference's."""
    sizes = ["--tokens", str(args.tokens), "--vocabulary", str(args.vocabulary), "--hidden", str(args.hidden)]
    sizes += ["--entropy-gradient"] if args.entropy_gradient else []
    ways = [("slices", SLICE_TOKENS), *(("head", chunk) for chunk in args.chunks), ("head", args.tokens)]
    rows = [
        child("head_memory.py", ["--way", way, "--slice-tokens", str(number), *sizes], args) for way, number in ways
    ]
    return [row | {"of_reference": round(row["peak_mib"] / rows[0]["peak_mib"], 3)} for row in rows]


def speed(args: argparse.Namespace) -> dict[str, Any]:
    numbers = {"turns": args.turns, "micro-batch-tokens": args.micro_batch_tokens, "zero": args.zero}
    flags = [f"--{name}={value}" for name, value in numbers.items()]
    flags += ["--gradient-checkpointing"] if args.gradient_checkpointing else []
    return child("step_speed.py", ["--size", args.size, *flags], args)


def print_memory(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    of_entropies = ", entropies have a gradient" if args.entropy_gradient else ""
    print(f"\n{args.tokens:,} tokens, vocabulary {args.vocabulary:,}, hidden size {args.hidden:,}{of_entropies}")
    print("way                                 peak MiB  of reference  seconds")
    for row in rows:
        number = row["slice_tokens"]
        name = f"plain torch, {number} tokens at a time"
        if row["way"] == "head":
            name = "head without chunks" if number == args.tokens else f"head in chunks of {number} tokens"
        print(f"{name:34}  {row['peak_mib']:8.0f}  {row['of_reference']:12.2f}  {row['seconds']:7.1f}")


def print_speed(found: Mapping[str, Any]) -> None:
    what = f"{found['parameters'] / 1e6:,.0f} M parameters, {found['tokens']:,} tokens in {found['micro_batches']}"
    print(f"\n{what} micro-batches, {found['turns']} turns")
    print("step                   tokens/s  of bare  before the first update")
    print(f"bare loop              {found['bare_tokens_per_s']:8.0f}     1.00")
    one, several = found["prepare_share"], found["updates_prepare_share"]
    print(f"learner, 1 update      {found['tokens_per_s']:8.0f}  {found['of_bare']:7.2f}  {one:23.1%}")
    print(f"learner, {found['updates']} updates     {found['updates_tokens_per_s']:8.0f}           {several:23.1%}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("memory", "speed"), help="one half of it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch on a CPU")
    half = parser.add_argument_group("memory")
    half.add_argument("--tokens", type=int, default=4096)
    half.add_argument("--vocabulary", type=int, default=151_936)
    half.add_argument("--hidden", type=int, default=896, help="hidden size, by default that of a 0.5B model")
    default = LearnerConfig().logprob_chunk_tokens
    half.add_argument("--chunks", type=int, nargs="+", default=[default], help="tokens of a chunk, one or several")
    half.add_argument("--entropy-gradient", action="store_true", help="as an entropy bonus needs it")
    half = parser.add_argument_group("speed")
    half.add_argument("--size", choices=tuple(SIZES), default="small", help="of the model and its batch")
    half.add_argument("--turns", type=int, default=7)
    half.add_argument("--micro-batch-tokens", type=int, default=2048)
    half.add_argument("--zero", type=int, choices=range(4), default=0, help="DeepSpeed's ZeRO stage")
    half.add_argument("--gradient-checkpointing", action="store_true", help="of both loops")
    args = parser.parse_args(argv)
    threads = f", {args.threads} threads" if args.device == "cpu" else ""
    result: dict[str, Any] = {"bench": "learner", "machine": f"{machine(args.device)}{threads}", "dtype": args.dtype}
    print(f"{result['machine']}, {args.dtype}, torch {torch.__version__}", flush=True)
    if args.only != "speed":
        result["memory"] = memory(args)
        print_memory(result["memory"], args)
    if args.only != "memory":
        result["speed"] = speed(args)
        print_speed(result["speed"])
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
