"""The real broker service in a simulated cluster: every call becomes the message that a process would send.

Used by tests only. It stands where `SimulatedBroker` stands, and shows that this plays what the service plays. Rows,
weights and sockets are all that is not real.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from broker.batches import ScheduleSettings
from broker.leases import Grant, OpenLease
from broker.ledger import Ledger
from broker.outcome import Later
from broker.prompts import TOO_LONG, Unusable
from broker.run_state import RunState
from broker.service import Service
from protocol.codec import Header
from protocol.config import Config
from protocol.errors import ProtocolError
from protocol.messages import (
    Advance,
    Beat,
    BeatAnswer,
    Bye,
    Evaluate,
    Finished,
    Hello,
    Leases,
    Message,
    Publish,
    Pull,
    Release,
    Result,
    Role,
    SharePage,
    Status,
    Take,
    Verdict,
    Welcome,
)
from protocol.shares import join_pages
from protocol.types import Prompt, Trajectory
from protocol.weights import CHUNK_BYTES, Manifest, lay_out
from tests.simulation.books import Books
from tests.simulation.broker import Cut, Refused, Replaced, Standing
from tests.simulation.promises import WatchedScheduler
from tests.simulation.world import World

TOKENS = np.arange(3, dtype=np.int32)
LAYOUT = lay_out([("w", "float32", (CHUNK_BYTES // 4,))])


def config_of(world: World) -> Config:
    """The run's settings, as far as the service looks at them itself."""
    settings = world.settings
    watchdog = {"lease_ttl_s": settings.lease_ttl_s, "heartbeat_s": 1.0, "warn_s": 1e6, "stop_s": 1e7}
    config = Config.model_validate({"staleness": {"max": settings.max_staleness}, "watchdog": watchdog})
    batch = config.batch.model_copy(update={"prompts": settings.prompts_per_step, "group_size": settings.group_size})
    return config.model_copy(update={"batch": batch})


@dataclass(eq=False)
class Rows:
    """What the service needs of a prompt source."""

    world: World
    num_rows: int = 1 << 30
    evaluation: list[Prompt] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.evaluation = [Prompt(n, n, TOKENS) for n in range(self.world.load.num_evaluation_prompts)]
        self.evaluation_sources = ["rows"] * len(self.evaluation)

    def prompt(self, number: int) -> Prompt | Unusable:
        every = self.world.load.unusable_every
        return Unusable(number, TOO_LONG) if every and number % every == 0 else Prompt(number, number, TOKENS)

    def decode(self, tokens: np.ndarray, *, skip_special_tokens: bool = True) -> str:
        return str(tokens.tolist())


def manifest(weights: int) -> Manifest:
    return Manifest(LAYOUT, (f"{weights:064x}",))


class ServedBroker:
    """One life of the service."""

    def __init__(self, world: World, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._world = world
        self.is_up = True
        self._run = RunState(config_of(world), "run", run_dir, "here", Rows(world), {}, 1 << 30, reward_digest="")  # type: ignore[arg-type]
        self._run.__dict__["_schedule_settings"] = lambda: world.settings
        self._service = Service(self._run)
        self._roles: dict[int, Role] = {}  # by session
        self._weights: dict[str, int] = {}  # by digest
        self._cuts: dict[tuple[int, int], Cut] = {}  # by (epoch, step)
        self._leases: Leases | None = None  # the last answer to a pull
        self._books = Books()  # of the standing that comes next
        monkeypatch.setattr("broker.run_state.Scheduler", self._watched)
        self.changed = True

    def _watched(
        self, settings: ScheduleSettings, ledger: Ledger, version: int, training: int | None
    ) -> WatchedScheduler:
        return WatchedScheduler(settings, ledger, version, training, books=self._books, record=self._world.record)

    @property
    def epoch(self) -> int:
        return self._run.epoch

    @property
    def changed(self) -> bool:
        return self._service.changed

    @changed.setter
    def changed(self, value: bool) -> None:
        self._service.changed = value

    @property
    def scheduler(self) -> WatchedScheduler | None:
        scheduler = self._run.scheduler
        assert scheduler is None or isinstance(scheduler, WatchedScheduler)
        return scheduler

    def _ask(self, session: int, epoch: int, role: Role, message: Message) -> Message | Later:
        try:
            header = Header(epoch, session, 1)
            return self._service.handle(message, header, f"key of a {role}", role, b"route", self._world.now)
        except ProtocolError as error:
            if error.code in ("session", "order"):
                raise Refused(error.code) from None
            if error.code == "replaced":
                raise Replaced(error.code) from None
            raise

    # --- Who is there

    def hello(self, role: Role, name: str, incarnation: int, standing: Standing | None = None) -> tuple[int, int]:
        told: dict[str, Any] = {}
        if standing is not None:
            self._books = standing.books.skip() if standing.skipped else standing.books
            training = -1 if standing.training is None else standing.training
            ledger = b"" if standing.ledger is None else msgpack.packb(standing.ledger)
            told = {
                "version": standing.version,
                "training_step": training,
                "ledger": ledger,
                "skipped": standing.skipped,
            }
        welcome = self._ask(0, 0, role, Hello(role=role.value, name=name, incarnation=incarnation, **told))
        assert isinstance(welcome, Welcome)
        self._roles[welcome.session] = role
        return welcome.session, self.epoch

    def knows(self, session: int, epoch: int) -> bool:
        return epoch == self.epoch and self._run.peers.get(session) is not None

    def bye(self, session: int, epoch: int) -> None:
        self._ask(session, epoch, Role.GENERATOR, Bye())

    def tick(self) -> tuple[list[OpenLease], list[int]]:
        before = {peer.session for peer in self._run.peers.of_role(Role.GENERATOR)}
        if self.scheduler:
            self.scheduler.last_expired = []
        self._service.tick(self._world.now)
        after = {peer.session for peer in self._run.peers.of_role(Role.GENERATOR)}
        return self.scheduler.last_expired if self.scheduler else [], sorted(before - after)

    # --- Generators

    def weights_of(self, version: int) -> int | None:
        shelved = self._run.shelf.version(version)
        return self._weights[shelved.digest] if shelved else None

    @property
    def announced(self) -> tuple[int, int] | None:
        newest = self._run.announced
        return (newest.version, self._weights[newest.digest]) if newest else None

    def pull(self, session: int, epoch: int, held: tuple[int, int], room: int) -> list[Grant] | None:
        question = Pull(version=held[0], digest=manifest(held[1]).digest if held[0] >= 0 else "", room=room)
        answer = self._ask(session, epoch, Role.GENERATOR, question)
        if not isinstance(answer, Leases):
            return None
        self._leases = answer
        assert self.scheduler is not None
        leases = [self.scheduler.leases.find(item.attempt) for item in answer.leases]
        assert [lease.grant.prompt for lease in leases if lease] == [item.number for item in answer.leases]
        return [lease.grant for lease in leases if lease]

    def undelivered(self, grants: list[Grant]) -> None:
        assert self._leases is not None
        assert [item.attempt for item in self._leases.leases] == [grant.attempt for grant in grants]
        self._service.undelivered(self._leases)

    def result(self, session: int, epoch: int, of_epoch: int, trajectory: Trajectory) -> Status:
        completion, error = trajectory.completion, trajectory.error
        message = Result(
            epoch=of_epoch,
            prompt=trajectory.prompt,
            attempt=trajectory.attempt,
            sample=trajectory.sample,
            error=error,
            spans=[tuple(span) for span in completion.spans] if completion else [],
            reward=trajectory.reward,
            tokens=completion.tokens if completion else np.zeros(0, np.int32),
            behavior_logprobs=completion.behavior_logprobs if completion else np.zeros(0, np.float32),
            observed=np.zeros(0, np.bool_),
        )
        verdict = self._ask(session, epoch, Role.GENERATOR, message)
        assert isinstance(verdict, Verdict)
        return Status(verdict.status)

    def release(self, session: int, epoch: int, grant: Grant, failed: bool) -> None:
        message = Release(number=grant.prompt, attempt=grant.attempt, reason="given up", failed=failed)
        self._ask(session, epoch, Role.GENERATOR, message)

    def beat(self, session: int, epoch: int, grants: list[Grant]) -> list[Grant]:
        beat = Beat(state="x", leases=[(grant.prompt, grant.attempt, 1) for grant in grants])
        answer = self._ask(session, epoch, self._roles.get(session, Role.GENERATOR), beat)
        assert isinstance(answer, BeatAnswer)
        return [grant for grant in grants if (grant.prompt, grant.attempt) in answer.revoked]

    # --- The learner

    def take(self, session: int, epoch: int, step: int) -> Cut | str | None:
        answer = self._ask(session, epoch, Role.LEARNER, Take(step=step, rank=0, num_ranks=1, page=0))
        if isinstance(answer, Finished):
            return answer.kind if answer.kind == "complete" else answer.reason
        if isinstance(answer, Later):
            return None
        assert isinstance(answer, SharePage)
        assert self.scheduler is not None
        if (self.epoch, step) not in self._cuts:
            batch = self.scheduler.last_batch
            assert batch is not None
            share = join_pages([answer], self.epoch, 0, 1)
            sent = sorted((item.prompt, item.completion.tokens.tolist()) for item in share.items)
            cut = sorted(
                (one.prompt, one.completion.tokens.tolist())
                for group in batch.groups
                for one in group.trajectories
                if one.completion
            )
            assert sent == cut, f"the share of step {step} is another batch"
            self._cuts[self.epoch, step] = Cut(self.epoch, batch, msgpack.unpackb(answer.ledger), self.scheduler.books)
        return self._cuts[self.epoch, step]

    def publish(self, session: int, epoch: int, version: int, weights: int) -> None:
        made = manifest(weights)
        self._weights[made.digest] = weights
        folder = f"/v{version}"
        message = Publish(version=version, digest=made.digest, manifest=made.to_bytes(), path=folder, host="here")
        self._ask(session, epoch, Role.LEARNER, message)

    def advance(self, session: int, epoch: int, version: int, skipped: bool) -> None:
        self._ask(session, epoch, Role.LEARNER, Advance(version=version, skipped=skipped))

    def evaluate(self, session: int, epoch: int, version: int) -> None:
        self._ask(session, epoch, Role.LEARNER, Evaluate(version=version))
