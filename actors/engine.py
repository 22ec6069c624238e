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

from protocol.errors import Exit, TetherError
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
    device: Literal["cpu", "cuda"] = "cpu"
    seed: int = 0  # of requests without a seed; distinct for each generator
    max_num_seqs: int = 64  # requests that run at a time; more are queued
    recompute_cache: bool = True  # after a load, running requests re-prefill; False: they keep the old weights' KV
    extra: Mapping[str, Any] = field(default_factory=dict)  # the `vllm:` settings, passed verbatim to AsyncEngineArgs


class Engine(Protocol):
    """All methods are called from one event loop. Only `progress` and `statistics` never wait."""

    @property
    def held(self) -> HeldVersion | None:
        """What is served now. None before the first load."""

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

        Raises SnapshotError before anything was touched when the snapshot is gone or cut short, EnginePoisoned when it
        failed half-way (cancelled included), EngineDead when the engine died.
        """

    def progress(self) -> Mapping[str, int]:
        """Tokens produced so far, by request that has not ended."""

    def statistics(self) -> EngineStatistics:
        """What the engine is busy with. Raises EngineDead or EnginePoisoned when it serves no more, even if idle."""

    async def abort_all(self) -> None:
        """End every request: their `generate` raises GenerationAborted."""

    async def close(self) -> None:
        """End the engine and its processes; running requests raise EngineDead. May be called at any time, and twice."""
