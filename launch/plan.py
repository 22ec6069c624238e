"""Which processes a run has, on which devices, with which arguments. Pure; run by `launch/cluster.py`.

`plan` places everything or raises PreflightError naming what would fit. The environment of learner ranks is torchrun's
(RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT): a rank sees all cards of the learner and takes its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from launch.memory import MemorySplit, RewardModelSize, generator_share
from launch.model_shape import ModelShape
from protocol.accelerators import BY_KIND, MASKS, Accelerator, Card
from protocol.config import Config
from protocol.errors import PreflightError
from protocol.settings import Value

SHARED_FRACTION = 0.45
"""With --share-gpu: how much of the card's memory all generators together may take."""


SHARED = "because of --share-gpu"
"""Origin of settings that are worked out anew at each start."""


class ProcessRole(StrEnum):
    BROKER = "broker"
    LEARNER = "learner"
    GENERATOR = "generator"


@dataclass(frozen=True, slots=True)
class Devices:
    """What there is to compute on."""

    kind: str  # of protocol.accelerators.BY_KIND
    cores: int
    cards: tuple[Card, ...] = ()

    @property
    def accelerator(self) -> Accelerator:
        return BY_KIND[self.kind]


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the plan's processes start from and write to."""

    repository: Path
    run_dir: Path
    python: str
    master_port: int  # where learner rank 0 meets the others


@dataclass(frozen=True, slots=True)
class Process:
    """One process to start. `env` comes on top of the starter's own."""

    name: str
    role: ProcessRole
    argv: tuple[str, ...]
    env: Mapping[str, str]
    device: str


@dataclass(frozen=True, slots=True)
class Plan:
    processes: tuple[Process, ...]
    notes: tuple[tuple[str, str], ...]
    """The run's arithmetic: (about what, sentence)."""
    memory: tuple[tuple[str, str], ...] = ()
    """With --share-gpu, who takes what of the card: (whose part, sentence)."""

    def of(self, role: ProcessRole) -> tuple[Process, ...]:
        return tuple(process for process in self.processes if process.role is role)


def plan(
    config: Config,
    devices: Devices,
    paths: Paths,
    *,
    resume: bool = False,
    shape: ModelShape | None = None,
    reward_model: RewardModelSize | None = None,
) -> Plan:
    """Place a run. `shape`: the model's, where it is known; `reward_model`: None if there is none.

    Raises PreflightError if it does not fit, naming what would.
    """
    learner_cards, generator_cards = _place(config, devices)
    everyone = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(paths.repository), **_threads(config, devices)}
    nothing = dict.fromkeys(MASKS, "")
    run = ("--run-dir", str(paths.run_dir))

    def start(role: ProcessRole, *arguments: str) -> tuple[str, ...]:
        # -P: without it launch/ would come first on the path, where `learner` is a file
        return (paths.python, "-P", str(paths.repository / "launch" / f"{role}.py"), *run, *arguments)

    processes = [Process("broker", ProcessRole.BROKER, start(ProcessRole.BROKER), {**everyone, **nothing}, "cpu")]
    for rank in range(config.learner.ranks):
        env = everyone | nothing | _see(devices, learner_cards) | _rank(rank, config.learner.ranks, paths.master_port)
        env["DS_ACCELERATOR"] = devices.accelerator.device
        device = f"{devices.kind} {learner_cards[rank].index}" if learner_cards else "cpu"
        argv = start(ProcessRole.LEARNER, *(("--resume",) if resume else ()))
        processes.append(Process(f"learner-{rank}", ProcessRole.LEARNER, argv, env, device))
    for number, cards in enumerate(generator_cards):
        name = f"generator-{number}"
        device = f"{devices.kind} {','.join(card.index for card in cards)}" if cards else devices.kind
        argv = start(ProcessRole.GENERATOR, "--name", name)
        env = everyone | nothing | _see(devices, cards)
        processes.append(Process(name, ProcessRole.GENERATOR, argv, env, device))
    if not (config.run.share_gpu and devices.cards):
        memory = (("memory", "--share-gpu: there is no card to share, all of it runs on the processor"),)
        return Plan(tuple(processes), _notes(config, devices), memory if config.run.share_gpu else ())
    split = MemorySplit.of(config, shape, devices.cards[0].memory_bytes, reward_model)
    split.check()
    return Plan(tuple(processes), _notes(config, devices), split.notes())


def implied_settings(config: Config, devices: Devices, shape: ModelShape | None = None) -> list[Value]:
    """What follows from the devices, and with --share-gpu from the model, where nobody has said otherwise."""
    values = []
    if config.run.device == "auto":
        values.append(Value("run.device", devices.accelerator.device, "found here"))
    if config.run.evaluation_only:
        alone = (("learner.ranks", 1), ("lora.rank", 0), ("warmup.steps", 0))
        values += [Value(key, number, "because of run.evaluation_only") for key, number in alone]
    if not (config.run.share_gpu and devices.cards and config.generators.engine == "vllm"):
        return values
    share = config.vllm.get("gpu_memory_utilization")
    if share is None:
        share = round(SHARED_FRACTION / max(1, config.generators.count), 3)
        values.append(Value("vllm.gpu_memory_utilization", share, SHARED))
    if "kv_cache_memory_bytes" not in config.vllm and shape and devices.cards[0].memory_bytes:
        cache = generator_share(config, shape, int(share * devices.cards[0].memory_bytes)).cache_bytes
        if cache > 0:
            values.append(Value("vllm.kv_cache_memory_bytes", cache, SHARED))
    return values


def _place(config: Config, devices: Devices) -> tuple[Sequence[Card], Sequence[Sequence[Card]]]:
    """Cards of the learner (by rank), and of each generator; no cards on a CPU."""
    ranks, generators = 0 if config.run.evaluation_only else config.learner.ranks, config.generators.count
    if devices.kind == "cpu":
        return (), ((),) * generators
    each = _cards_per_generator(config)
    if not devices.cards:
        raise PreflightError(
            f"--device {devices.accelerator.device} needs a card, none is visible; to compute on the processor: "
            "--device cpu"
        )
    if config.run.share_gpu:
        if ranks > 1 or each > 1:
            raise PreflightError(
                f"--share-gpu puts the learner and all generators on one card, got {ranks} learner ranks and {each} "
                "cards per generator; set --learner-gpus 1 and no parallel sizes under vllm, or leave --share-gpu out"
            )
        return devices.cards[:ranks], (devices.cards[:1],) * generators
    need = ranks + generators * each
    if need > len(devices.cards):
        seen = f"{len(devices.cards)} {'is' if len(devices.cards) == 1 else 'are'} visible"
        parts = f"{generators} generators x {each} + {ranks} learner ranks"
        raise PreflightError(
            f"this run needs {need} {devices.kind} cards ({parts}), {seen}; {_what_fits(config, devices)}"
        )
    free = devices.cards[ranks:]
    return devices.cards[:ranks], [free[i * each : (i + 1) * each] for i in range(generators)]


def _what_fits(config: Config, devices: Devices) -> str:
    """Flags of a run like the wanted one that these cards can hold: cards are shared out in the wanted proportion."""
    cards, each = len(devices.cards), _cards_per_generator(config)
    if config.run.evaluation_only and cards >= each:
        return f"fits here: --generators {cards // each}"
    one_card = "one card: --generators 1 --learner-gpus 1 --share-gpu"
    if config.generators.count == 0:
        return f"fits here: --generators 0 --learner-gpus {cards}"
    if cards <= each:
        return f"fits here, on {one_card}" + (" (and no parallel sizes under vllm)" if each > 1 else "")
    wanted = config.generators.count * each
    generators = round(cards * wanted / (wanted + config.learner.ranks) / each)
    generators = min(max(generators, 1), (cards - 1) // each)
    return f"fits here: --generators {generators} --learner-gpus {cards - generators * each}; {one_card}"


def _cards_per_generator(config: Config) -> int:
    sizes = (config.vllm.get("tensor_parallel_size", 1), config.vllm.get("pipeline_parallel_size", 1))
    return int(sizes[0]) * int(sizes[1])


def _see(devices: Devices, cards: Sequence[Card]) -> dict[str, str]:
    """The variables that show a process these cards alone."""
    if not cards:
        return {}
    mask = ",".join(card.index for card in cards)
    return dict.fromkeys(devices.accelerator.masks, mask) | dict(devices.accelerator.environment)


def _rank(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _threads(config: Config, devices: Devices) -> dict[str, str]:
    """On a CPU the cores are shared out among those that compute; more threads than cores cost more than they bring."""
    if devices.kind != "cpu":
        return {}
    return {"OMP_NUM_THREADS": str(max(1, devices.cores // max(1, config.learner.ranks + config.generators.count)))}


def _notes(config: Config, devices: Devices) -> tuple[tuple[str, str], ...]:
    prompts, group, stale = config.batch.prompts, config.batch.group_size, config.staleness.max
    ranks, generators, tokens = config.learner.ranks, config.generators.count, config.sampling.max_tokens
    completions = prompts * group
    passes = "the training rows" if config.run.epochs == 1 else f"{config.run.epochs:g} passes over the training rows"
    sampled = f"at most {completions * tokens:,} sampled tokens ({tokens:,} each)"
    bound = f"a token is at most {stale} {_plural(stale, 'version')} old when it is trained"
    packed = f"in micro-batches of {config.learner.micro_batch_tokens:,} tokens, ZeRO {config.learner.zero}"
    running = f"{config.generators.max_running} completions at a time"
    generation = ("generation", f"{generators} {_plural(generators, 'generator')} x at most {running}")
    if config.run.evaluation_only:
        asked, k = config.evaluation.max_prompts, config.evaluation.samples
        said = f"at most {asked:,} held-out prompts x {k} {_plural(k, 'completion')}, and no training"
        return (("evaluation", said), generation)
    notes = [
        ("one step", f"{prompts} prompts x {group} completions = {completions:,} completions, {sampled}"),
        ("steps", str(config.run.steps) if config.run.steps else f"{passes} / {prompts}"),
        ("staleness", f"{bound}; at most {(stale + 1) * prompts:,} groups are open at a time"),
        generation,
        ("training", f"{ranks} {_plural(ranks, 'rank')}, shares balanced by tokens (any number of ranks), {packed}"),
    ]
    if devices.kind == "cpu" and ranks + generators > devices.cores:
        taking_turns = f"{ranks + generators} processes compute on {devices.cores} {_plural(devices.cores, 'core')}"
        notes.append(("note", f"{taking_turns}: they take turns"))
    return tuple(notes)


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"
