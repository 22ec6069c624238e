"""What vLLM is told before it runs: environment variables and engine arguments. Without vLLM itself.

Used by the generator's main, which applies `environment` before anything imports vLLM, and by `vllm_engine.py`.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from actors.engine import EngineOptions
from protocol.accelerators import candidates
from protocol.errors import ConfigError

PLUGIN = "tether"
"""Name of our entry point in `vllm.general_plugins`, and of the weight transfer backend that it registers."""

PLUGIN_GROUPS = ("vllm.platform_plugins", "vllm.general_plugins")

ADAPTER_ID = 1
"""Of every adapter, as vLLM counts them."""

LEAKED_VARIABLES = (
    "AITER_*",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "LOCAL_WORLD_SIZE",
    "NUMEXPR_MAX_THREADS",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TILELANG_*",
    "TORCHINDUCTOR_*",
    "TRITON_*",
    "VLLM_*",
)
"""Patterns of what vLLM sets in os.environ of the generator process: no child that we start may inherit these."""

STREAM_INTERVAL_TOKENS = 16  # how fine `Engine.progress` is; each output costs the event loop time

_OURS = frozenset(
    [
        "model",
        "dtype",
        "max_model_len",
        "max_num_seqs",
        "seed",
        "load_format",
        "enable_lora",
        "max_loras",
        "max_lora_rank",
        "lora_dtype",
        "worker_extension_cls",
        "weight_transfer_config",
        "logprobs_mode",
    ]
)


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be


def environment(device: str) -> dict[str, str]:
    """Variables that vLLM needs, to be set before it is imported where the user has not set them."""
    variables = {
        "VLLM_PLUGINS": ",".join([PLUGIN, *_plugins_of(device)]),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "HF_HUB_OFFLINE": "1",  # the model is a folder on this host
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        variables |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker lives in the engine core: a process less, no spinning
            "TORCHDYNAMO_DISABLE": "1",  # small helpers of the sampler would be compiled by a C++ compiler at first use
            "OMP_NUM_THREADS": "1",  # a small model gains nothing from a second thread
        }
    return variables


def _plugins_of(device: str) -> list[str]:
    """Names of the installed plugins of the package that makes vLLM know `device`.

    VLLM_PLUGINS holds for platforms too: with our name alone in it vLLM would find no platform but its own.
    """
    packages = {accelerator.vllm_plugin.module for accelerator in candidates(device) if accelerator.vllm_plugin}
    installed = [plugin for group in PLUGIN_GROUPS for plugin in entry_points(group=group)]
    return sorted({plugin.name for plugin in installed if plugin.module.partition(".")[0] in packages})


def engine_arguments(options: EngineOptions) -> dict[str, Any]:
    """Arguments of AsyncEngineArgs: our defaults, the user's settings over them, and what an Engine's contract needs.

    Raises ConfigError if the user's settings name one that the contract needs.
    """
    taken = sorted(set(options.extra) & _OURS)
    if taken:
        raise ConfigError(f"vllm.{taken[0]} is set by Tether itself; remove it from the vllm settings")
    defaults: dict[str, Any] = {
        "enable_prefix_caching": True,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "stream_interval": STREAM_INTERVAL_TOKENS,
    }
    if options.device == "cpu":
        defaults |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": 128 << 20,  # else the cache takes nearly all memory
            "block_size": 32,  # only whole blocks of a prefix are cached, and vLLM's 128 is longer than most prompts
            "enable_chunked_prefill": False,  # a seeded request whose prefill is split crashes the engine core on a CPU
        }
    needed = {
        "model": str(options.model_path),
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "seed": options.seed,
        "load_format": "dummy",
        "logprobs_mode": "processed_logprobs",
    }
    if options.lora_rank:
        room = next(rank for rank in LORA_RANKS if rank >= options.lora_rank)
        # one: the newest adapter is put in the place of the last, for requests that run, too
        needed |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
        needed["worker_extension_cls"] = "actors.weight_plugin.AdapterWorker"
    return defaults | dict(options.extra) | needed
