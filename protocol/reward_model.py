"""A reward model's folder: whether a run can use it, and its identity. Without torch.

Checked before a run starts and where a generator loads it; both ends of a connection compare the identity. The weights
never travel. That no code of a file runs rests on `check_reward_model`: safetensors or nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from protocol.errors import ConfigError

if TYPE_CHECKING:
    from protocol.sections import RewardModelConfig

REWARD_MODEL = "reward_model"  # what results and curves call it

DEFAULT_LABELS = 2  # of a config.json that names none, as transformers has it
BLOCK_BYTES, NUM_BLOCKS = 1 << 20, 16  # what is read of a file of weights for its identity
READ_BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def check_reward_model(settings: RewardModelConfig) -> None:
    """Raises ConfigError unless the folder has a config with the output that is wanted, and weights in safetensors."""
    folder = Path(settings.path)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"expected the folder of a sequence-classification model at {folder}, there is no config.json; fetch one "
            "with `hf download NAME --local-dir FOLDER`, and set rewards.model.path or --reward-model"
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"expected the reward model's weights as safetensors in {folder}, there are none, and .bin files are not "
            "read, because they are pickles; convert them where you trust them: "
            "AutoModelForSequenceClassification.from_pretrained(FOLDER).save_pretrained(OTHER), and the tokenizer too"
        )
    labels, wanted = num_labels(folder), settings.label
    if wanted is None and labels != 1:
        raise ConfigError(
            f"expected a reward model with one output, {folder} has {labels}; set rewards.model.label to the one that "
            f"is the reward, 0 to {labels - 1}"
        )
    if wanted is not None and wanted >= labels:
        raise ConfigError(f"expected rewards.model.label of 0 to {labels - 1} for {folder}, got {wanted}")


def num_labels(folder: Path) -> int:
    """Outputs of its head, as its config says. Raises ConfigError if that cannot be read."""
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        names = config.get("id2label")
        return len(names) if names else int(config.get("num_labels", DEFAULT_LABELS))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; mend it, or set rewards.model.path") from None


def reward_model_digest(folder: Path) -> str:
    """Hex digest of config, tokenizer and weights; of a file of weights: name, size and blocks spread over it.

    Blocks are enough to tell models apart, because training changes weights everywhere; reading tens of GB is not.
    Raises ConfigError if something is missing.
    """
    digest = hashlib.sha256()
    try:
        for path in [folder / name for name in READ_BESIDE if name == "config.json" or (folder / name).is_file()]:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\0".encode())
            with open(path, "rb") as file:
                for block in _blocks(file, size):
                    digest.update(block)
    except OSError as error:
        raise ConfigError(
            f"expected the folder of a reward model at {folder}, {error.strerror or error}; set rewards.model.path or "
            "--reward-model"
        ) from None
    return digest.hexdigest()[:32]


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The whole file if it is small, else its beginning, its end and blocks between them at equal distances."""
    if size <= NUM_BLOCKS * BLOCK_BYTES:
        yield file.read()
        return
    for number in range(NUM_BLOCKS):
        file.seek((size - BLOCK_BYTES) * number // (NUM_BLOCKS - 1))
        yield file.read(BLOCK_BYTES)
