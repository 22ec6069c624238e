"""Opens a run for the broker: settings become prompts, model files, and an empty state that waits for the learner."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from broker.prompts import PromptSource
from broker.run_state import RunState
from broker.tokenizer import TOKENIZER_FILES, ChatTokenizer, model_folder
from protocol.addresses import Addresses
from protocol.config import Config
from protocol.errors import ConfigError
from protocol.examples import WARMUP_FILE, write_examples
from protocol.rewards import reward_digest
from protocol.rollouts import rollout_digest


def open_run(config: Config, run_dir: Path, host: str) -> RunState:
    """Raises ConfigError if data or model cannot work."""
    folder = model_folder(config.model.path)
    tokenizer = ChatTokenizer(folder)
    source = PromptSource(config, tokenizer)
    if config.algorithm.advantage == "gae" and not config.run.evaluation_only:
        _check_critic_warmup(config, source.num_rows)
        _check_critic_reads(config, tokenizer)
    if config.warmup.steps and not (run_dir / WARMUP_FILE).exists():
        write_examples(run_dir / WARMUP_FILE, source.supervised())
    return RunState(
        config=config,
        run_id=Addresses.run_id(run_dir),
        run_dir=run_dir,
        host=host,
        source=source,
        files=_files(folder),
        vocab_size=_vocab_size(folder),
        reward_digest=reward_digest(
            [function.use for function in config.all_rewards.functions], config.rewards.model.path
        ),
        rollout_digest=rollout_digest(config.rollout.use),
    )


def _check_critic_warmup(config: Config, num_rows: int) -> None:
    """What `Config` cannot know where the steps follow from the rows."""
    steps, alone = config.steps_for(num_rows), config.critic.warmup_steps
    if alone >= steps:
        raise ConfigError(
            f"critic.warmup_steps must be less than the run's steps, or the policy is never trained, got {alone} and "
            f"{steps}, which is {config.run.epochs:g} x {num_rows} rows in batches of {config.batch.prompts}; set "
            "critic.warmup_steps, run.epochs or run.steps"
        )


def _check_critic_reads(config: Config, tokenizer: ChatTokenizer) -> None:
    if not config.critic.path:
        return
    size = _vocab_size(model_folder(config.critic.path, "critic.path"))
    if size < tokenizer.size:
        raise ConfigError(
            f"critic.path must be a model that reads the {tokenizer.size} tokens of model.path, got "
            f"{config.critic.path} with {size}; take a model of the same family, or leave critic.path empty"
        )


def _files(folder: Path) -> dict[str, tuple[Path, int, str]]:
    found = {}
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            found[name] = (path, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    return found


def _vocab_size(folder: Path) -> int:
    """Rows of the model's output; the tokenizer may know fewer."""
    config = json.loads((folder / "config.json").read_text())
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(
            f"expected vocab_size in {folder / 'config.json'}, found none; is it a causal language model?"
        )
    return size
