"""Which engine a run wants, built.

Engines are imported here and nowhere else, so that none loads another's libraries.
"""

from __future__ import annotations

import json
from pathlib import Path

from actors import vllm_settings
from actors.engine import Engine, EngineOptions
from protocol.config import Config


def engine_environment(config: Config, device: str) -> dict[str, str]:
    """Defaults for the environment, to be set before the engine's library is imported."""
    return vllm_settings.environment(device) if config.generators.engine == "vllm" else {}


def build_engine(config: Config, model: Path, device: str, seed: int) -> Engine:
    """Not started yet. `model` holds config and tokenizer."""
    dtype = config.model.dtype if config.model.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
    options = EngineOptions(
        model_path=model,
        max_model_len=config.context_tokens,
        dtype=dtype,
        device=device,
        seed=seed,
        max_num_seqs=config.generators.max_running,
        lora_rank=config.lora.rank,
        lora_alpha=config.lora.alpha,
        recompute_cache=config.generators.recompute_cache,
        extra=config.vllm,
    )
    match config.generators.engine:
        case "vllm":
            from actors.vllm_engine import VLLMEngine

            return VLLMEngine(options)
        case "transformers":
            from actors.transformers_engine import TransformersEngine

            return TransformersEngine(options)
        case "fake":
            from actors.fake_engine import FakeEngine

            return FakeEngine(options, vocabulary=json.loads((model / "config.json").read_text())["vocab_size"])
