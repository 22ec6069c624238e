"""Evaluates a model: a checkpoint, the newest checkpoint of a run, a model's folder or a Hugging Face name.

    python tools/eval.py runs/NAME                                     by the settings of the run: data, rewards, engine
    python tools/eval.py runs/NAME/checkpoints/step_100 --samples 8 --temperature 0.7
    python tools/eval.py Qwen/Qwen2.5-0.5B-Instruct --data openai/gsm8k --reward gsm8k --eval-reward gsm8k_flexible

It is a run of `launch/cluster.py` that trains nothing, so the same code evaluates as in training. Any of its flags may
follow, such as --data.suffix TEXT or --vllm.tensor_parallel_size N.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from protocol.own_python import use_own_python

    use_own_python()

import yaml

from launch.chart import printable
from launch.scores import score_table
from protocol.checkpoints import MANIFEST_FILE, damage, latest_valid
from protocol.errors import ConfigError, Exit, TetherError
from protocol.setting_names import describe
from protocol.settings import load

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = "hf"  # of a checkpoint, as in learner/checkpoint.py
SECTIONS = ("model", "data", "rollout", "rewards", "sampling", "generators", "evaluation", "vllm")
"""What a run's own settings say of an evaluation."""
FLAGS = {
    "data": ("data.eval", "D[#N][,D...]"),
    "samples": ("evaluation.samples", "K"),
    "temperature": ("evaluation.temperature", "T"),
    "max-prompts": ("evaluation.max_prompts", "N"),
    "max-tokens": ("evaluation.max_tokens", "N"),
    "engine": ("generators.engine", "vllm|transformers"),
    "generators": ("generators.count", "N"),
    "device": ("run.device", "auto|cuda|npu|cpu"),
    "seed": ("run.seed", "N"),
}
"""Short names of settings; --reward and --eval-reward are those of launch/cluster.py, as is every other flag."""
OWN = ("run.name", "run_name", "run.out", "run.evaluation_only", "model.path", "model", "resume", "dry_run")
"""What this tool says itself to launch/cluster.py, and what would leave nothing to report."""


def find_model(target: str) -> tuple[str, Path | None]:
    """The model that is meant, and the folder of the run that made it, if one did.

    Raises ConfigError for a run without a checkpoint that verifies, and for a checkpoint that is damaged.
    """
    path = Path(target)
    if not path.is_dir():
        return target, None
    if (path / "config.yaml").is_file():
        found = latest_valid(path / "checkpoints")
        for damaged in found.damaged:
            print(f"this checkpoint is damaged and not used: {damaged}", file=sys.stderr)
        if found.path is None:
            raise ConfigError(f"expected a run with a checkpoint, found none in {path / 'checkpoints'}; name a model")
        path = found.path
    if not (path / MANIFEST_FILE).is_file():
        return str(path.resolve()), None
    if reason := damage(path, f"{MODEL}/"):
        raise ConfigError(f"{path} is damaged and not evaluated: {reason}; choose another checkpoint")
    path = path.resolve()
    run_dir = path.parent.parent
    return str(path / MODEL), run_dir if (run_dir / "config.yaml").is_file() else None


def check_flags(others: Sequence[str], out: Path | None) -> None:
    """Raises ConfigError for what would cost the numbers after all the work."""
    names = {word: word.partition("=")[0].removeprefix("--").replace("-", "_") for word in others if word[:2] == "--"}
    taken = next((word for word, name in names.items() if name in OWN), None)
    if taken is not None:
        raise ConfigError(f"{taken} is not for an evaluation, whose folder is made and removed; leave it out")
    if out is not None and (out.is_dir() or not os.access(out.absolute().parent, os.W_OK)):
        raise ConfigError(f"expected a file behind --out in a folder that can be written to, got {out}; name another")


def recipe(run_dir: Path | None) -> dict[str, Any]:
    """The layer of settings below the flags: those of the run that made the model, or none."""
    if run_dir is None:
        return {}
    settings = load(run_dir / "config.yaml").model_dump(mode="json")
    layer: dict[str, Any] = {section: settings[section] for section in SECTIONS}
    layer["run"] = {name: settings["run"][name] for name in ("device", "seed")}
    return layer


def evaluate(model: str, layer: dict[str, Any], flags: Sequence[str], out: Path) -> int:
    """Run the evaluation as `out`/evaluation; returns its exit code."""
    settings = out / "settings.yaml"
    settings.write_text(yaml.safe_dump(layer) if layer else "{}\n")
    only = ["--model", model, "--run.evaluation_only", "true", "--run.out", str(out), "--run.name", "evaluation"]
    command = [sys.executable, str(REPOSITORY / "launch" / "cluster.py"), "--recipe", str(settings), *only, *flags]
    signal.signal(signal.SIGINT, lambda *_: None)  # the run hears Ctrl-C too, and ends in order
    return subprocess.run(command, check=False, stdout=sys.stderr).returncode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("target", metavar="CHECKPOINT_OR_MODEL", help="checkpoint, run, model folder, Hub name")
    for flag, (key, metavar) in FLAGS.items():
        parser.add_argument(f"--{flag}", metavar=metavar, help=f"{describe(key)} The same as --{key}.")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="write every completion with its rewards there")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args, others = parser.parse_known_args(argv)
    given = ((key, getattr(args, flag.replace("-", "_"))) for flag, (key, _) in FLAGS.items())
    flags = [word for key, value in given if value is not None for word in (f"--{key}", value)]
    flags += ["--evaluation.prompts_written", "1000000000"] if args.out else []
    try:
        check_flags(others, args.out)
        model, run_dir = find_model(args.target)
        layer = recipe(run_dir)
    except TetherError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    folder = Path(tempfile.mkdtemp(prefix="tether-eval-"))
    code = evaluate(model, layer, [*flags, *others], folder)
    if code:
        print(f"error: the evaluation ended with code {code}, as said above; its logs are in {folder}", file=sys.stderr)
        return code
    made = folder / "evaluation"
    row = json.loads((made / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    written = made / "evaluations" / "version_000000.jsonl"
    if args.out:
        shutil.copyfile(written, args.out)
    row = {"model": model, **{name: value for name, value in row.items() if name not in ("version", "samples")}}
    if row["errors"]:
        row["first_error"] = first_error(written)
    shutil.rmtree(folder)
    print(json.dumps(row, ensure_ascii=False, indent=2) if args.json else "\n".join(report(row)))
    return int(Exit.DONE)


def first_error(written: Path) -> str:
    """Why the first completion failed of those that were written down and did."""
    if not written.exists():  # evaluation.prompts_written is 0
        return ""
    with written.open(encoding="utf-8") as file:
        return next((line["error"] for line in map(json.loads, file) if "error" in line), "")


def report(row: dict[str, Any]) -> list[str]:
    """What is printed for people."""
    completions = row["num_prompts"] * row["samples_per_prompt"]
    counts = f"{row['num_prompts']} prompts x {row['samples_per_prompt']}, {row['length_mean']:.0f} tokens each"
    lines = [f"{row['model']}: {counts}", *score_table(row)]
    if row["errors"]:
        first = f"; the first: {printable(row['first_error'])}" if row["first_error"] else ""
        lines.append(f"{row['errors']} of {completions} completions failed and are in no number{first}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
