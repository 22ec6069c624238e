"""What can happen to a simulated cluster: every kind of event is counted, so that a test can show that it occurred."""

from __future__ import annotations

from enum import StrEnum


class Seen(StrEnum):
    """One kind of event."""

    # Schedules
    SYNCHRONOUS = "a run with S = 0"
    ONE_PROMPT = "a run with P = 1"
    ONE_SAMPLE = "a run with G = 1"
    ONE_STEP = "a run with T = 1"
    ONE_GENERATOR = "a run with one generator"
    SLOW_GENERATOR = "a run with a generator ten times slower"
    CALM = "a run without faults"

    # The network
    GRANTS_LOST = "an answer with leases was lost"
    GRANTS_UNDELIVERED = "an answer with leases could not be sent"
    RESULT_DELAYED = "a result arrived long after it was made"
    RESULT_REPEATED = "a verdict was lost and its result repeated"

    # Generators
    CRASH_SEEN_AT_ONCE = "a crashed generator's successor said hello under its name"
    CRASH_EXPIRED = "a crashed generator was noticed by its silence"
    CRASH_OF_POISON = "a prompt killed its generator"
    HOST_CRASH = "all generators died at once"
    SILENCE = "a generator was cut off for a while"
    SILENCE_OUTLIVED = "a generator that was given up came back"
    LEFT = "a generator left in order"
    JOINED = "a generator joined"
    LAGGED = "a generator stayed on an old version for a while"
    LEASE_FAILED = "a generator gave a lease up"
    LEASE_RELEASED = "a generator handed a lease back"
    LEASE_REVOKED = "a heartbeat's answer revoked a lease"
    LEASE_ALONE = "a prompt was leased alone"
    HEAVY_TAIL = "a completion took ten times as long as usual"

    # Results
    ACCEPTED = "a result was accepted"
    DUPLICATE = "a result was a duplicate"
    LATE = "a result was late"
    STALE_EPOCH = "a result of an older epoch was refused"
    ZOMBIE_ACCEPTED = "a dead generator's result was accepted, its death not being known"
    ZOMBIE_REFUSED = "a dead generator's result was refused"
    SAMPLE_FAILED = "a sample failed"

    # Prompts
    TRAINED = "a prompt was trained"
    FILTERED = "a group with equal rewards was filtered"
    UNUSABLE = "a prompt was too long"
    QUARANTINED = "a prompt was quarantined"
    SPLIT = "a group was split at the bound"
    REMAINDER_TRAINED = "a remainder was trained"
    REMAINDER_LOST = "samples of a remainder were lost"
    TOKENS_LEFT_OUT = "tokens of a remainder were left out"

    # Evaluations
    EVALUATED = "an evaluation was complete"
    EVALUATION_RESTARTED = "an evaluation began again at a newer version"
    LAST_HOLDER_DIED = "the last generator that held an evaluation's version died"

    # The broker dies
    BROKER_DIED_WAITING = "the broker died while the learner waited for a batch"
    BROKER_DIED_CUT = "the broker died just after a cut"
    SHARE_LOST = "a batch was lost with its broker"
    SHARE_OUTLIVED = "a batch arrived after its broker's death"
    BROKER_DIED_TRAINING = "the broker died while a step was in training"
    BROKER_DIED_PUBLISHING = "the broker died between an update and its advance"
    BROKER_DIED_ADVANCED = "the broker died just after an advance"
    BROKER_DIED_EVALUATING = "the broker died during an evaluation"
    BROKER_TOLD_AGAIN = "a learner had a broker restored again that did not know of its batch"
    BROKER_TOLD_OF_SKIP = "a broker was restored after a skipped step"

    # The learner dies
    LEARNER_DIED_WAITING = "the learner died while it waited for a batch"
    LEARNER_DIED_TRAINING = "the learner died in a step"
    LEARNER_DIED_PUBLISHING = "the learner died between update and advance"
    RESUMED_FROM_START = "a learner resumed without a checkpoint"
    RESUMED_NEWEST = "a learner resumed from the newest checkpoint"
    RESUMED_OLDER = "a learner resumed from an older checkpoint"
    RESUMED_TWICE = "two learners resumed one checkpoint"
    ZOMBIE_LEARNER_REFUSED = "a learner that another one had replaced was refused"
    STEP_SKIPPED = "a step was not finite and skipped"

    # The end
    SHORT_BATCH = "a batch was short"
    END_OF_DATA = "a run ended with its data"
    END_OF_STEPS = "a run ended with its last step"
    NO_SIGNAL = "a run ended without signal"
    NO_USABLE_PROMPT = "a run ended because no prompt could be used"
    TOO_MANY_QUARANTINED = "a run ended with too many bad prompts"
