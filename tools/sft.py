"""Supervised fine-tuning: `python tools/sft.py --model M --data rows.jsonl --out FOLDER [--steps N] [--lr R]`.

The same code as a run's warm start (`learner/warmup.py`), by itself; several ranks under torchrun. A row of the data
has a prompt (`prompt` or `question`: text, or `messages`: a chat) and an answer (`answer`, `completion` or `response`).
FOLDER becomes a model folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from protocol.own_python import use_own_python

    use_own_python()

from protocol.accelerators import CPU, DEVICES, ORDER, import_torch_plugin
from protocol.config import Config
from protocol.errors import ConfigError, PreflightError, TetherError
from protocol.examples import Example
from protocol.sections import WarmupConfig

if TYPE_CHECKING:
    from learner.warmup import WarmupStep

PROMPT_COLUMNS = ("prompt", "question", "messages")
ANSWER_COLUMNS = ("answer", "completion", "response")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face name of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="a .jsonl file, or a folder of them")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; new or empty")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps; default: one pass over the rows")
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
    rows = list(read_rows(args.data))
    if args.out.exists() and any(args.out.iterdir()):
        raise ConfigError(f"{args.out} is not empty; set --out to a new folder")
    device = found_device() if args.device == "auto" else args.device

    from learner.ranks import Ranks, environment

    for name, value in environment(device).items():
        os.environ.setdefault(name, value)
    from learner.policy import Policy
    from learner.warmup import warm_up

    ranks = Ranks.open(os.environ, device)
    examples = tokenised(rows, args.model)
    steps = args.steps or -(-len(examples) // args.batch)
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


def read_rows(data: Path) -> Iterator[tuple[str | list[Any], str]]:
    """(prompt, answer) of every row. Raises ConfigError naming file and line if one lacks either."""
    files = sorted(data.glob("*.jsonl")) if data.is_dir() else [data]
    if not files or not all(file.is_file() for file in files):
        raise ConfigError(f"expected a .jsonl file or a folder with some, got {data}; set --data")
    number = 0
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{file}:{number}: not JSON: {error}") from error
            prompt = next((row[name] for name in PROMPT_COLUMNS if name in row), None)
            answer = next((row[name] for name in ANSWER_COLUMNS if name in row), None)
            if not isinstance(prompt, str | list) or not prompt or not isinstance(answer, str):
                raise ConfigError(
                    f"{file}:{number}: a row needs a prompt (prompt, question or messages) and an answer (answer, "
                    f"completion or response), got {sorted(row)}"
                )
            yield prompt, answer
    if not number:
        raise ConfigError(f"{data} has no rows; set --data")


def tokenised(rows: list[tuple[str | list[Any], str]], model: str) -> list[Example]:
    """Prompts through the chat template where there is one; answers with the end-of-sequence token."""
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {model} has no end-of-sequence token; set --model")
    examples = []
    for prompt, answer in rows:
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        elif isinstance(prompt, str):
            ids = tokenizer.encode(prompt)
        else:
            raise ConfigError(f"{model} has no chat template, so prompts must be text; set --data")
        if not len(ids):
            raise ConfigError(f"a prompt must have at least one token, got none from {prompt!r}; set --data")
        reply = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        examples.append(Example(np.array(ids, dtype=np.int32), np.array(reply, dtype=np.int32)))
    return examples


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
