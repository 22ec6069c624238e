"""Every message on the wire, who sends it, and what answers it.

    who                 asks                        on       answers
    anyone              Hello                       control  Welcome | Refused
    anyone              Beat                        control  BeatAnswer
    anyone              StatusRequest               control  StatusAnswer
    anyone              Bye                         control  Done
    generator           Pull                        control  Leases | Wait        parked until it can be answered
    generator           Release                     control  Done
    generator           FetchManifest               control  ManifestAnswer | Refused
    generator           Result                      bulk     Verdict
    generator           FetchChunk, FetchFile       bulk     Bytes | Refused
    learner rank        Take                        bulk     SharePage | Wait | Finished    parked likewise
    learner rank 0      Publish, Advance, Evaluate  control  Done | Refused
    supervisor          Drain                       control  Done
    broker              VersionHint                 control  nothing: a hint, repeated in every BeatAnswer
    broker              Over                        control  nothing: the run has ended, and so may its generators

Any request may be answered by Refused. A request is repeated until it is answered, so every handler is idempotent.
A field gets a default when it is added; none is renamed, reordered or retyped: anything else raises PROTOCOL_VERSION.
`I32`, `F32`, `U8`, `BOOL` fields travel as raw little-endian frames behind the message's map (`protocol/codec.py`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from protocol.fields import (
    BOOL,
    F32,
    I32,
    MAX_METRICS,
    MAX_REWARDS,
    MAX_RUNNING,
    MAX_TEXT,
    U8,
    ArrayField,
    F32Cube,
    F32Table,
    FileEntry,
    Finite,
    Name,
    Natural,
    Pair,
    Seconds,
    Text,
    Triple,
)

PROTOCOL_VERSION = 3


class Role(StrEnum):
    """What a key allows its holder to send."""

    LEARNER = "learner"
    GENERATOR = "generator"
    STATUS = "status"  # may ask, and may ask the run to drain


class Status(StrEnum):
    """The one final status of every result."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # this sample has arrived before
    LATE = "late"  # its lease was lost, or its group has left
    STALE_EPOCH = "stale_epoch"  # the broker was restored since
    INVALID = "invalid"  # it breaks a rule; the reason says which


class Message(BaseModel):
    """Base of all messages. Strict: a value of another type is refused, not converted."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True, use_attribute_docstrings=True
    )
    roles: ClassVar[frozenset[Role] | None] = None
    """Who may send it to the broker; None: only the broker sends it."""


_ANYONE = frozenset(Role)
_GENERATOR = frozenset({Role.GENERATOR})
_LEARNER = frozenset({Role.LEARNER})


class Hello(Message):
    """The first message of a session. `role` must be the key's."""

    roles = _ANYONE
    role: Name
    name: Name
    """What logs and the console call this process: learner-0, generator-1, ..."""
    incarnation: Natural
    """Random at process start: tells a restarted process from one that reconnects."""
    host: Name = ""
    """Equal on processes that share memory."""
    protocol: Natural = PROTOCOL_VERSION
    settings_digest: Name = ""
    """Of the settings that change results, where the process has its own; "" takes the run's."""
    reward_digest: Name = ""
    """Of reward code that a generator brings itself."""
    rank: Natural = 0
    num_ranks: Natural = 1
    version: Natural = 0
    """Rank 0: the policy version it holds."""
    training_step: int = -1
    """Rank 0: the step it trains now; -1: none."""
    ledger: Annotated[bytes, Field(max_length=1 << 20)] = b""
    """Rank 0: msgpack of the ledger as of the cut of its last agreed batch."""
    skipped: bool = False
    """Rank 0: that batch's step was not finite and changed nothing."""
    rollout_digest: Name = ""
    """Of a rollout that a generator brings itself."""


class Welcome(Message):
    session: Natural
    run_id: Name
    settings: dict[str, Any]
    """The run's resolved settings."""
    files: list[FileEntry] = []
    """Generator: (name, bytes, sha256) of the model's config and tokenizer files, to be fetched."""
    heartbeat_s: Seconds
    num_steps: Natural = 0
    """T."""


class Refused(Message):
    code: Name
    text: Text


class Done(Message):
    pass


class Wait(Message):
    """Nothing now; ask again. Sent after 5 s at the latest."""

    reason: Name
    version: Natural = 0
    digest: Name = ""


class Finished(Message):
    """There is no further batch."""

    kind: Literal["complete", "drained", "verdict"]
    """All steps are trained; or the run was asked to end early; or it cannot go on, and `reason` says why."""
    reason: Text = ""


class Beat(Message):
    """Still here, and doing this."""

    roles = _ANYONE
    state: Name
    detail: Text = ""
    for_s: Seconds = 0.0
    """How long it has been in this state."""
    leases: list[Triple] = Field(default=[], max_length=MAX_RUNNING, fail_fast=True)
    """Generator: (prompt, attempt, tokens so far) of every lease it holds."""
    numbers: dict[Name, float] = Field(default={}, max_length=256)
    """Generator: its statistics; learner rank 0: the last step's metrics."""
    evaluations_seen: Natural = 0
    """Learner rank 0: how many evaluations it has received."""


class Evaluation(BaseModel):
    """What the answers of the held-out prompts by one version came to."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    version: int
    num_prompts: int
    accuracy: float | None
    """mean@k of the first function, or of the environment without any, over all prompts; None: no score says it."""
    rewards: dict[str, float]
    """Mean of each function over the completions."""
    length_mean: float
    errors: int = 0
    """Completions that failed, or whose reward did. They are in none of the numbers."""
    duration_s: float = 0.0
    samples: list[dict[str, Any]] = []
    """A few completions as text."""
    samples_per_prompt: int = 1
    """k."""
    scores: list[dict[str, Any]] = []
    """By data source and function: `broker/scores.py`."""


class BeatAnswer(Message):
    version: Natural
    digest: Name
    revoked: list[Pair] = []
    """(prompt, attempt) of leases that are no longer the sender's."""
    evaluations: list[dict[str, Any]] = []
    """Rank 0: finished evaluations (`Evaluation`) it has not seen."""


class VersionHint(Message):
    version: Natural
    digest: Name


class Over(Message):
    """The broker's last word."""

    reason: Text = ""


class StatusRequest(Message):
    roles = _ANYONE


class StatusAnswer(Message):
    status: dict[str, Any]


class Bye(Message):
    """The sender leaves in order; its leases count nothing against their prompts."""

    roles = _ANYONE
    reason: Text = ""


class Drain(Message):
    """End the run in order: no further lease, the step in training ends, a checkpoint is written."""

    roles = frozenset({Role.STATUS})
    reason: Text = ""


class Pull(Message):
    """I hold this version and have room for so many completions."""

    roles = _GENERATOR
    version: Natural
    digest: Name
    """"": none applied yet; answered with the version to load."""
    room: Natural


class LeaseItem(BaseModel):
    """One lease inside `Leases`; its prompt tokens are the next `num_tokens` of `Leases.tokens`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    kind: Literal["train", "evaluate"]
    number: Natural
    row: Natural
    attempt: Natural
    samples: Natural
    version: Natural
    failures: Natural
    ttl_s: Seconds
    num_tokens: Natural
    columns: dict[str, Any]
    conversation: list[dict[str, Any]] = []
    """The messages behind the tokens, where a reward model reads them."""


class Leases(Message):
    leases: list[LeaseItem] = Field(max_length=256)
    tokens: I32


class Release(Message):
    """A lease is handed back without an answer."""

    roles = _GENERATOR
    number: Natural
    attempt: Natural
    reason: Text
    failed: bool
    """True: generation failed and counts against the prompt. False: drained or revoked."""


class Result(Message):
    """One trajectory. Either `error`, or tokens."""

    roles = _GENERATOR
    epoch: Natural
    prompt: Natural
    attempt: Natural
    sample: Natural
    error: Text = ""
    finish_reason: Literal["stop", "length"] = "stop"
    spans: list[Triple] = Field(default=[], max_length=4096, fail_fast=True)
    reward: float = 0.0
    rewards: dict[Name, float | None] = Field(default={}, max_length=MAX_REWARDS)
    has_observed: bool = False
    tokens: I32
    behavior_logprobs: F32
    observed: BOOL
    metrics: dict[Name, Finite] = Field(default={}, max_length=MAX_METRICS)
    """What reward functions returned beside their values, as FUNCTION/KEY."""
    answers: dict[Name, Name] = Field(default={}, max_length=MAX_REWARDS)
    """In an evaluation: the final answer that a function found in the text, by function; what a majority votes on."""


class Verdict(Message):
    status: Name
    reason: Text = ""


class FetchManifest(Message):
    roles = _GENERATOR
    version: Natural
    base: Name = ""
    """Digest of the base that this version's adapters stand beside: its manifest is asked for. "": the version's."""


class ManifestAnswer(Message):
    version: Natural
    digest: Name
    manifest: Annotated[bytes, Field(max_length=4 << 20)]
    path: Annotated[str, Field(max_length=MAX_TEXT)]
    """Where the snapshot lies for processes with the same `host`; "" for others."""


class FetchChunk(Message):
    roles = _GENERATOR
    digest: Name
    index: Natural


class FetchFile(Message):
    roles = _GENERATOR
    name: Name
    offset: Natural


class Bytes(Message):
    data: U8


class Take(Message):
    """Rank `rank`'s share of step `step`, page `page`. The same question gets the same answer until `Advance`."""

    roles = _LEARNER
    step: Natural
    rank: Natural
    num_ranks: Natural
    page: Natural = 0


class SharePage(Message):
    """Completions [first, first + len) of a share; arrays are concatenated over its items."""

    step: Natural
    batch_digest: Annotated[bytes, Field(max_length=16)]
    page: Natural
    num_pages: Natural
    total_tokens: Natural
    groups: I32
    samples: I32
    prompts: Annotated[NDArray[np.int64], ArrayField("int64")]
    prompt_lengths: I32
    lengths: I32
    span_counts: I32
    spans: I32
    """[3 * sum(span_counts)]: version, start, end."""
    truncated: BOOL
    prompt_tokens: I32
    tokens: I32
    behavior_logprobs: F32
    observed: BOOL
    rewards: F32Table
    """Page 0."""
    baseline_rewards: F32Table
    """Page 0."""
    remainder_groups: I32
    """Page 0."""
    function_rewards: F32Cube
    """Page 0."""
    greedy_rewards: F32
    """Page 0, of remax."""
    ledger: Annotated[bytes, Field(max_length=1 << 20)] = b""
    """Page 0 of rank 0: the ledger as of this batch's cut."""
    numbers: dict[str, float] = {}
    """Page 0 of rank 0: the broker's metrics of this batch."""


class Publish(Message):
    """Snapshot `version` lies complete at `path`. One that names a base is refused before that is published."""

    roles = _LEARNER
    version: Natural
    digest: Name
    manifest: Annotated[bytes, Field(max_length=4 << 20)]
    path: Annotated[str, Field(max_length=MAX_TEXT)]
    host: Name
    is_base: bool = False
    """It is no version, but what the adapters of later ones stand beside."""


class Advance(Message):
    """Step `version` - 1 is trained and snapshot `version` is published."""

    roles = _LEARNER
    version: Natural
    skipped: bool = False
    """The step was skipped as non-finite: its prompts count as failed."""


class Evaluate(Message):
    roles = _LEARNER
    version: Natural


MESSAGES: tuple[type[Message], ...] = (
    Hello, Welcome, Refused, Done, Wait, Finished, Beat, BeatAnswer, VersionHint, StatusRequest, StatusAnswer, Bye,
    Drain, Pull, Leases, Release, Result, Verdict, FetchManifest, ManifestAnswer, FetchChunk, FetchFile, Bytes,
    Take, SharePage, Publish, Advance, Evaluate, Over,
)  # fmt: skip
"""A message's number on the wire is its place here: append only."""
