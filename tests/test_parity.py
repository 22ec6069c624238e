"""S = 0 is the synchronous algorithm: a run of real processes against a plain loop in this one, bit for bit in float32.

The plain loop samples one sequence after another, with the same engine, policy, losses and prompt stream, and knows no
broker, lease or share. One run has one generator; the other has another seed and two generators with a group at a time
each. Rewards take longer for some completions than for others, so that results arrive in any order.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from runpy import run_path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from actors.engines import build_engine
from actors.rollout import sampling_seed
from broker.prompts import PromptSource
from broker.tokenizer import ChatTokenizer
from launch.devices import detect
from launch.plan import Paths, ProcessRole, plan
from learner.aggregation import Aggregation, Totals
from learner.batches import Row, counts, pack
from learner.losses import PolicyLoss, policy_curves
from learner.policy import Policy
from learner.preparation import OnlyUpdate
from learner.ranks import Ranks
from protocol import settings
from protocol.config import Config
from protocol.errors import Exit
from protocol.types import Completion, Prompt
from tests.cluster_process import ROOT, ClusterProcess, flags, make_task, samples_of, steps_of
from tests.learning import weights, whole_state
from tests.models import snapshot_from

NUM_STEPS = 6
PROMPTS, GROUP = 4, 3
SETTINGS: dict[str, str | int | float] = {
    "steps": NUM_STEPS,
    "max-staleness": 0,
    "prompts-per-step": PROMPTS,
    "group-size": GROUP,
    "model.dtype": "float32",
    "sampling.max_tokens": 12,
    "sampling.temperature": 0.9,
    "learner.learning_rate": 1e-3,
    "learner.micro_batch_tokens": 64,
    "checkpoint.every": 1,
    "checkpoint.keep": NUM_STEPS,
    "run.samples_per_step": PROMPTS * GROUP,
    "reward": "slow.py:score",
    "rewards.workers": GROUP,
}
ONE: dict[str, str | int | float] = {"run-name": "one", "seed": 1}
TWO: dict[str, str | int | float] = {"run-name": "two", "seed": 2, "generators": 2, "generators.max_running": GROUP}

REWARD = """import time

def score(completion, answer):
    numbers = [int(word[1:]) for word in completion.split() if word[1:].isdigit()]
    time.sleep(sum(numbers) % 3 * 0.005)
    return sum(number % 2 for number in numbers) / max(1, len(numbers))
"""

pytestmark = pytest.mark.timeout(240)


class Step(NamedTuple):
    """What one step was."""

    samples: list[dict[str, Any]]
    curves: dict[str, float]
    state: dict[str, torch.Tensor]  # weights and moments after it


class Pair(NamedTuple):
    """The same training twice."""

    run: list[Step]
    plain: list[Step]
    num_sampled: dict[str, float]  # tokens that each generator of the run had sampled before the last step


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_task(tmp_path_factory.mktemp("parity"))
    (folder / "slow.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def one(task: Path, ranks: Ranks) -> Pair:
    with ClusterProcess(task, *flags(**SETTINGS, **ONE)) as process:
        assert process.end() == Exit.DONE, process.said
    return pair(task / "runs" / "one", ranks)


@pytest.fixture(scope="module")
def two(task: Path, ranks: Ranks) -> Pair:
    run_dir = task / "runs" / "two"
    log, status = run_dir / "logs" / "broker.log", run_dir / "status.json"

    def both_work() -> bool:
        said = json.loads(status.read_text())["broker"].get("processes", []) if status.exists() else []
        states = [p["state"] for p in said if p["name"].startswith("generator")]
        return len(states) == 2 and not any(state.startswith("starting") for state in states)

    with ClusterProcess(task, *flags(**SETTINGS, **TWO)) as process:
        process.until(lambda: log.exists() and "learner-0 is here" in log.read_text(), "the learner")
        learner = process.process("learner-0")
        learner.suspend()  # or one generator might have answered everything before the other is there
        process.until(both_work, "both generators")
        learner.resume()
        assert process.end() == Exit.DONE, process.said
    return pair(run_dir, ranks)


def pair(run_dir: Path, ranks: Ranks) -> Pair:
    """What a run left behind, and the plain loop with its settings."""
    config = settings.load(run_dir / "config.yaml")
    curves, samples = steps_of(run_dir), samples_of(run_dir)
    assert [row["step"] for row in curves] == list(range(NUM_STEPS))
    run = []
    for step, row in enumerate(curves):
        trained = sorted((s for s in samples if s["step"] == step), key=lambda s: (s["prompt_number"], s["sample"]))
        checkpoint = run_dir / "checkpoints" / f"step_{step + 1}"
        shards = [load_file(path) for path in checkpoint.glob("training-*.safetensors")]
        run.append(Step(trained, row, {name: tensor for shard in shards for name, tensor in shard.items()}))
    end = "/generated_tokens"
    sampled = {name.removesuffix(end): number for name, number in curves[-1].items() if name.endswith(end)}
    with threads_of(config, run_dir):
        return Pair(run, asyncio.run(plain_loop(config, run_dir, ranks)), sampled)


@contextmanager
def threads_of(config: Config, run_dir: Path) -> Iterator[None]:
    """As many threads here as each process of the run had: sums over more of them are other sums."""
    planned = plan(config, detect("cpu", os.environ), Paths(ROOT, run_dir, sys.executable, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(int(planned.of(ProcessRole.LEARNER)[0].env["OMP_NUM_THREADS"]))
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- The plain loop ---------------------------------------------------------------------------------------------------


async def plain_loop(config: Config, folder: Path, ranks: Ranks) -> list[Step]:
    """Sample, score, update, one thing after another."""
    model = Path(config.model.path)
    prompts = PromptSource(config, ChatTokenizer(model))
    policy = Policy.open(config, str(model), ranks)
    engine = build_engine(config, model, "cpu", seed=0)
    await engine.start()
    steps = []
    for step in range(NUM_STEPS):
        await engine.load(snapshot_from(weights(policy), folder, step))
        sampled = []
        for number in range(step * PROMPTS, (step + 1) * PROMPTS):
            prompt = prompts.prompt(number)
            assert isinstance(prompt, Prompt)
            for sample in range(GROUP):
                seed = sampling_seed(config.run.seed, number, sample, failures=0)
                name = f"{number}-{sample}"
                sampled.append((prompt, await engine.generate(name, prompt.tokens, config.sampling.params(), seed)))
        rewards = scored(config, model, sampled)
        curves = train(config, policy, step, sampled, rewards)
        steps.append(Step(as_samples(model, step, sampled, rewards), curves, whole_state(policy)))
    await engine.close()
    return steps


def scored(config: Config, model: Path, sampled: list[tuple[Prompt, Completion]]) -> np.ndarray:
    """Rewards [P, G]."""
    file, _, name = config.rewards.functions[0].use.partition(":")
    score, tokenizer = run_path(file)[name], Tokenizer.from_file(str(model / "tokenizer.json"))
    values = [score(tokenizer.decode(c.tokens.tolist()), prompt.columns["answer"]) for prompt, c in sampled]
    return np.array(values, np.float32).reshape(PROMPTS, GROUP)


def train(
    config: Config, policy: Policy, step: int, sampled: list[tuple[Prompt, Completion]], rewards: np.ndarray
) -> dict[str, float]:
    """One update on the batch in the order of its prompts and samples; its curves."""
    table = rewards.astype(np.float64)
    advantages = (table - table.mean(1, keepdims=True)) / (table.std(1, ddof=1, keepdims=True) + 1e-6)
    advantages[(table == table[:, :1]).all(1)] = 0.0
    rows = [
        Row(
            prompt_tokens=prompt.tokens,
            completion_tokens=completion.tokens,
            in_loss=np.ones(len(completion.tokens), np.bool_),
            behavior_logprobs=completion.behavior_logprobs,
            versions=np.full(len(completion.tokens), step, np.int32),
            advantages=np.full(len(completion.tokens), advantage, np.float32),
        )
        for (prompt, completion), advantage in zip(sampled, advantages.flat, strict=True)
    ]
    totals = counts(rows)
    aggregation = Aggregation(
        config.algorithm, config.sampling.max_tokens, Totals(totals["tokens"], totals["sequences"])
    )
    loss = OnlyUpdate(PolicyLoss(config.algorithm, config.kl, 0.0, aggregation), config.corrections)
    micro_batches = pack(rows, config.learner.micro_batch_tokens)
    assert len(micro_batches) > 1
    update = policy.update(micro_batches, loss, config.learner.learning_rate)
    assert update.applied
    curves = policy_curves(update.sums) | {"policy/grad_norm": update.grad_norm}
    return curves | {"reward/mean": float(rewards.mean()), "reward/std": float(rewards.std(1, ddof=1).mean())}


def as_samples(
    model: Path, step: int, sampled: list[tuple[Prompt, Completion]], rewards: np.ndarray
) -> list[dict[str, Any]]:
    """The lines that a run writes of these completions."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [
        {
            "step": step,
            "prompt_number": prompt.number,
            "sample": place % GROUP,
            "prompt": tokenizer.decode(prompt.tokens.tolist(), skip_special_tokens=False),
            "completion": tokenizer.decode(completion.tokens.tolist(), skip_special_tokens=False),
            "reward": float(rewards.flat[place]),
            "rewards": {"slow:score": float(rewards.flat[place])},
            "group_rewards": rewards[place // GROUP].tolist(),
            "prompt_tokens": len(prompt.tokens),
            "completion_tokens": len(completion.tokens),
            "observed_tokens": 0,
            "finish_reason": completion.finish_reason.value,
            "versions": [[step, 0, len(completion.tokens)]],
        }
        for place, (prompt, completion) in enumerate(sampled)
    ]


# --- What must be equal -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["one", "two"])
def both(request: pytest.FixtureRequest) -> Pair:
    found: Pair = request.getfixturevalue(request.param)
    return found


def test_the_same_prompts_get_the_same_completions_and_rewards(both: Pair) -> None:
    for run, plain in zip(both.run, both.plain, strict=True):
        assert run.samples == plain.samples


def test_loss_and_gradient_are_the_same_number(both: Pair) -> None:
    for run, plain in zip(both.run, both.plain, strict=True):
        assert {name: run.curves[name] for name in plain.curves} == plain.curves
        assert plain.curves["policy/grad_norm"] > 0.0


def test_weights_and_moments_are_bit_for_bit_the_same_after_every_step(both: Pair) -> None:
    for run, plain in zip(both.run, both.plain, strict=True):
        assert run.state.keys() == plain.state.keys()
        different = [name for name in run.state if not torch.equal(run.state[name], plain.state[name])]
        assert not different


def test_both_generators_had_their_part_in_it(two: Pair) -> None:
    assert len(two.num_sampled) == 2
    assert min(two.num_sampled.values()) > 0


def test_another_seed_makes_other_completions_and_other_weights(one: Pair, two: Pair) -> None:
    assert [s["prompt"] for s in one.run[0].samples] != [s["prompt"] for s in two.run[0].samples]
    name = "fp32/model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(one.run[-1].state[name], two.run[-1].state[name])
