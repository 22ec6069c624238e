"""Makes a task to try Tether on: a tiny model with its tokenizer, and for the demo the word problems it learns.

    python tools/demo_task.py --out FOLDER [--seed N]                model/ and word problems: train, test, warmup.jsonl
    python tools/demo_task.py --out FOLDER --large [--seed N]        the same with sums that want a calculator
    python tools/demo_task.py --out FOLDER --data DATA [--seed N]    model/ alone, its tokenizer trained on DATA's rows

Takes a second, needs no network, and the same seed gives the same files. DATA is what `data.train` takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from protocol.own_python import use_own_python

    use_own_python()

from protocol.errors import TetherError
from protocol.sources import parse_sources
from tools.tiny_model import Shape, train_tokenizer, write_model
from tools.word_problems import demonstrations, split

NUM_TRAIN, NUM_HELD_OUT, NUM_SHOWN = 4000, 256, 20000
VOCABULARY = 4096  # at most: the word problems have some 400 words
DEMO_SHAPE = Shape(intermediate=256)
GSM8K_SHAPE = Shape(hidden=192, layers=4, heads=6, intermediate=512, positions=1024)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and of the model's weights")
    parser.add_argument("--data", default="", help="rows to make a model for, instead of word problems")
    parser.add_argument("--large", action="store_true", help="word problems with large numbers, sums in << >>")
    args = parser.parse_args(argv)
    try:
        texts = rows_as_text(args.data) if args.data else write_problems(args.out, args.seed, args.large)
    except TetherError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    shape = GSM8K_SHAPE if args.data else DEMO_SHAPE
    parameters = write_model(args.out / "model", train_tokenizer(texts, VOCABULARY), shape, args.seed)
    print(f"made a model of {parameters:,} parameters with random weights in {args.out / 'model'}")
    return 0


def write_problems(folder: Path, seed: int, large: bool = False) -> list[str]:
    """Training rows, held-out rows and demonstrations; returns the text a tokenizer is to know."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = split(seed, NUM_TRAIN, NUM_HELD_OUT, large=large)
    shown = demonstrations(seed, NUM_SHOWN, NUM_HELD_OUT, large=large)
    for name, problems in (("train", train), ("test", held_out), ("warmup", shown)):
        lines = [json.dumps(problem._asdict()) + "\n" for problem in problems]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(
        f"made {len(train)} word problems to train on, {len(held_out)} to test with, {len(shown)} to imitate: {folder}"
    )
    return [text for problem in shown for text in problem]


def rows_as_text(data: str) -> list[str]:
    """All text columns of the rows. Raises ConfigError if there are none to read."""
    from broker.dataset import read_tables

    tables = [table for source in parse_sources(data) for table in read_tables(source.name, evaluation=False)]
    return [value for table in tables for row in table.rows for value in row.values() if isinstance(value, str)]


if __name__ == "__main__":
    sys.exit(main())
