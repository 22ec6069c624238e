"""What the broker does for the learner: shares, versions, evaluations; without sockets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgpack

from broker.peers import MAX_PEERS
from protocol.codec import Header, decode, encode
from protocol.fields import MAX_METRICS, MAX_NAME
from protocol.messages import (
    Advance,
    Done,
    Evaluate,
    FetchManifest,
    Finished,
    Leases,
    ManifestAnswer,
    Publish,
    Release,
    Role,
    SharePage,
    Take,
    VersionHint,
    Wait,
)
from tests.broker_alone import BrokerAlone, Peer, manifest


def test_a_learners_rank_that_is_early_waits_for_rank_0(tmp_path: Path) -> None:
    """After a restart of the broker the ranks come in any order; the truth comes with rank 0."""
    broker = BrokerAlone(tmp_path)
    second = broker.peer(Role.LEARNER, "learner-1", rank=1, num_ranks=2)
    assert second.take(0) == Wait(reason="rank 0 of the learner has not said hello yet")
    broker.learner(num_ranks=2)
    assert second.refused(Take(step=0, rank=1, num_ranks=2)).startswith("session: ")
    second.hello()
    assert isinstance(second.take(0), Wait)


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    learner = BrokerAlone(tmp_path).learner(num_ranks=2)
    said = "ranks: rank 0 of 1 asks, the learner has 2 ranks"
    assert learner.refused(Take(step=0, rank=0, num_ranks=1)) == said
    assert learner.refused(Take(step=0, rank=2, num_ranks=2)).startswith("ranks: rank 2 of 2 asks")


def test_a_ledger_that_does_not_add_up_is_refused(tmp_path: Path) -> None:
    learner = Peer(BrokerAlone(tmp_path), Role.LEARNER, "learner-0")
    assert learner.refused_hello(ledger=b"\xc1").startswith("ledger: the learner's ledger cannot be read")
    broken = {"offered": 9, "unsettled": [], "failures": [], "crashes": [], "trained": 3, "last_batch": []}
    broken |= {"filtered": {}, "failed": {}}
    assert "does not add up" in learner.refused_hello(ledger=msgpack.packb(broken))
    assert "cannot be read" in learner.refused_hello(ledger=msgpack.packb([1]))


def test_a_manifest_that_is_not_what_its_digest_says_is_refused(tmp_path: Path) -> None:
    learner = BrokerAlone(tmp_path).learner()
    wrong = Publish(version=1, digest="0" * 64, manifest=manifest(1).to_bytes(), path="/v1", host="here")
    assert learner.refused(wrong).startswith("manifest: the manifest's digest is")
    assert learner.refused(wrong.model_copy(update={"manifest": b"?"})).startswith("manifest: not a manifest")


def test_adapters_are_refused_until_their_base_is_published_and_a_base_is_no_version(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    learner, generator = broker.learner(), broker.generator()
    base = manifest(7)
    adapters = replace(manifest(1), base=base.digest)
    version = Publish(version=1, digest=adapters.digest, manifest=adapters.to_bytes(), path="/v1", host="here")
    below = Publish(version=0, digest=base.digest, manifest=base.to_bytes(), path="/base", host="here", is_base=True)
    assert learner.refused(version) == f"base: version 1 stands beside {base.digest[:12]}, which is not published"
    assert learner.refused(version.model_copy(update={"is_base": True})).startswith("manifest: a base has no base")
    assert learner.ask(below) == Done()
    assert generator.refused(FetchManifest(version=1)).startswith("version: version 1 is not on the shelf")
    assert learner.ask(version) == Done()
    answer = generator.ask(FetchManifest(version=1, base=base.digest))
    assert isinstance(answer, ManifestAnswer)
    assert (answer.digest, answer.manifest) == (base.digest, base.to_bytes())
    said = generator.refused(FetchManifest(version=1, base=adapters.digest))
    assert said == f"version: base {adapters.digest[:12]} is not on the shelf any more; ask for the newest"


def test_a_version_is_announced_after_it_was_published_and_after_the_one_before(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    learner, generator = broker.learner(), broker.generator()
    for lease in generator.leases(0):
        generator.answer(lease)
    assert isinstance(learner.take(0), SharePage)
    assert learner.refused(Advance(version=1)) == "order: version 1 must be published before it is announced"
    learner.publish(1)
    learner.publish(2)
    assert learner.refused(Advance(version=2)) == "order: version 2 cannot follow 0 now"
    learner.advance(1)
    assert learner.refused(Advance(version=2)) == "order: version 2 cannot follow 1 now"  # step 1 was never taken


def test_generators_hear_of_a_version_once_it_is_announced_and_not_before(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    learner, generator = broker.learner(), broker.generator()
    for lease in generator.leases(0):
        generator.answer(lease)
    learner.take(0)
    broker.service.take_hints()
    learner.publish(1)
    assert {hint.version for _, hint in broker.service.take_hints()} == {0}
    assert generator.beat().version == 0
    learner.advance(1)
    assert broker.service.take_hints() == [(b"generator-0", VersionHint(version=1, digest=manifest(1).digest))]
    assert (generator.beat().version, generator.beat().digest) == (1, manifest(1).digest)


def test_publishing_and_advancing_twice_is_doing_it_once(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    learner, generator = broker.learner(), broker.generator()
    for lease in generator.leases(0):
        generator.answer(lease)
    learner.take(0)
    for _ in range(2):
        learner.publish(1)
        learner.advance(1)
    status = broker.observer().status()
    assert (status["version"], status["next"], status["training_step"]) == (1, 1, -1)


def test_the_same_question_gets_the_same_share_until_the_next_version(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    learner, generator = broker.learner(), broker.generator()
    for lease in generator.leases(0):
        generator.answer(lease)
    first = learner.take(0)
    assert first.ledger
    assert learner.take(0) is first
    learner.hello()  # reconnects: the same process, the same epoch
    assert learner.take(0) is first
    assert learner.refused(Take(step=0, rank=0, num_ranks=1, page=1)) == (
        "page: the share of step 0 has 1 pages, page 1 was asked for"
    )
    learner.publish(1)
    learner.advance(1)
    assert learner.take(0) == Wait(reason="version 0 is not announced yet")
    assert not broker.run.pages


def test_two_ranks_get_disjoint_shares_of_one_batch(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    first = broker.learner(num_ranks=2)
    second = broker.peer(Role.LEARNER, "learner-1", rank=1, num_ranks=2)
    generator = broker.generator()
    for lease in generator.leases(0):
        generator.answer(lease)
    pages = [rank.take(0) for rank in (second, first)]
    assert pages[0].batch_digest == pages[1].batch_digest
    assert pages[0].total_tokens == pages[1].total_tokens
    samples = [{*zip(page.groups.tolist(), page.samples.tolist(), strict=True)} for page in pages]
    assert not samples[0] & samples[1]
    assert len(samples[0] | samples[1]) == broker.config.batch.prompts * broker.config.batch.group_size
    assert [bool(page.ledger) for page in pages] == [False, True]  # rank 0 keeps the books


def test_what_the_learner_waits_for_always_fits_its_message(tmp_path: Path) -> None:
    """Eight stragglers with long numbers make a long sentence; the answer must still be sent."""
    broker = BrokerAlone(tmp_path, batch={"prompts": 40, "group_size": 2}, staleness={"max": 0})
    books = {"offered": 3_000_000_000, "unsettled": [], "failures": [], "crashes": [], "trained": 3_000_000_000}
    ledger = msgpack.packb(books | {"last_batch": [], "filtered": {}, "failed": {}})
    learner, generator = broker.learner(ledger=ledger), broker.generator()
    generator.leases(0)
    said = learner.take(0)
    assert isinstance(said, Wait)
    assert "no later step may train prompts [3000000000" in said.reason
    assert len(said.reason) == MAX_NAME


# --- Evaluation


def test_an_evaluation_asked_for_while_another_runs_starts_afterwards(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path, evaluation={"every": 1})
    learner, generator = broker.learner(), broker.generator()
    learner.ask(Evaluate(version=0))
    leases = generator.leases(0)
    for lease in leases:
        if lease.kind == "train":
            generator.answer(lease)
    learner.train(0)
    learner.ask(Evaluate(version=1))
    assert {lease.version for lease in leases if lease.kind == "evaluate"} == {0}
    for lease in leases:
        if lease.kind == "evaluate":
            generator.answer(lease)
    broker.tick()
    generator.evaluate(1)
    found = learner.beat().evaluations
    assert [(each["version"], each["num_prompts"]) for each in found] == [(0, 6), (1, 6)]
    assert learner.beat(evaluations_seen=1).evaluations == found[1:]


def test_an_evaluation_asked_for_twice_is_made_once(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path, evaluation={"every": 1})
    learner, generator = broker.learner(), broker.generator()
    learner.ask(Evaluate(version=0))
    generator.evaluate(0)
    learner.ask(Evaluate(version=0))
    broker.tick()
    assert len(learner.beat().evaluations) == 1
    assert not broker.observer().status()["evaluating"]


def test_a_failed_lease_of_an_evaluation_ends_it_as_a_result_would(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path, evaluation={"every": 1})
    learner, generator = broker.learner(), broker.generator()
    learner.ask(Evaluate(version=0))
    leases = [lease for lease in generator.leases(0) if lease.kind == "evaluate"]
    for lease in leases[:-1]:
        generator.answer(lease)
    generator.ask(Release(number=leases[-1].number, attempt=leases[-1].attempt, reason="broken", failed=True))
    (evaluation,) = learner.beat().evaluations
    assert (evaluation["num_prompts"], evaluation["errors"]) == (6, 1)


def test_a_run_that_ends_before_its_last_step_is_evaluated_and_complete(tmp_path: Path) -> None:
    """Prompts that are too long leave fewer batches than anybody counted, so nobody asks for the last evaluation."""

    def lengthen(folder: Path) -> None:
        data = folder / "data" / "train.jsonl"
        long = json.dumps({"question": "w1 " * 40, "answer": "none"})
        data.write_text("\n".join(data.read_text().splitlines()[:4] + [long] * 4))

    broker = BrokerAlone(tmp_path, lengthen, num_rows=8, run={"steps": 0, "epochs": 1.0}, evaluation={"every": 100})
    learner, generator = broker.learner(), broker.generator()
    assert learner.hello().num_steps == 2
    while isinstance(answer := generator.pull(0), Leases):
        for lease in answer.leases:
            generator.answer(lease)
    learner.train(0)
    assert learner.take(1) == Wait(reason="the last evaluation")
    broker.tick()
    generator.evaluate(1)
    assert learner.take(1) == Finished(kind="complete")
    assert [evaluation["version"] for evaluation in learner.beat().evaluations] == [1]


def numbers_of(broker: BrokerAlone, learner: Peer, num_generators: int) -> dict[str, float]:
    """What the first page says of one generator that works and others that only report, as it arrives behind a wire."""
    generator = broker.generator("g0")
    for lease in generator.leases(0):
        generator.answer(lease)
    for n in range(1, num_generators):
        hello = generator.introduction(name=f"g{n}", incarnation=n)
        broker.run.peers.admit(1000 + n, "key", hello, broker.now)
    for n, peer in enumerate(broker.run.peers.of_role(Role.GENERATOR)):
        peer.numbers = dict.fromkeys(
            ("running", "waiting", "kv_usage", "generated_tokens", "apply_s", "pause_s"), n + 1.0
        )
    page = decode([bytes(frame) for frame in encode(learner.take(0), Header(1, 1, 1))]).message
    assert isinstance(page, SharePage)
    return page.numbers


def test_the_first_page_of_a_batch_arrives_however_many_generators_there_are(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    numbers = numbers_of(broker, broker.learner(), MAX_PEERS)
    assert not [name for name in numbers if name.startswith("generator/")]
    together = {name: value for name, value in numbers.items() if name.startswith("generators/")}
    for name in ("running", "waiting", "kv_usage", "generated_tokens", "apply_s", "pause_s"):
        spread = [together.pop(f"generators/{name}_{what}") for what in ("min", "mean", "max")]
        assert spread == [1.0, (MAX_PEERS + 1) / 2, MAX_PEERS]
    assert together == {}
    assert numbers["weights/apply_s"] == (MAX_PEERS + 1) / 2


def test_each_of_a_few_generators_has_curves_of_its_own(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    numbers = numbers_of(broker, broker.learner(), 64)
    assert [numbers[f"generator/g{n}/kv_usage"] for n in range(64)] == [n + 1.0 for n in range(64)]
    assert not [name for name in numbers if name.startswith("generators/")]


def test_what_reward_functions_return_beside_their_scores_becomes_curves_of_a_bounded_number(tmp_path: Path) -> None:
    broker = BrokerAlone(tmp_path)
    learner, generator = broker.learner(), broker.generator()
    for lease in generator.leases(0):
        for sample in range(lease.samples):
            beside = {"reward:score/acc": float(sample)} if sample else {}
            beside |= {f"reward:score/key{lease.number}-{sample}-{n}": 1.0 for n in range(20)}
            assert generator.deliver(generator.result(lease, sample, metrics=beside)).status == "accepted"
    page = learner.take(0)
    assert isinstance(page, SharePage)
    assert page.numbers["reward/reward:score/acc"] == 1.5  # over samples 1 and 2, which have it
    assert len([name for name in page.numbers if name.startswith("reward/reward:score/")]) == MAX_METRICS
