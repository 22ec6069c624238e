"""Evaluations: one version, all answers, and never a mixture."""

from __future__ import annotations

from broker.leases import Refusal, ResultStatus, Wait
from protocol.types import LeaseKind
from tests.schedules import finish, fresh, grants, refusal, train
from tests.simulation.generator import answer


def test_an_evaluation_goes_to_its_version_before_anything_else_and_outside_the_ledger() -> None:
    scheduler = fresh(version=3)
    scheduler.evaluate([7, 8])
    given = grants(scheduler, version=3, room=4)
    assert [(g.kind, g.prompt, g.samples) for g in given[:2]] == [
        (LeaseKind.EVALUATE, 7, 1),
        (LeaseKind.EVALUATE, 8, 1),
    ]
    assert given[2].kind is LeaseKind.TRAIN
    assert scheduler.ledger.counts()["offered"] == len(scheduler.leases.open) == 1
    finish(scheduler, given[1])
    assert scheduler.take_evaluation() is None
    finish(scheduler, given[0])
    result = scheduler.take_evaluation()
    assert result is not None
    assert (result.version, [one.prompt for one in result.trajectories]) == (3, [7, 8])
    assert scheduler.take_evaluation() is None


def test_a_generator_of_another_version_gets_no_evaluation() -> None:
    scheduler = fresh(version=3)
    scheduler.evaluate([7])
    assert grants(scheduler, version=2, room=2)[0].kind is LeaseKind.TRAIN


def test_while_it_evaluates_a_generator_gets_leases_although_newer_weights_are_there() -> None:
    scheduler = fresh()
    scheduler.evaluate([7])
    grants(scheduler, room=1)
    finish(scheduler, *grants(scheduler, room=4, who="b"))
    train(scheduler)
    assert scheduler.pull("a", 0, 2, 0.0, newer_available=True) != Wait(Refusal.NEWER_VERSION)


def test_an_evaluation_is_finished_by_whoever_still_holds_its_version() -> None:
    scheduler = fresh()
    scheduler.evaluate([7, 8])
    first, _ = (grants(scheduler, room=1, who=who)[0] for who in ("a", "b"))
    finish(scheduler, *grants(scheduler, room=4, who="a"))
    train(scheduler)
    finish(scheduler, first)
    scheduler.holder_lost("b", crashed=True)
    (again,) = grants(scheduler, version=0, room=1, who="a")
    assert (again.kind, again.prompt, again.version) == (LeaseKind.EVALUATE, 8, 0)


def test_an_evaluation_whose_version_nobody_holds_starts_again_at_the_newest() -> None:
    scheduler = fresh()
    scheduler.evaluate([7, 8])
    done, lost = grants(scheduler, room=2, who="a")
    finish(scheduler, done)
    finish(scheduler, *grants(scheduler, room=4, who="b"))
    train(scheduler)
    scheduler.pull("b", 1, 0, 0.0, newer_available=False)
    scheduler.holder_lost("a", crashed=True)
    again = grants(scheduler, version=1, room=2, who="b")
    assert [(g.prompt, g.version) for g in again] == [(7, 1), (8, 1)]
    assert scheduler.finished(answer(lost, 0, 1.0), 0.0) is ResultStatus.LATE


def test_a_prompt_whose_generator_is_lost_half_way_through_its_k_completions_is_answered_anew() -> None:
    scheduler = fresh()
    scheduler.evaluate([7], samples=4)
    (first,) = grants(scheduler, room=4, who="a")
    assert first.samples == 4
    for sample in (0, 2):
        scheduler.finished(answer(first, sample, 1.0), 0.0)
    scheduler.pull("b", 0, 0, 0.0, newer_available=False)
    scheduler.holder_lost("a", crashed=True)
    again = grants(scheduler, room=4, who="b")[0]
    assert (again.kind, again.prompt, again.samples, again.version) == (LeaseKind.EVALUATE, 7, 4, 0)
    assert again.attempt != first.attempt
    assert scheduler.finished(answer(first, 1, 1.0), 0.0) is ResultStatus.LATE
    finish(scheduler, again)
    result = scheduler.take_evaluation()
    assert result is not None
    assert [(one.sample, one.attempt) for one in result.trajectories] == [(n, again.attempt) for n in range(4)]
    assert [len(group) for group in result.by_prompt] == [4]


def test_half_of_k_completions_are_forgotten_when_the_evaluation_starts_again_at_the_newest() -> None:
    scheduler = fresh()
    scheduler.evaluate([7, 8], samples=2)
    done, half = grants(scheduler, room=4, who="a")
    finish(scheduler, done)
    scheduler.finished(answer(half, 0, 1.0), 0.0)
    finish(scheduler, *grants(scheduler, room=4, who="b"))
    train(scheduler)
    scheduler.pull("b", 1, 0, 0.0, newer_available=False)
    scheduler.holder_lost("a", crashed=True)
    again = grants(scheduler, version=1, room=4, who="b")
    assert [(g.prompt, g.version, g.samples) for g in again] == [(7, 1, 2), (8, 1, 2)]
    for grant in again:
        finish(scheduler, grant)
    result = scheduler.take_evaluation()
    assert result is not None
    assert {one.completion.oldest_version for one in result.trajectories if one.completion} == {1}
    assert len(result.trajectories) == 4


def test_an_answer_of_another_version_spoils_no_evaluation() -> None:
    scheduler = fresh()
    scheduler.evaluate([7])
    (grant,) = grants(scheduler, room=1)
    finish(scheduler, *grants(scheduler, room=4, who="b"))
    train(scheduler)
    assert scheduler.finished(answer(grant, 0, 1.0, newest_version=1), 0.0) is ResultStatus.INVALID
    result = scheduler.take_evaluation()
    assert result is not None
    assert result.trajectories[0].error == "tokens of versions 0 to 1, expected 0 to 0"


def test_the_run_is_not_done_before_its_last_version_is_evaluated() -> None:
    scheduler = fresh(steps=1, evaluate_at_end=True)
    finish(scheduler, *grants(scheduler))
    train(scheduler)
    assert scheduler.trained_out
    assert not scheduler.done
    scheduler.evaluate([7])
    assert refusal(scheduler, version=0, newer=True) is Refusal.NEWER_VERSION
    (grant,) = grants(scheduler, version=1)
    assert refusal(scheduler, version=1, who="b") is Refusal.EVALUATION
    finish(scheduler, grant)
    assert not scheduler.done, "the result was not taken yet"
    scheduler.take_evaluation()
    assert scheduler.done
