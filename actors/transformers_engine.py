"""A model of Hugging Face's transformers as the engine: slow, and right without tricks.

Runs in the generator process, its steps in a worker thread. It is what vLLM is held against, and what serves where
vLLM cannot be had. Each sequence has its own cache and its own forward, so no completion depends on what runs beside
it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from actors.engine import EngineOptions
from actors.hooked_adapters import HookedAdapters
from actors.snapshot_tensors import TORCH_DTYPES, snapshot_tensors
from actors.stepped_engine import Draw, Running, SteppedEngine
from protocol.accelerators import import_torch_plugin
from protocol.errors import SnapshotError
from protocol.types import SamplingParams
from protocol.weights import Snapshot


class _State:
    """What a running sequence keeps between two steps."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.cache: DynamicCache | None = None  # None: the next step runs the whole sequence through the model


class TransformersEngine(SteppedEngine):
    """See `actors.engine.Engine`."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._model: Any = None
        self._stops: frozenset[int] = frozenset()

    async def _build(self) -> None:
        await asyncio.to_thread(self._build_model)

    def _build_model(self) -> None:
        import_torch_plugin(self._options.device)
        path, dtype = self._options.model_path, TORCH_DTYPES[self._options.dtype]
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
        self._model = model.to(self._options.device).eval()
        self._adapters = HookedAdapters(self._model, self._options.lora_alpha)
        eos = AutoTokenizer.from_pretrained(path).eos_token_id
        self._stops = frozenset() if eos is None else frozenset({eos})

    def _stop_token_ids(self) -> frozenset[int]:
        return self._stops

    async def _step(self, requests: Sequence[Running]) -> list[Draw]:
        return await asyncio.to_thread(lambda: [self._draw(request) for request in requests])

    @torch.inference_mode()
    def _draw(self, request: Running) -> Draw:
        if request.state is None:
            request.state = _State(request.seed)
        state: _State = request.state
        if state.cache is None:
            state.cache = DynamicCache(config=self._model.config)
            new_tokens = [*request.prompt.tolist(), *(draw.token for draw in request.draws)]
        else:
            new_tokens = [request.draws[-1].token]
        ids = torch.tensor([new_tokens], device=self._options.device)
        logits = self._model(input_ids=ids, past_key_values=state.cache, use_cache=True, logits_to_keep=1).logits
        return sample(logits[0, -1].float().cpu(), request.sampling, state.random)

    async def _swap(self, snapshot: Snapshot, requests: Sequence[Running]) -> None:
        if snapshot.base is not None:
            await asyncio.to_thread(self._copy_weights, snapshot.base)
        take_over = self._adapters.put if snapshot.manifest.base else self._copy_weights
        await asyncio.to_thread(take_over, snapshot)
        if self._options.recompute_cache:
            for request in requests:
                if request.state is not None:
                    request.state.cache = None

    @torch.no_grad()
    def _copy_weights(self, snapshot: Snapshot) -> None:
        """Copy every tensor into its parameter. Raises SnapshotError if one has no place, or a parameter none."""
        places = dict(self._model.named_parameters(remove_duplicate=False))  # a tied parameter under each of its names
        filled = set()
        for name, tensor in snapshot_tensors(snapshot):
            if name not in places or places[name].shape != tensor.shape:
                raise SnapshotError(f"the model has no parameter {name} of shape {tuple(tensor.shape)}")
            places[name].copy_(tensor)
            filled.add(places[name])
        missing = [name for name, parameter in places.items() if parameter not in filled]
        if missing:
            raise SnapshotError(f"the snapshot does not fill every parameter: {', '.join(missing)}")


def sample(logits: torch.Tensor, sampling: SamplingParams, random: torch.Generator) -> Draw:
    """Draw a token from float32 logits [V]: temperature, top_k, top_p in vLLM's order. Temperature 0: greedy."""
    if sampling.temperature == 0.0:
        token = int(logits.argmax())
        return Draw(token, float(logits.log_softmax(-1)[token]))
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = logits.masked_fill(logits < logits.topk(min(sampling.top_k, len(logits))).values[-1], -torch.inf)
    if sampling.top_p < 1.0:
        ascending, order = logits.sort()
        cut = ascending.softmax(-1).cumsum(-1) <= 1.0 - sampling.top_p
        cut[-1] = False  # the likeliest token always stays
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(0, order, cut), -torch.inf)
    logprobs = logits.log_softmax(-1)
    token = int(torch.multinomial(logprobs.exp(), 1, generator=random))
    return Draw(token, float(logprobs[token]))
