"""Rows as token ids for supervised training: `python tools/examples.py --model M --data D --out FILE.npz`.

Reads, checks and tokenises as a run does for its warm start (`broker/prompts.py`), and needs no torch. `tools/sft.py`
starts it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from protocol.own_python import use_own_python

    use_own_python()

from protocol.config import Config
from protocol.errors import ConfigError, Exit, TetherError
from protocol.examples import write_examples

NO_LIMIT_TOKENS = 1 << 30
READS_NO_ANSWER = "length"  # a reward that asks nothing of the rows: none is scored here


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face name, for its tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--data", required=True, help="rows as data.train has them: files, folders or Hugging Face names, by commas"
    )
    parser.add_argument("--prompt-column", default="", help="default: recognised by name; COLUMN.FIELD is inside one")
    parser.add_argument("--answer-column", default="", help="likewise; of chats it is the last answer")
    parser.add_argument("--system", default="", help="system message before every prompt: text or a text file")
    parser.add_argument("--suffix", default="", help="text behind every plain question")
    args = parser.parse_args(argv)
    try:
        write(args)
    except TetherError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return int(Exit.DONE)


def write(args: argparse.Namespace) -> None:
    """Raises ConfigError if model or data cannot be used."""
    from broker.prompts import PromptSource
    from broker.tokenizer import ChatTokenizer, model_folder

    data = {
        "train": args.data,
        "prompt_column": args.prompt_column,
        "answer_column": args.answer_column,
        "system": args.system,
        "suffix": args.suffix,
        "max_prompt_tokens": NO_LIMIT_TOKENS,
    }
    rewards = {"functions": [{"use": READS_NO_ANSWER}]}
    config = Config.model_validate({"data": data, "rewards": rewards, "evaluation": {"every": 0}})
    source = PromptSource(config, ChatTokenizer(model_folder(args.model, "--model")))
    examples = list(source.supervised())
    for note in source.notes:
        print(note)
    if not examples:
        raise ConfigError(f"expected rows with a text answer in {args.data}, found none; set --data or --answer-column")
    if len(examples) < source.num_rows:
        print(f"{source.num_rows - len(examples)} rows have no text answer, and are left out")
    write_examples(args.out, examples)


if __name__ == "__main__":
    sys.exit(main())
