"""vLLM itself, on the CPU: weights change in flight, and every way in which it may fail ends in an error that says so.

One engine serves all tests of a kind until one of them ends it.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from actors.conversation import Conversation
from actors.engine import (
    EngineDead,
    EngineOptions,
    EnginePoisoned,
    GenerationAborted,
    NotLoaded,
    RequestFailed,
)
from actors.rollout import Attempt
from actors.sample_engine import SampleEngine
from actors.texts import Texts
from actors.transformers_engine import TransformersEngine
from actors.vllm_engine import VLLMEngine
from actors.vllm_settings import LEAKED_VARIABLES, engine_arguments, environment
from protocol.errors import ConfigError, SnapshotError
from protocol.snapshot_file import WEIGHTS_FILE
from protocol.types import Completion, FinishReason, Prompt, SamplingParams, VersionSpan
from protocol.weights import Snapshot
from tests.adapters import ALPHA, RANK, adapters_snapshot, merged, random_adapters
from tests.engines import all_reached, begin, outcome, prompts, until
from tests.locks import is_held
from tests.models import (
    EOS,
    hybrid_logprobs,
    make_tiny_qwen2,
    reference_logprobs,
    snapshot_from,
    snapshot_of,
    twin,
)

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")

MAX_LEN = 512
TOLERANCE = 1e-4


def children() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)


class Rig:
    """One engine, the loop it lives in, and the model whose weights it serves."""

    def __init__(self, folder: Path, tied: bool, recompute_cache: bool, **lora: Any) -> None:
        self.folder = folder
        self.model = make_tiny_qwen2(folder / "model", tied)
        self.options = EngineOptions(folder / "model", MAX_LEN, seed=3, recompute_cache=recompute_cache, **lora)
        self.runner = asyncio.Runner()
        self.version = 0
        self.start()

    def start(self) -> None:
        self.engine = VLLMEngine(self.options)
        before = children()
        self.run(self.engine.start())
        [self.core_pid] = children() - before
        self.before_load = self.run(outcome(self.engine.generate("early", prompts(1)[0], SamplingParams(4), 0)))
        self.run(self.engine.load(self.snapshot()))

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(asyncio.wait_for(call, 100))

    def change(self, seed: int) -> None:
        """Other weights, to be published."""
        self.model = twin(self.model, seed)

    def snapshot(self, held_base: str | None = None) -> Snapshot:
        """The current model as the next version, for an engine that holds `held_base`; None: for ours."""
        self.version += 1
        return snapshot_of(self.model, self.folder, self.version)

    def alive(self) -> bool:
        try:
            self.engine.statistics()
        except EngineDead:
            return False
        return True

    def close(self) -> None:
        self.run(self.engine.close())
        self.runner.close()


class AdapterRig(Rig):
    """Serves adapters beside a model that stays; `model` is what computes the same without them."""

    def __init__(self, folder: Path, tied: bool, recompute_cache: bool) -> None:
        self._below: Any = None
        super().__init__(folder, tied, recompute_cache, lora_rank=RANK, lora_alpha=ALPHA)

    def start(self) -> None:
        if self._below is None:
            self._below, self._base = self.model, snapshot_of(self.model, self.folder, 0)
            self.change(seed=1)
        super().start()

    def change(self, seed: int) -> None:
        self.adapters = random_adapters(self._below, seed)
        self.model = merged(self._below, self.adapters)

    def snapshot(self, held_base: str | None = None) -> Snapshot:
        self.version += 1
        made = adapters_snapshot(self.adapters, self._base, self.folder, self.version)
        held = self.engine.held_base if held_base is None else held_base
        return replace(made, base=None) if held == self._base.digest else made


@pytest.fixture(scope="module")
def rigs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Rig]]:
    """Rigs by kind, as they are asked for. What vLLM does to os.environ ends with this module."""
    saved = dict(os.environ)
    os.environ.update(environment("cpu"))
    made: dict[str, Rig] = {}
    yield made
    for made_rig in made.values():
        made_rig.close()
    os.environ.clear()
    os.environ.update(saved)


def rig_of(kind: str, rigs: dict[str, Rig], factory: pytest.TempPathFactory) -> Rig:
    if kind not in rigs:
        rig_type = AdapterRig if "adapters" in kind else Rig
        rigs[kind] = rig_type(factory.mktemp(kind), tied="untied" not in kind, recompute_cache="keep" not in kind)
    elif not rigs[kind].alive():
        rigs[kind].start()
    return rigs[kind]


@pytest.fixture(params=["tied", "untied", "adapters"])
def rig(request: pytest.FixtureRequest, rigs: dict[str, Rig], tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return rig_of(request.param, rigs, tmp_path_factory)


@pytest.fixture(params=["tied", "untied"])
def whole(request: pytest.FixtureRequest, rigs: dict[str, Rig], tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """One without adapters."""
    return rig_of(request.param, rigs, tmp_path_factory)


@pytest.fixture
def adapting(rigs: dict[str, Rig], tmp_path_factory: pytest.TempPathFactory) -> AdapterRig:
    rig = rig_of("adapters", rigs, tmp_path_factory)
    assert isinstance(rig, AdapterRig)
    return rig


@pytest.fixture
def untied(rigs: dict[str, Rig], tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return rig_of("untied", rigs, tmp_path_factory)


@pytest.fixture
def keeping(rigs: dict[str, Rig], tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """An engine with recompute_cache off."""
    return rig_of("untied keep", rigs, tmp_path_factory)


def distance(logprobs: np.ndarray, completion: Completion, start: int, end: int) -> float:
    """Largest difference from the behavior log-probabilities of tokens [start, end)."""
    return float(np.abs(logprobs[start:end] - completion.behavior_logprobs[start:end]).max())


async def update_in_flight(rig: Rig, questions: list[np.ndarray], sampling: SamplingParams) -> list[Completion]:
    """Let all questions run, give `rig` other weights in the middle, and return what came of them."""
    rig.change(seed=100 + rig.version)
    snapshot = rig.snapshot()  # made before: on a busy machine the completions would be over by then
    tasks = begin(rig.engine, questions, sampling)
    await all_reached(rig.engine, len(questions), 60)
    await rig.engine.load(snapshot)
    return list(await asyncio.gather(*tasks))


def test_nothing_is_served_before_the_first_weights(rig: Rig) -> None:
    assert isinstance(rig.before_load, NotLoaded)
    assert "before the first weights" in str(rig.before_load)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_before_an_update_are_of_the_old_weights_and_after_it_of_the_new(rig: Rig, temperature: float) -> None:
    old, old_version = rig.model, rig.version
    questions = prompts(20, length=120, shared=32)  # more to recompute than fits into one engine step
    completions = rig.run(update_in_flight(rig, questions, SamplingParams(200, temperature)))
    for question, completion in zip(questions, completions, strict=True):
        first, second = completion.spans
        assert (first.version, second.version) == (old_version, rig.version)
        assert (first.start, first.end, second.end) == (0, second.start, 200)
        assert completion.finish_reason is FinishReason.LENGTH
        by_old = reference_logprobs(old, question, completion, temperature)
        by_new = reference_logprobs(rig.model, question, completion, temperature)
        assert distance(by_old, completion, 0, first.end) < TOLERANCE
        assert distance(by_new, completion, first.end, 200) < TOLERANCE
        assert distance(by_new, completion, 0, first.end) > 1.0
        assert distance(by_old, completion, first.end, 200) > 1.0


def test_a_prompt_that_was_cached_under_old_weights_is_answered_by_the_new_ones_alone(rig: Rig) -> None:
    [question] = prompts(1, length=200)
    for _ in range(2):
        completion = rig.run(rig.engine.generate("again", question, SamplingParams(20), 0))
        assert distance(reference_logprobs(rig.model, question, completion, 1.0), completion, 0, 20) < TOLERANCE
        rig.change(seed=200 + rig.version)
        rig.run(rig.engine.load(rig.snapshot()))


def test_a_loaded_snapshot_is_let_go_for_the_learner_to_write_over(rig: Rig) -> None:
    """By the engine core too: a parameter that were a view of it would change under the engine."""
    snapshot = rig.snapshot()
    folder = snapshot.folder
    rig.run(rig.engine.load(snapshot))
    del snapshot
    assert not is_held(folder)


def test_without_recomputing_running_requests_read_their_old_cache_and_new_ones_do_not(keeping: Rig) -> None:
    old, old_version = keeping.model, keeping.version
    questions = prompts(4, length=100, shared=64)
    for question, completion in zip(
        questions, keeping.run(update_in_flight(keeping, questions, SamplingParams(200))), strict=True
    ):
        first, second = completion.spans
        assert (first.version, second.version) == (old_version, keeping.version)
        hybrid = hybrid_logprobs(old, keeping.model, question, completion, 1.0)
        assert np.abs(hybrid - completion.behavior_logprobs[first.end :]).max() < TOLERANCE
        by_new = reference_logprobs(keeping.model, question, completion, 1.0)
        assert distance(by_new, completion, first.end, 200) > 1e-2
    fresh = keeping.run(keeping.engine.generate("fresh", questions[0], SamplingParams(20), 0))
    by_new = reference_logprobs(keeping.model, questions[0], fresh, 1.0)
    assert distance(by_new, fresh, 0, 20) < TOLERANCE


def test_equal_seeds_give_equal_tokens_and_other_seeds_others(rig: Rig) -> None:
    async def sampled(seed: int | None, name: str) -> tuple[int, ...]:
        completion = await rig.engine.generate(name, prompts(1)[0], SamplingParams(30), seed)
        return tuple(completion.tokens.tolist())

    async def all_of_them() -> list[tuple[int, ...]]:
        return await asyncio.gather(*(sampled(seed, f"s{i}") for i, seed in enumerate([5, 5, 6, 2**63, None, None])))

    first, same, *others = rig.run(all_of_them())
    assert first == same
    assert len({first, *others}) == 5


def test_the_greedy_answer_is_the_one_of_transformers(rig: Rig) -> None:
    questions = prompts(3)
    oracle = TransformersEngine(rig.options)

    async def both() -> tuple[list[Completion], list[Completion]]:
        await oracle.start()
        await oracle.load(rig.snapshot(held_base=""))
        answers = [await asyncio.gather(*begin(e, questions, SamplingParams(40, 0.0))) for e in (rig.engine, oracle)]
        await oracle.close()
        return answers[0], answers[1]

    for ours, theirs in zip(*rig.run(both()), strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        np.testing.assert_allclose(ours.behavior_logprobs, theirs.behavior_logprobs, atol=TOLERANCE)


def test_the_tokenizers_end_of_sequence_ends_a_completion_and_padding_is_never_sampled(whole: Rig) -> None:
    with torch.no_grad():
        whole.change(seed=9)
        whole.model.model.norm.weight.zero_()  # all logits are zero: every token is as likely as any other
    whole.run(whole.engine.load(whole.snapshot()))

    async def answers() -> list[Completion]:
        return await asyncio.gather(*begin(whole.engine, prompts(16), SamplingParams(300)))

    completions = whole.run(answers())
    stopped = [c for c in completions if c.finish_reason is FinishReason.STOP]
    assert stopped
    for completion in completions:
        np.testing.assert_allclose(completion.behavior_logprobs, -math.log(200), atol=TOLERANCE)
        assert (EOS in completion.tokens) == (completion in stopped)
        assert EOS not in completion.tokens[:-1]
    whole.change(seed=10)
    whole.run(whole.engine.load(whole.snapshot()))


def test_adapters_without_their_base_are_refused_and_the_old_ones_serve_on(adapting: AdapterRig) -> None:
    [question], engine = prompts(1), adapting.engine
    other = snapshot_of(twin(adapting.model, seed=5), adapting.folder, 0)
    lonely = replace(adapters_snapshot(adapting.adapters, other, adapting.folder, 1000), base=None)
    for bad, reason in (
        (lonely, f"version 1000 stand beside {other.digest[:12]}, here is {engine.held_base[:12]}"),
        (other, "snapshot 0 is of whole weights, which does not fit lora.rank 6"),
    ):
        assert reason in str(adapting.run(outcome(engine.load(bad))))
    completion = adapting.run(engine.generate("after", question, SamplingParams(20), 0))
    assert distance(reference_logprobs(adapting.model, question, completion, 1.0), completion, 0, 20) < TOLERANCE


def test_adapters_go_onto_another_base_that_comes_along(adapting: AdapterRig) -> None:
    """As after a resume that began anew."""
    [question] = prompts(1)
    adapting._below = twin(adapting._below, seed=31)
    adapting._base = snapshot_of(adapting._below, adapting.folder, 0)
    adapting.change(seed=32)
    adapting.run(adapting.engine.load(adapting.snapshot()))
    completion = adapting.run(adapting.engine.generate("other", question, SamplingParams(20), 0))
    assert distance(reference_logprobs(adapting.model, question, completion, 1.0), completion, 0, 20) < TOLERANCE


def test_a_stop_token_of_the_request_ends_it_and_is_part_of_it(untied: Rig) -> None:
    [question] = prompts(1)
    free = untied.run(untied.engine.generate("free", question, SamplingParams(20, 0.0), 0)).tokens.tolist()
    stop = free[10]
    sampling = SamplingParams(20, 0.0, stop_token_ids=(stop,))
    completion = untied.run(untied.engine.generate("stopped", question, sampling, 0))
    assert completion.tokens.tolist() == free[: free.index(stop) + 1]
    assert completion.finish_reason is FinishReason.STOP


def test_a_stop_text_ends_it_with_the_token_that_completes_it_and_both_engines_agree(
    untied: Rig,
) -> None:
    """A text of two tokens, and one inside a token's. vLLM reads a Qwen2 folder with Qwen2's decoder: no spaces."""
    rig = untied
    questions = prompts(3)
    oracle = TransformersEngine(rig.options)

    async def both() -> None:
        await oracle.start()
        await oracle.load(rig.snapshot(held_base=""))
        free = await asyncio.gather(*begin(rig.engine, questions, SamplingParams(40, 0.0)))
        for question, whole in zip(questions, free, strict=True):
            words = [f"w{token}" for token in whole.tokens.tolist()]
            for engine, space in ((rig.engine, ""), (oracle, " ")):
                for stop in (space.join(words[20:22]), words[25][1:]):
                    ends = next(end for end in range(1, 41) if stop in space.join(words[:end]))
                    sampling = SamplingParams(40, 0.0, stop=("nowhere", stop))
                    made = await engine.generate(f"until {stop}", question, sampling, 0)
                    assert made.tokens.tolist() == whole.tokens[:ends].tolist()
                    assert (len(made.behavior_logprobs), made.spans[-1].end) == (ends, ends)
                    assert made.finish_reason is FinishReason.STOP
        await oracle.close()

    rig.run(both())


def test_turns_on_both_sides_of_an_update_are_of_the_weights_that_their_spans_name(rig: Rig) -> None:
    """With the prefix cache of the first turn, and tokens between the turns that nobody sampled."""
    assert rig.engine.held is not None
    old, old_version = rig.model, rig.engine.held.version
    [question] = prompts(1, length=100)

    async def talked() -> Completion:
        texts = Texts(rig.folder / "model")
        sampling = SamplingParams(60, 1.0)
        prompt = Prompt(0, 0, question)
        own = SampleEngine(rig.engine, prompt, Attempt("talk", sampling, 7), texts, MAX_LEN, 60.0, lambda _: None)
        talk = Conversation(own, prompt)
        for _ in range(2):
            await talk.generate(max_tokens=15)
            talk.observe([5, 6, 7])
        rig.change(seed=300 + rig.version)
        await rig.engine.load(rig.snapshot())
        await talk.generate()
        made = talk.completion()
        own.check(made)
        return made

    made = rig.run(talked())
    assert made.spans == (VersionSpan(old_version, 0, 36), VersionSpan(rig.version, 36, 60))
    assert made.observed is not None
    assert np.flatnonzero(made.observed).tolist() == [15, 16, 17, 33, 34, 35]
    by_old, by_new = (reference_logprobs(model, question, made, 1.0) for model in (old, rig.model))
    for by, start, end in ((by_old, 0, 15), (by_old, 18, 33), (by_new, 36, 60)):
        assert distance(by, made, start, end) < TOLERANCE
    assert distance(by_old, made, 36, 60) > 1.0


def test_progress_and_statistics_tell_what_runs(untied: Rig) -> None:
    async def watched() -> None:
        generated = untied.engine.statistics().generated_tokens
        tasks = begin(untied.engine, prompts(70), SamplingParams(200), "w")
        await until(lambda: untied.engine.statistics().num_waiting == 6, "6 waiting requests")
        assert untied.engine.statistics().num_running == 64
        assert 0 < untied.engine.statistics().kv_usage < 1
        assert set(untied.engine.progress()) == {f"w{i}" for i in range(70)}
        await asyncio.gather(*tasks)
        assert untied.engine.progress() == {}
        assert untied.engine.statistics().generated_tokens == generated + 70 * 200

    untied.run(watched())


def test_an_aborted_request_raises_and_the_engine_goes_on(untied: Rig) -> None:
    async def abort_and_ask_again() -> None:
        tasks = begin(untied.engine, prompts(4), SamplingParams(400), "a")
        await all_reached(untied.engine, 4, 1)
        await untied.engine.abort_all()
        for task in tasks:
            assert isinstance(await outcome(task), GenerationAborted)
        assert len((await untied.engine.generate("after", prompts(1)[0], SamplingParams(5), 0)).tokens) == 5

    untied.run(abort_and_ask_again())


def test_a_cancelled_request_leaves_the_engine(untied: Rig) -> None:
    async def cancel() -> None:
        [task] = begin(untied.engine, prompts(1), SamplingParams(400), "c")
        await all_reached(untied.engine, 1, 1)
        task.cancel()
        await asyncio.wait({task}, timeout=5)
        assert task.cancelled()
        assert untied.engine.progress() == {}
        await until(lambda: untied.engine.statistics().num_running == 0, "an empty engine", 5)

    untied.run(cancel())


def test_a_prompt_that_does_not_fit_is_refused_and_the_engine_goes_on(untied: Rig) -> None:
    refused = untied.run(outcome(untied.engine.generate("long", prompts(1, length=600)[0], SamplingParams(5), 0)))
    assert isinstance(refused, RequestFailed)
    assert "long" in str(refused)
    assert len(untied.run(untied.engine.generate("fits", prompts(1)[0], SamplingParams(5), 0)).tokens) == 5


@pytest.mark.parametrize("harm", ["truncated", "gone"])
def test_a_snapshot_that_is_cut_short_or_gone_is_refused_and_the_old_weights_serve_on(untied: Rig, harm: str) -> None:
    [question], held = prompts(1), untied.engine.held
    bad = snapshot_of(twin(untied.model, seed=77), untied.folder, 1000)

    async def load_bad() -> tuple[Any, Completion]:
        [task] = begin(untied.engine, [question], SamplingParams(200), "t")
        await all_reached(untied.engine, 1, 20)
        if harm == "truncated":
            os.truncate(bad.folder / WEIGHTS_FILE, bad.manifest.total_bytes - 1)
        else:
            shutil.rmtree(bad.folder)
        return await outcome(untied.engine.load(bad)), await task

    error, completion = untied.run(load_bad())
    assert isinstance(error, SnapshotError)
    assert ("must have" if harm == "truncated" else "is gone") in str(error)
    assert untied.engine.held == held
    assert completion.spans == (VersionSpan(untied.version, 0, 200),)
    assert distance(reference_logprobs(untied.model, question, completion, 1.0), completion, 0, 200) < TOLERANCE


def test_settings_that_vllm_does_not_know_or_that_are_ours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vllm.load_format is set by Tether itself"):
        VLLMEngine(EngineOptions(tmp_path, MAX_LEN, extra={"load_format": "auto"}))
    engine = VLLMEngine(EngineOptions(tmp_path, MAX_LEN, extra={"blok_size": 16}))
    with pytest.raises(ConfigError, match="blok_size"):
        asyncio.run(engine.start())
    arguments = engine_arguments(EngineOptions(tmp_path, MAX_LEN, seed=11, extra={"block_size": 64}))
    assert (arguments["block_size"], arguments["seed"]) == (64, 11)
    assert "enable_lora" not in arguments
    with pytest.raises(ConfigError, match=r"vllm.enable_lora is set by Tether itself"):
        VLLMEngine(EngineOptions(tmp_path, MAX_LEN, extra={"enable_lora": True}))
    rooms = {
        rank: engine_arguments(EngineOptions(tmp_path, MAX_LEN, lora_rank=rank))["max_lora_rank"] for rank in (8, 9)
    }
    assert rooms == {8: 8, 9: 16}


def damaged(rig: Rig, harm: str) -> Snapshot:
    """Other weights: a third of one fused parameter is missing, or has another shape."""
    tensors = {name: parameter.detach() for name, parameter in twin(rig.model, seed=88).named_parameters()}
    name = "model.layers.1.self_attn.k_proj.weight"
    tensor = tensors.pop(name)
    if harm == "another shape":
        tensors[name] = tensor[:-1]
    return snapshot_from(tensors, rig.folder, 1000)


async def failing_load(rig: Rig, harm: str) -> None:
    if harm == "an adapter without a place":
        assert isinstance(rig, AdapterRig)
        rig.adapters = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in rig.adapters.items()}
        await rig.engine.load(rig.snapshot())
    elif harm == "cancelled":
        os.kill(rig.core_pid, signal.SIGSTOP)
        await asyncio.wait_for(rig.engine.load(rig.snapshot()), 0.3)
    else:
        await rig.engine.load(damaged(rig, harm))


@pytest.mark.parametrize(
    ("harm", "kind", "error"),
    [
        ("a missing tensor", "tied", EnginePoisoned),
        ("another shape", "untied", EnginePoisoned),
        ("an adapter without a place", "adapters", EnginePoisoned),
        ("cancelled", "untied keep", TimeoutError),
    ],
)
def test_after_a_load_that_failed_half_way_nothing_is_served_ever_again(
    harm: str, kind: str, error: type[Exception], rigs: dict[str, Rig], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rig = rig_of(kind, rigs, tmp_path_factory)

    async def poison() -> None:
        tasks = begin(rig.engine, prompts(4), SamplingParams(400), "p")
        await all_reached(rig.engine, 4, 20)
        assert type(await outcome(failing_load(rig, harm))) is error
        [later] = begin(rig.engine, prompts(1), SamplingParams(4), "later")
        for call in (*tasks, later, rig.engine.load(rig.snapshot())):
            failure = await outcome(call, 5)
            assert type(failure) is EnginePoisoned
            assert "failed half-way" in str(failure)
        await until(lambda: not running(rig.core_pid), "the end of the engine core", 5)

    rig.run(poison())


def test_a_killed_engine_core_is_noticed_by_requests_and_by_a_load_that_waits_for_it(
    rigs: dict[str, Rig], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rig = rig_of("tied", rigs, tmp_path_factory)

    async def kill() -> None:
        tasks = begin(rig.engine, prompts(4), SamplingParams(400), "k")
        await all_reached(rig.engine, 4, 1)
        os.kill(rig.core_pid, signal.SIGSTOP)
        load = asyncio.create_task(rig.engine.load(rig.snapshot()))
        done, _ = await asyncio.wait({load}, timeout=0.3)
        assert not done
        os.kill(rig.core_pid, signal.SIGKILL)
        killed = time.monotonic()
        errors = [await outcome(task) for task in (load, *tasks)]
        assert time.monotonic() - killed < 2.0
        assert [type(error) for error in errors] == [EngineDead] * 5
        assert type(await outcome(rig.engine.generate("later", prompts(1)[0], SamplingParams(4), 0))) is EngineDead
        with pytest.raises(EngineDead):
            rig.engine.statistics()

    rig.run(kill())


def test_no_completion_is_cut_short_unseen_by_a_ctrl_c_that_reaches_the_engine_core(untied: Rig) -> None:
    async def interrupt() -> None:
        tasks = begin(untied.engine, prompts(4), SamplingParams(400), "i")
        await all_reached(untied.engine, 4, 1)
        os.kill(untied.core_pid, signal.SIGINT)
        for task in tasks:
            assert isinstance(await outcome(task), GenerationAborted | EngineDead)
        await until(lambda: not untied.alive(), "the end of the engine", 20)

    untied.run(interrupt())


@pytest.fixture(scope="module")
def front_end(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """Another process with an engine in it, started in a foreign folder."""
    folder = tmp_path_factory.mktemp("front_end")
    make_tiny_qwen2(folder / "model", tied=True)
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        [sys.executable, str(root / "tests/vllm_frontend.py"), str(folder / "model")],
        stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHONPATH": str(root)},
        cwd=folder,
        text=True,
    )
    yield process
    process.kill()
    process.wait()


def test_vllm_leaks_only_listed_variables_and_its_core_leaves_when_the_front_end_is_killed(
    front_end: subprocess.Popen[str],
) -> None:
    assert front_end.stdout is not None
    core_pid, *variables = front_end.stdout.readline().split()
    assert variables
    assert [name for name in variables if not any(fnmatch(name, pattern) for pattern in LEAKED_VARIABLES)] == []

    assert running(int(core_pid))
    front_end.kill()
    asyncio.run(until(lambda: not running(int(core_pid)), "the end of the orphan", 3.0))
