"""vLLM as the engine: AsyncLLM in the generator process, the engine core in another, the same code on CPU and CUDA.

Owns everything that is said to vLLM. Beside `weight_plugin.py`, which runs inside vLLM, no other file imports it;
this one does so late, because `vllm_settings.environment` must be applied first. That no call waits for a dead engine
core rests on `_guarded`; that an aborted request never passes for a finished one, on `_completion`; that
nothing is served after a load that failed half-way, on `VLLMEngine._fail`, which ends the engine core.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.engine import (
    EngineDead,
    EngineError,
    EngineOptions,
    EnginePoisoned,
    EngineStatistics,
    GenerationAborted,
    HeldVersion,
    LoadTimes,
    NotLoaded,
    RequestFailed,
    check_before_load,
)
from actors.vllm_settings import ADAPTER_ID, PLUGIN, engine_arguments
from protocol.errors import ConfigError
from protocol.types import Completion, FinishReason, SamplingParams, Tokens, VersionSpan
from protocol.weights import Snapshot

if TYPE_CHECKING:
    import vllm
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.stats import SchedulerStats

DEATH_POLL_S = 0.2
CALL_TIMEOUT_S = 600.0  # of one call into the engine core; a load of the largest model ends before it


@dataclass(slots=True)
class _CoreLoad:
    """What the engine core said last about itself."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0


class VLLMEngine:
    """See `actors.engine.Engine`."""

    def __init__(self, options: EngineOptions) -> None:
        self.held: HeldVersion | None = None
        self.held_base = ""
        self._options = options
        self._recompute_cache = options.recompute_cache
        self._arguments = engine_arguments(options)
        self._llm: AsyncLLM | None = None
        self._failure: EngineError | None = None
        self._serving = asyncio.Event()  # cleared while weights are loaded
        self._serving.set()
        self._loading = asyncio.Lock()
        self._progress: dict[str, int] = {}
        self._generated_tokens = 0
        self._num_abort_alls = 0
        self._core_load = _CoreLoad()

    async def start(self) -> None:
        if not entry_points(group="vllm.general_plugins", name=PLUGIN):
            raise EngineDead(f"vLLM does not find the plugin {PLUGIN}: install Tether (pip install -e . --no-deps)")
        self._llm = await asyncio.to_thread(self._build)

    def _build(self) -> AsyncLLM:
        """Start the engine core; blocks for seconds."""
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        backend = WeightTransferConfig(backend=PLUGIN)
        try:
            arguments = AsyncEngineArgs(weight_transfer_config=backend, **self._arguments)
        except TypeError as error:
            raise ConfigError(f"vLLM does not know one of the vllm settings: {error}") from error
        return AsyncLLM.from_engine_args(arguments, stat_loggers=[_stat_logger(self._core_load)])

    async def generate(
        self, request_id: str, prompt_tokens: Tokens, sampling: SamplingParams, seed: int | None
    ) -> Completion:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        num_abort_alls = self._num_abort_alls
        await self._serving.wait()
        self._check()
        if self._llm is None or self.held is None:
            raise NotLoaded("no request may be served before the first weights are loaded")
        prompt = tokens_input(prompt_tokens.tolist(), cache_salt=f"{self.held.version}:{self.held.digest}")
        self._progress[request_id] = 0
        try:
            answer = self._llm.generate(
                prompt, _sampling_params(sampling, seed), request_id, lora_request=self._lora_request()
            )
            async for output in answer:
                [last] = output.outputs
                self._count(request_id, len(last.token_ids))
                if self._num_abort_alls != num_abort_alls:
                    raise GenerationAborted(f"request {request_id} was aborted after {len(last.token_ids)} tokens")
        except EngineDeadError as error:
            self._check()
            raise EngineDead(f"the engine core died while request {request_id} ran") from error
        except (VLLMClientError, EngineGenerateError) as error:
            self._check()
            raise RequestFailed(f"vLLM refused request {request_id}: {error}") from error
        finally:
            del self._progress[request_id]
        self._check()
        return _completion(request_id, last)

    async def load(self, snapshot: Snapshot) -> LoadTimes:
        assert self._llm is not None, "start comes before load"
        async with self._loading:
            self._check()
            check_before_load(snapshot, self._options, self.held_base)
            self._serving.clear()
            try:
                return await self._swap(self._llm, snapshot)
            except BaseException as error:  # a cancelled load has stopped half-way, too
                kind = EngineDead if self._llm.errored else EnginePoisoned
                reason = str(error) or type(error).__name__
                failure = kind(f"the load of version {snapshot.version} failed half-way: {reason}")
                await self._fail(failure)
                if not isinstance(error, Exception):
                    raise
                raise failure from error
            finally:
                self._serving.set()

    async def _swap(self, llm: AsyncLLM, snapshot: Snapshot) -> LoadTimes:
        """Pause between two engine steps, load, set the version, resume."""
        started = time.perf_counter()
        pause = llm.pause_generation(mode="keep", clear_cache=self._recompute_cache)
        await _guarded(llm, "pause_generation", pause)
        paused = time.perf_counter()
        if not snapshot.manifest.base:
            await self._reload(llm, snapshot)
        elif snapshot.base is not None:
            await self._reload(llm, snapshot.base)
        if snapshot.manifest.base:
            arguments = (str(snapshot.folder.absolute()), snapshot.digest, self._options.lora_alpha)
            await _guarded(llm, "put_adapters", llm.collective_rpc("put_adapters", args=arguments))
        await _guarded(llm, "update_weight_version", llm.update_weight_version(str(snapshot.version)))
        loaded = time.perf_counter()
        self.held, self.held_base = HeldVersion(snapshot.version, snapshot.digest), snapshot.manifest.base
        await _guarded(llm, "resume_generation", llm.resume_generation())
        return LoadTimes(paused - started, loaded - paused, time.perf_counter() - loaded)

    async def _reload(self, llm: AsyncLLM, snapshot: Snapshot) -> None:
        """Load whole weights."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        update = WeightTransferUpdateRequest({"folder": str(snapshot.folder.absolute()), "digest": snapshot.digest})
        await _guarded(llm, "start_weight_update", llm.start_weight_update())
        await _guarded(llm, "update_weights", llm.update_weights(update))
        await _guarded(llm, "finish_weight_update", llm.finish_weight_update())

    def _lora_request(self) -> LoRARequest | None:
        """Names the adapter in the one place there is, which the worker has filled before (`weight_plugin`).

        Equal ids, so that running requests go on with the next adapter; unlike names, so that vLLM takes no cached
        block of one for the other's.
        """
        from vllm.lora.request import LoRARequest

        if not self.held_base:
            return None
        assert self.held is not None
        return LoRARequest(f"{self.held.version}:{self.held.digest}", ADAPTER_ID, lora_path=PLUGIN)

    def progress(self) -> Mapping[str, int]:
        return dict(self._progress)

    def statistics(self) -> EngineStatistics:
        self._check()
        load = self._core_load
        return EngineStatistics(load.num_running, load.num_waiting, load.kv_usage, self._generated_tokens)

    async def abort_all(self) -> None:
        self._num_abort_alls += 1
        if self._llm is not None:
            await self._llm.abort(list(self._progress))

    async def close(self) -> None:
        if self._failure is None:
            await self._fail(EngineDead("the engine was closed"))

    def _check(self) -> None:
        """Raise what ended the engine, if anything did."""
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)
        if self._llm is not None and self._llm.errored:
            raise EngineDead("the engine core died")

    def _count(self, request_id: str, num_tokens: int) -> None:
        self._generated_tokens += num_tokens - self._progress[request_id]
        self._progress[request_id] = num_tokens

    async def _fail(self, failure: EngineError) -> None:
        """From now on every call raises `failure`. Ends the engine core, and then every request that waits for it."""
        self._failure = failure
        if self._llm is not None:
            self._llm.shutdown(timeout=0)
            await self._llm.abort(list(self._progress))


async def _guarded(llm: AsyncLLM, name: str, call: Coroutine[Any, Any, None]) -> None:
    """Wait for a call into the engine core. Raises EngineDead when the core dies: vLLM itself would wait for ever."""
    task = asyncio.ensure_future(call)
    deadline = time.monotonic() + CALL_TIMEOUT_S
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=DEATH_POLL_S)
            if not task.done() and llm.errored:
                raise EngineDead(f"the engine core died during {name}")
            if not task.done() and time.monotonic() > deadline:
                raise EngineDead(f"the engine core did not answer {name} for {CALL_TIMEOUT_S:.0f} s")
        task.result()
    finally:
        task.cancel()


def _sampling_params(sampling: SamplingParams, seed: int | None) -> vllm.SamplingParams:
    import vllm
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=list(sampling.stop_token_ids),
        stop=list(sampling.stop),
        seed=seed,
        logprobs=0,  # the sampled token's alone
        flat_logprobs=True,
        detokenize=bool(sampling.stop),  # the text is for finding stops in it, and is not asked for
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        output_kind=RequestOutputKind.CUMULATIVE,  # its lists are shared, not copied; deltas would have to be joined
    )


def _completion(request_id: str, output: CompletionOutput) -> Completion:
    """The finished request in our terms. Raises GenerationAborted unless the model ended it, or its length did."""
    if output.finish_reason not in set(FinishReason):
        how = f"{output.finish_reason} after {len(output.token_ids)} tokens"
        raise GenerationAborted(f"request {request_id} ended as {how}")
    tokens = np.asarray(output.token_ids, dtype=np.int32)
    logprobs = np.full(len(tokens), np.nan, dtype=np.float32)
    if output.logprobs is not None:
        flat = output.logprobs  # entries [start, end) of a position; the sampled token's comes first
        for position, (start, end) in enumerate(zip(flat.start_indices, flat.end_indices, strict=True)):
            if end > start:
                logprobs[position] = flat.logprobs[start]
    assert output.weight_versions is not None, "every engine core of vLLM 0.32 and later labels its tokens"
    spans = tuple(VersionSpan(int(span.version), span.start, span.end) for span in output.weight_versions)
    return Completion(tokens, logprobs, spans, FinishReason(output.finish_reason))


def _stat_logger(load: _CoreLoad) -> Callable[[Any, int], Any]:
    """A factory, in vLLM's form, of a stat logger that writes into `load`."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class StatLogger(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: SchedulerStats | None, *others: Any, **more: Any) -> None:
            if scheduler_stats is not None:
                load.num_running = scheduler_stats.num_running_reqs
                load.num_waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
                load.kv_usage = scheduler_stats.kv_cache_usage

        def log_engine_initialized(self) -> None:
            pass

    return StatLogger
