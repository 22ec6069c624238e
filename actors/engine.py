"""What a generator needs of an engine: the interface, the values that cross it, and how an engine fails.

Used in the generator process. An engine serves one policy version at a time and swaps it between two tokens. The
promise that no completion mixes versions unrecorded is each engine's: every token's version is in `Completion.spans`,
and after a load that failed half-way (`EnginePoisoned`) no engine answers again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from protocol.errors import Exit, SnapshotError, TetherError
from protocol.types import Completion, SamplingParams, Tokens
from protocol.weights import Snapshot


class EngineError(TetherError):
    """An engine could not do what it was asked for."""

    exit_code = Exit.ENGINE_STALLED


class RequestFailed(EngineError):
    """This request failed; the engine serves on."""


class GenerationAborted(RequestFailed):
    """The request ended before the model did: aborted by us, or by a signal that reached the engine."""


class NotLoaded(EngineError):
    """No weights were loaded yet, so nothing may be served."""


class EngineDead(EngineError):
    """The engine is gone and does not come back: leave the process, the supervisor starts a new one."""


class EnginePoisoned(EngineDead):
    """A load failed half-way: the weights may be a mixture of two versions, and nothing is served from it."""


class HeldVersion(NamedTuple):
    """The weights an engine serves. Both fields count: version numbers repeat after a resume."""

    version: int
    digest: str  # hex, root digest of the snapshot


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """Where the time of one weight load went; no token was generated in their sum."""

    pause_s: float
    load_s: float
    resume_s: float


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    num_running: int  # requests that get tokens
    num_waiting: int  # requests queued inside the engine
    kv_usage: float  # share of the KV cache in use, 0 .. 1
    generated_tokens: int  # since the engine started


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is built. `model_path` needs a config and a tokenizer, no weights."""

    model_path: Path
    max_model_len: int  # tokens of prompt and completion together
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"  # as torch calls it; one of protocol.accelerators.DEVICES
    seed: int = 0  # of requests without a seed; distinct for each generator
    max_num_seqs: int = 64  # requests that run at a time; more are queued
    lora_rank: int = 0  # of the adapters that snapshots are; 0: snapshots are whole weights
    lora_alpha: float = 0.0  # adapters count alpha / rank
    recompute_cache: bool = True  # after a load, running requests re-prefill; False: they keep the old weights' KV
    extra: Mapping[str, Any] = field(default_factory=dict)  # the `vllm:` settings, passed verbatim to AsyncEngineArgs


class Engine(Protocol):
    """All methods are called from one event loop. Only `progress` and `statistics` never wait."""

    @property
    def held(self) -> HeldVersion | None:
        """What is served now. None before the first load."""

    @property
    def held_base(self) -> str:
        """Digest of the weights below the adapters that are served; "" where there are none."""

    async def start(self) -> None:
        """Build the engine. It serves nothing before the first `load`."""

    async def generate(
        self, request_id: str, prompt_tokens: Tokens, sampling: SamplingParams, seed: int | None
    ) -> Completion:
        """One completion; while a load is running, waits for its end. Equal seeds give equal tokens on equal weights.

        Raises NotLoaded, RequestFailed, GenerationAborted, EngineDead or EnginePoisoned. Cancelling aborts the request.
        """

    async def load(self, snapshot: Snapshot) -> LoadTimes:
        """Swap the weights between two tokens; running requests go on with the new ones, none is dropped.

        Adapters go beside `snapshot.base`, or beside the base that is held. Raises SnapshotError before anything was
        touched when something is missing or cut short, EnginePoisoned when it failed half-way (cancelled included),
        EngineDead when the engine died.
        """

    def progress(self) -> Mapping[str, int]:
        """Tokens produced so far, by request that has not ended."""

    def statistics(self) -> EngineStatistics:
        """What the engine is busy with. Raises EngineDead or EnginePoisoned when it serves no more, even if idle."""

    async def abort_all(self) -> None:
        """End every request: their `generate` raises GenerationAborted."""

    async def close(self) -> None:
        """End the engine and its processes; running requests raise EngineDead. May be called at any time, and twice."""


def check_before_load(snapshot: Snapshot, options: EngineOptions, held_base: str) -> None:
    """Raise SnapshotError unless all that `snapshot` needs is here, in its full length."""
    snapshot.check_size()
    wanted = snapshot.manifest.base
    if bool(wanted) != bool(options.lora_rank):
        kinds = ("adapters" if wanted else "whole weights", f"lora.rank {options.lora_rank}")
        raise SnapshotError(f"snapshot {snapshot.version} is of {kinds[0]}, which does not fit {kinds[1]}")
    if snapshot.base is not None:
        snapshot.base.check_size()
    given = snapshot.base.digest if snapshot.base is not None else held_base
    if wanted and wanted != given:
        raise SnapshotError(
            f"the adapters of version {snapshot.version} stand beside {wanted[:12]}, here is {given[:12] or 'none'}"
        )
