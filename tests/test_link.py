"""A learner rank's line to the broker, above all while the broker is being replaced under it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.outcome import Later
from learner.link import Link, Standing
from protocol.errors import ProtocolError
from protocol.keys import read_client_key
from protocol.messages import (
    Advance,
    Beat,
    BeatAnswer,
    Bye,
    Done,
    Evaluate,
    Evaluation,
    Hello,
    Message,
    Publish,
    SharePage,
    Take,
    Wait,
    Welcome,
)
from protocol.shares import split_pages
from protocol.types import Completion, FinishReason, Share, ShareItem, VersionSpan
from protocol.weights import SnapshotWriter, lay_out
from tests.small_run import FakeGenerator, ScriptedLearner, broker, make_run
from tests.wire import SmallService, serving, wait_until


class LearnersBroker(SmallService):
    """Answers as a broker that was scripted; a new `epoch` is a restart."""

    def __init__(self, **answers: Any) -> None:
        super().__init__(self._answer)
        self.answers = answers
        self.heard: list[Message] = []
        self.evaluations: list[Evaluation] = []
        self.hellos: list[Hello] = []

    def _answer(self, message: Message, header: Any, role: Any) -> Any:
        if isinstance(message, Hello):
            self.hellos.append(message)
            return Welcome(session=self.epoch, run_id="r", settings={}, heartbeat_s=0.05)
        if header.epoch != self.epoch:
            raise ProtocolError("session", "say hello again")
        if isinstance(message, Beat):
            found = [evaluation.model_dump() for evaluation in self.evaluations]
            return BeatAnswer(version=0, digest="", evaluations=found[message.evaluations_seen :])
        self.heard.append(message)
        answer = self.answers.get(type(message).__name__, Done())
        return answer(message) if callable(answer) else answer


@contextmanager
def linked(folder: Path, service: LearnersBroker, standing: Standing | None = None) -> Iterator[Link]:
    with serving(folder, service) as (addresses, _):
        key = read_client_key(folder / "keys" / "learner.key")
        standing = standing or Standing(0, -1, b"")
        link = Link(addresses, key, rank=0, num_ranks=1, standing=standing, settings_digest="", wait_s=10.0)
        try:
            yield link
        finally:
            link.close("the test is over")


def pages(epoch: int, number: int) -> list[SharePage]:
    """A share of so many pages; the batch and its completions tell the epoch."""
    completion = Completion(
        np.full(4, epoch, np.int32), np.zeros(4, np.float32), (VersionSpan(0, 0, 4),), FinishReason.STOP
    )
    items = tuple(ShareItem(0, i, epoch, np.ones(3, np.int32), completion) for i in range(number))
    table = np.zeros((1, number), np.float32)
    return split_pages(Share(epoch, 0, bytes([epoch] * 16), 0, 1, 4 * number, table, table, items), page_bytes=1)


def evaluation(version: int) -> Evaluation:
    return Evaluation(version=version, num_prompts=1, accuracy=0.5, rewards={}, length_mean=3.0)


def test_pages_of_two_batches_are_never_joined(tmp_path: Path) -> None:
    """The broker is replaced after two of three pages, and cuts another batch."""
    service = LearnersBroker()

    def answer(question: Take) -> SharePage:
        if question.page == 2:
            service.epoch = 2
        return pages(service.epoch, 3)[question.page]

    service.answers["Take"] = answer
    with linked(tmp_path, service) as link:
        taken = link.take(0, lambda: None)
    assert not isinstance(taken, type(None))
    share = taken.share  # type: ignore[union-attr]
    assert (share.epoch, share.batch_digest) == (2, bytes([2] * 16))
    assert [item.prompt for item in share.items] == [2, 2, 2]
    assert [message.page for message in service.heard if isinstance(message, Take)] == [0, 1, 2, 2, 0, 1, 2]


def test_waiting_for_a_batch_ends_with_what_failed_on_our_side(tmp_path: Path) -> None:
    service = LearnersBroker(Take=Wait(reason="nothing yet"))
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise RuntimeError("the announcement failed")

    with linked(tmp_path, service) as link, pytest.raises(RuntimeError, match="the announcement failed"):
        link.take(0, check)


def test_an_evaluation_is_received_once_however_often_it_is_asked_for(tmp_path: Path) -> None:
    service = LearnersBroker()
    answering = threading.Event()
    answering.set()
    with linked(tmp_path, service) as link, ThreadPoolExecutor() as threads:
        handle = service.answer

        def held_up(message: Message, header: Any, role: Any) -> Any:
            assert answering.wait(10)
            return handle(message, header, role)

        service.answer = held_up
        answering.clear()
        both = [threads.submit(link.refresh) for _ in range(2)]
        wait_until(lambda: len(link._session._control._waiting) >= 2, "two heartbeats are under way")
        service.evaluations.append(evaluation(0))
        answering.set()
        for refresh in both:
            refresh.result(10)
        service.evaluations.append(evaluation(1))
        link.refresh()
        assert [found.version for found in link.evaluations()] == [0, 1]
        link.refresh()
        assert link.evaluations() == []


def test_an_evaluation_that_is_pending_is_asked_for_again_after_a_restart(tmp_path: Path) -> None:
    """The result of an earlier one is no answer to it."""
    service = LearnersBroker()
    with linked(tmp_path, service) as link:
        link.evaluate(3)
        link.evaluate(6)
        service.evaluations.append(evaluation(3))
        link.refresh()
        service.epoch, service.evaluations = 2, []
        link.refresh()
        link.advance(7)  # answered after whatever the restart has brought on
        assert [message.version for message in service.heard if isinstance(message, Evaluate)] == [3, 6, 6]
        service.evaluations.append(evaluation(7))
        link.refresh()
        service.epoch, service.evaluations = 3, []
        link.refresh()
        link.advance(8)
        assert [message.version for message in service.heard if isinstance(message, Evaluate)] == [3, 6, 6]
        assert [found.version for found in link.evaluations()] == [3, 7]


def test_a_version_is_published_again_before_it_is_announced_to_a_new_broker(tmp_path: Path) -> None:
    service = LearnersBroker()
    shelf: set[int] = set()

    def publish(message: Publish) -> Done:
        shelf.add(message.version)
        return Done()

    def advance(message: Advance) -> Done:
        if message.version not in shelf:
            raise ProtocolError("order", f"version {message.version} must be published before it is announced")
        return Done()

    service.answers |= {"Publish": publish, "Advance": advance}
    writer = SnapshotWriter(tmp_path / "v1", lay_out([("w", "float32", (8,))]))
    with linked(tmp_path, service) as link:
        link.publish(writer.finish(1))
        shelf.clear()  # a broker that was replaced without our noticing
        link.advance(1)
        assert [type(message).__name__ for message in service.heard] == ["Publish", "Advance", "Publish", "Advance"]
        with pytest.raises(ProtocolError, match="version 2 must be published"):
            link.advance(2)


def test_a_base_is_published_before_its_first_version_and_again_to_a_broker_that_lacks_it(tmp_path: Path) -> None:
    service = LearnersBroker()
    bases: set[str] = set()

    def publish(message: Publish) -> Done:
        if message.is_base:
            bases.add(message.digest)
        elif not bases:
            raise ProtocolError("base", "it stands beside what is not published")
        return Done()

    service.answers |= {"Publish": publish}
    layout = lay_out([("w", "float32", (8,))])
    base = SnapshotWriter(tmp_path / "base", layout).finish(0)
    made = [SnapshotWriter(tmp_path / f"v{version}", layout).finish(version, base) for version in range(3)]
    with linked(tmp_path, service) as link:
        for snapshot in made[:2]:
            link.publish(snapshot)
        bases.clear()  # a broker that was replaced without our noticing
        link.publish(made[2])
    heard = [(message.version, message.is_base) for message in service.heard if isinstance(message, Publish)]
    assert heard == [(0, True), (0, False), (1, False), (2, False), (0, True), (2, False)]
    assert bases == {base.digest}


def test_a_broker_that_forgot_us_is_told_version_step_and_ledger(tmp_path: Path) -> None:
    service = LearnersBroker(Take=lambda question: pages(service.epoch, 1)[0].model_copy(update={"ledger": b"books"}))
    with linked(tmp_path, service, Standing(0, -1, b"")) as link:
        taken = link.take(0, lambda: None)
        link.agreed(taken)  # type: ignore[arg-type]
        service.epoch = 2
        link.refresh()
        link.advance(1)
        service.epoch = 3
        link.refresh()
    said = [(hello.version, hello.training_step, hello.ledger) for hello in service.hellos]
    assert said == [(0, -1, b""), (0, 0, b"books"), (1, -1, b"books")]
    assert len({hello.incarnation for hello in service.hellos}) == 1


def test_a_broker_that_was_restored_too_early_is_restored_once_more(tmp_path: Path) -> None:
    """It was told of no step in training, between our taking the batch and our agreeing on it."""
    service = LearnersBroker(Take=lambda question: pages(service.epoch, 1)[0].model_copy(update={"ledger": b"books"}))
    with linked(tmp_path, service) as link:
        taken = link.take(0, lambda: None)
        service.epoch = 2
        link.refresh()
        link.agreed(taken)  # type: ignore[arg-type]
    said = [(hello.training_step, hello.ledger) for hello in service.hellos]
    assert said == [(-1, b""), (-1, b""), (0, b"books")]
    assert service.hellos[2].incarnation != service.hellos[1].incarnation


def test_a_batch_agreed_on_while_the_broker_was_replaced_is_trained_once(tmp_path: Path) -> None:
    config = make_run(tmp_path, run={"steps": 0, "epochs": 1.0})
    first = broker(tmp_path, config)
    first.__enter__()
    with ScriptedLearner(tmp_path, config) as learner:
        with FakeGenerator(tmp_path, config, "early"):
            assert learner.step()
            taken = learner.link.take(1, lambda: None)
        first.__exit__(None, None, None)
        with broker(tmp_path, config) as second:
            learner.link.refresh()
            before = second.epoch
            learner.finish(taken)
            assert second.epoch != before
            with FakeGenerator(tmp_path, config, "late"):
                while learner.step():
                    pass
    assert sorted(learner.prompts) == list(range(40))


def test_a_refusal_ends_the_start_with_the_brokers_words(tmp_path: Path) -> None:
    service = LearnersBroker()

    def refuse(message: Message, header: Any, role: Any) -> Any:
        raise ProtocolError("settings", "other settings")

    service.answer = refuse
    with pytest.raises(ProtocolError, match="settings: other settings"), linked(tmp_path, service):
        pass


def test_a_rank_other_than_the_first_tells_nothing_of_the_run(tmp_path: Path) -> None:
    service = LearnersBroker(Bye=Done(), Take=Later(Wait(reason="")))
    with serving(tmp_path, service) as (addresses, _):
        key = read_client_key(tmp_path / "keys" / "learner.key")
        standing = Standing(7, -1, b"books")
        link = Link(addresses, key, rank=1, num_ranks=2, standing=standing, settings_digest="d", wait_s=10.0)
        link.close("done")
    (hello,) = service.hellos
    assert (hello.name, hello.rank, hello.num_ranks, hello.settings_digest) == ("learner-1", 1, 2, "d")
    assert (hello.version, hello.training_step, hello.ledger) == (0, -1, b"")
    assert isinstance(service.heard[-1], Bye)
