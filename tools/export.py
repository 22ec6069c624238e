"""A checkpoint's model as a folder of its own, for transformers, vLLM and whoever else loads Hugging Face folders.

    python tools/export.py runs/<name>/checkpoints/step_<n> OUT              weights (merged where the run trained
                                                                             adapters), config, tokenizer
    python tools/export.py runs/<name>/checkpoints/step_<n> OUT --adapter    the adapters alone, for peft

What is copied is first held against the checkpoint's digests. OUT is there when it is whole, or not at all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from protocol.own_python import use_own_python

    use_own_python()

from protocol.checkpoints import MANIFEST_FILE, checkpoints, damage
from protocol.errors import ConfigError, Exit, PreflightError, TetherError

MODEL, ADAPTER, BASE = "hf", "adapter", "base"  # as in learner/checkpoint.py


def export(checkpoint: Path, out: Path, *, adapter: bool = False) -> list[str]:
    """Copy the model, or its adapters, to `out`; returns what to say about it.

    Raises ConfigError if the checkpoint is none, is damaged or has no adapters, or if `out` is not free.
    """
    check_is_checkpoint(checkpoint)
    part = ADAPTER if adapter else MODEL
    if not (checkpoint / part).is_dir():
        raise ConfigError(f"{checkpoint} has no adapters: its run trained all weights; leave --adapter out")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"expected a new or empty folder to write into, {out} has something in it; choose another")
    if reason := damage(checkpoint, f"{part}/"):
        raise ConfigError(f"{checkpoint} is damaged and not exported: {reason}; choose another checkpoint")
    aside = out.resolve().with_name(f"{out.resolve().name}.tmp-{os.getpid()}")
    try:
        shutil.copytree(checkpoint / part, aside)
        os.replace(aside, out)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PreflightError(f"the export writes to {out}, but {reason}; choose another place") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    said = [f"{'adapters' if adapter else 'model'} of {checkpoint}: {num_bytes / 1e6:.1f} MB in {out}"]
    if adapter and (checkpoint / BASE).is_dir():
        said.append(f"they belong on {checkpoint / BASE}, which the run's warm start made")
    return said


def check_is_checkpoint(path: Path) -> None:
    """Raises ConfigError naming the checkpoints that are near, if this is none."""
    if (path / MANIFEST_FILE).is_file() and (path / MODEL).is_dir():
        return
    near = [*checkpoints(path), *checkpoints(path / "checkpoints")]
    there = f"; there are {', '.join(map(str, near))}" if near else ""
    raise ConfigError(
        f"expected a checkpoint, a folder like runs/NAME/checkpoints/step_50, found none in {path}{there}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="runs/NAME/checkpoints/step_N")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; new or empty")
    parser.add_argument("--adapter", action="store_true", help="the adapters alone, where the run trained such")
    args = parser.parse_args(argv)
    try:
        print("\n".join(export(args.checkpoint, args.out, adapter=args.adapter)))
    except TetherError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return int(Exit.DONE)


if __name__ == "__main__":
    sys.exit(main())
