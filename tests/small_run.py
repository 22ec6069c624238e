"""A run without models in one process: the real broker on real sockets, real generators around fake engines, and a
scripted learner.

Everything between engine and optimizer is the product's own code: sockets, sessions, desks, scheduler, ledger,
shares, snapshots."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from actors.engine import EngineOptions
from actors.fake_engine import FakeEngine
from actors.generator import Generator
from actors.rollouts.runner import RolloutRunner
from actors.scorer import Scorer
from actors.snapshot_source import SnapshotSource
from broker.open_run import open_run
from broker.service import Service
from learner.link import Link, Standing, Taken
from learner.snapshot_ring import SnapshotRing
from protocol.addresses import Addresses, host_identity
from protocol.config import Config
from protocol.keys import make_run_keys, read_client_key
from protocol.messages import Finished, Hello, Role
from protocol.session import Session
from protocol.weights import Snapshot, SnapshotWriter, TensorSpec, lay_out
from tests.wire import free_addresses, serving

VOCABULARY = 100
REWARD = """def score(completion, answer):
    words = completion.split()
    return sum(word[1:].isdigit() and int(word[1:]) % 2 for word in words) / max(1, len(words))
"""


def make_run(folder: Path, num_rows: int = 40, **sections: dict[str, Any]) -> Config:
    """A run folder with data, tokenizer, keys and addresses, and its settings."""
    model, data = folder / "model", folder / "data"
    make_model_files(model, VOCABULARY)
    data.mkdir(parents=True)
    for name, count in (("train", num_rows), ("test", 6)):
        rows = [{"question": f"w{1 + row % 99} w{1 + row * 7 % 99}", "answer": "none"} for row in range(count)]
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "reward.py").write_text(REWARD)
    settings: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"train": str(data), "max_prompt_tokens": 16},
        "rewards": {"functions": [{"use": f"{folder / 'reward.py'}:score"}]},
        "batch": {"prompts": 4, "group_size": 3},
        "sampling": {"max_tokens": 20},
        "generators": {"engine": "fake"},
        "evaluation": {"every": 0},
        "watchdog": {"heartbeat_s": 0.2, "lease_ttl_s": 3.0},
        "run": {"steps": 8},
    }
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values
    make_run_keys(folder)
    addresses = free_addresses()
    fields = {"control": addresses.control, "bulk": addresses.bulk, "run_id": "test"}
    (folder / "broker.json").write_text(json.dumps(fields))
    return Config.model_validate(settings)


def make_model_files(model: Path, vocabulary: int) -> None:
    """Tokenizer and config of a model whose tokens are the words w1, w2, ..; 0 ends a completion."""
    model.mkdir(parents=True)
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "config.json").write_text(json.dumps({"vocab_size": vocabulary, "eos_token_id": 0}))


@contextmanager
def broker(folder: Path, config: Config) -> Iterator[Service]:
    service = Service(open_run(config, folder, host_identity()))
    with serving(folder, service, Addresses.read(folder)):
        yield service


@dataclass
class FakeGenerator:
    """A real generator with a fake engine, in a thread with its own loop."""

    folder: Path
    config: Config
    name: str = "generator-0"
    host: str = field(default_factory=host_identity)
    step_s: float = 0.001
    mean_tokens: float = 8.0
    engine_type: type[FakeEngine] = FakeEngine
    addresses: Addresses | None = None  # other than the broker's own: of a line between them
    engine: FakeEngine | None = None
    error: BaseException | None = None

    def __enter__(self) -> FakeGenerator:
        self._started, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(20), f"{self.name} did not start: {self.error}"
        return self

    def __exit__(self, *_: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._generator.leave)
        self._thread.join(20)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def vanish(self) -> None:
        """Stop at once, as a killed process does: no farewell, nothing handed back."""
        self._loop.call_soon_threadsafe(self._work.cancel)
        self._thread.join(20)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._generate())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self._loop.close()

    async def _generate(self) -> None:
        from protocol.rewards import reward_digest
        from protocol.rollouts import rollout_digest

        digest = reward_digest([function.use for function in self.config.all_rewards.functions])
        key = read_client_key(self.folder / "keys" / "generator.key")

        def hello() -> Hello:
            return Hello(
                role=Role.GENERATOR.value,
                name=self.name,
                incarnation=id(self),
                host=self.host,
                reward_digest=digest,
                rollout_digest=rollout_digest(self.config.rollout.use),
            )

        session = await Session.open(self.addresses or Addresses.read(self.folder), key, hello, timeout_s=10)
        options = EngineOptions(self.folder / "model", max_model_len=64, lora_rank=self.config.lora.rank)
        self.engine = self.engine_type(options, step_s=self.step_s, mean_tokens=self.mean_tokens, vocabulary=VOCABULARY)
        rollout = RolloutRunner(self.config, self.config.rollout, self.folder / "model")
        scorer = Scorer(self.config, self.config.all_rewards, self.folder / "model")
        await asyncio.gather(self.engine.start(), scorer.start())
        staging = self.folder / f"staging-{self.name}"
        staging.mkdir(mode=0o700)
        source = SnapshotSource(session, staging, 10.0)
        self._generator = Generator(session, self.engine, rollout, scorer, source, self.config)
        self._work = asyncio.get_running_loop().create_task(self._generator.run())
        self._started.set()
        vanished = False
        try:
            await self._work
        except asyncio.CancelledError:
            vanished = True
            raise
        finally:
            await session.close(farewell="" if vanished else "leaves")
            await self.engine.close()
            await scorer.close()


class ScriptedLearner:
    """Takes, publishes and advances as the trainer does; its weights, `size` float32, are random in every version.

    With `base_size` they are adapters beside a base of so many float32.
    """

    def __init__(
        self, folder: Path, config: Config, standing: Standing | None = None, size: int = 1000, base_size: int = 0
    ) -> None:
        self.version = standing.version if standing else 0
        self.trained: list[Taken] = []
        self._bound, self._layout = config.staleness.max, lay_out([("w", "float32", (size,))])
        self._ring = SnapshotRing(folder / f"snapshots-{id(self):x}", self._layout)
        self._base: Snapshot | None = None
        if base_size:
            layout = lay_out([("w", "float32", (base_size,))])
            self._base = _random(SnapshotWriter(folder / f"base-{id(self):x}", layout), layout).finish(0)
        self.link = Link(
            Addresses.read(folder),
            read_client_key(folder / "keys" / "learner.key"),
            rank=0,
            num_ranks=1,
            standing=standing or Standing(0, -1, b""),
            settings_digest=config.result_digest(),
            wait_s=30.0,
        )
        self.publish()

    def __enter__(self) -> ScriptedLearner:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close("the test is over")

    def step(self) -> bool:
        """One step; False when there is no further one."""
        taken = self.link.take(self.version, lambda: None)
        if isinstance(taken, Finished):
            self.finished = taken
            return False
        self.finish(taken)
        return True

    def finish(self, taken: Taken) -> None:
        """The step of this batch."""
        self.link.agreed(taken)
        for item in taken.share.items:
            assert 0 <= taken.share.step - item.completion.oldest_version <= self._bound
        self.trained.append(taken)
        self.version += 1
        self.publish()
        self.link.advance(self.version)

    def publish(self) -> None:
        writer = _random(self._ring.begin(self.version), self._layout, self.version)
        self.link.publish(writer.finish(self.version, self._base))

    @property
    def prompts(self) -> list[int]:
        """Every prompt that was trained, one entry for each group."""
        return [prompt for taken in self.trained for prompt in sorted({item.prompt for item in taken.share.items})]


def _random(writer: SnapshotWriter, layout: tuple[TensorSpec, ...], seed: int = 1000) -> SnapshotWriter:
    view = writer.view(layout[0])
    view[:] = np.frombuffer(np.random.default_rng(seed).bytes(len(view)), np.uint8)
    return writer
