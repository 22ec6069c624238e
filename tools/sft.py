"""Supervised fine-tuning: `python tools/sft.py --model M --data rows.jsonl --out FOLDER [--steps N] [--lr R]`.

The same code as a run's warm start (`learner/warmup.py`), by itself; several ranks under torchrun. The rows are read as
a run reads its own, by `tools/examples.py`. FOLDER becomes a model folder.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from protocol.own_python import use_own_python

    use_own_python()

from protocol.accelerators import CPU, DEVICES, ORDER, import_torch_plugin
from protocol.config import Config
from protocol.errors import ConfigError, PreflightError, TetherError
from protocol.examples import Example, read_examples
from protocol.sections import WarmupConfig

if TYPE_CHECKING:
    from learner.warmup import WarmupStep

READ_S = 3600.0  # a dataset may have to be fetched
READING = ("model", "data", "prompt-column", "answer-column", "system", "suffix")
"""Flags that are handed on to tools/examples.py."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face name of a causal language model")
    parser.add_argument("--data", required=True, help="rows as --dataset has them: files, folders, Hugging Face names")
    parser.add_argument("--prompt-column", default="", help="default: recognised by name; COLUMN.FIELD is inside one")
    parser.add_argument("--answer-column", default="", help="likewise; of chats it is the last answer")
    parser.add_argument("--system", default="", help="system message before every prompt: text or a text file")
    parser.add_argument("--suffix", default="", help="text behind every plain question")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; new or empty")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps; default: as --epochs says")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the rows")
    parser.add_argument(
        "--lr", type=float, default=WarmupConfig().learning_rate, help="peak learning rate; it falls to 0"
    )
    parser.add_argument("--batch", type=int, default=WarmupConfig().batch_size, help="rows of one step")
    parser.add_argument("--zero", type=int, default=0, choices=range(4), help="DeepSpeed's ZeRO stage")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rows")
    parser.add_argument("--device", default="auto", choices=("auto", *DEVICES))
    try:
        train(parser.parse_args(argv))
    except TetherError as error:
        print(f"sft: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


def train(args: argparse.Namespace) -> None:
    """Raises ConfigError if model, data or output folder cannot be used."""
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise ConfigError(f"{args.out} is no empty folder; set --out to a new one")
    examples = tokenised(args, is_first=os.environ.get("RANK", "0") == "0")
    device = found_device() if args.device == "auto" else args.device

    from learner.ranks import Ranks, environment

    for name, value in environment(device).items():
        os.environ.setdefault(name, value)
    from learner.policy import Policy
    from learner.warmup import warm_up

    ranks = Ranks.open(os.environ, device)
    steps = args.steps or math.ceil(args.epochs * len(examples) / args.batch)
    config = Config.model_validate({"learner": {"zero": args.zero}})
    settings = WarmupConfig(steps=steps, learning_rate=args.lr, batch_size=args.batch)
    policy = Policy.open(config, args.model, ranks)

    def report(step: WarmupStep) -> None:
        if ranks.is_first:
            skipped = "" if step.applied else "  skipped: not finite"
            print(
                f"step {step.step + 1}/{steps}  loss {step.loss:.4f}  grad_norm {step.grad_norm:.3f}{skipped}",
                flush=True,
            )

    warm_up(policy, examples, settings, args.seed, config.learner.micro_batch_tokens, ranks, report)
    policy.save_pretrained(args.out)
    ranks.close()


def tokenised(args: argparse.Namespace, *, is_first: bool) -> list[Example]:
    """Every rank reads for itself, in a process that knows nothing of learners. Raises ConfigError if it could not."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "examples.npz"
        given = {name: getattr(args, name.replace("-", "_")) for name in READING}
        words = [f"--{name}={value}" for name, value in given.items() if value]
        command = [sys.executable, str(Path(__file__).with_name("examples.py")), *words, f"--out={file}"]
        heard = None if is_first else subprocess.DEVNULL  # which rows these are is said once
        try:
            ended = subprocess.run(command, stdout=heard, timeout=READ_S, check=False)
        except subprocess.TimeoutExpired:
            raise ConfigError(f"reading {args.data} was not done within {READ_S:.0f} s; fetch it to a folder") from None
        if ended.returncode:
            raise ConfigError("the rows could not be read; the words of tools/examples.py stand above")
        return read_examples(file)


def found_device() -> str:
    import torch

    for accelerator in ORDER:
        with contextlib.suppress(PreflightError):  # the package that makes it known to torch is not here
            import_torch_plugin(accelerator.device)
            if torch.get_device_module(accelerator.device).is_available():
                return accelerator.device
    return CPU.device


if __name__ == "__main__":
    sys.exit(main())
