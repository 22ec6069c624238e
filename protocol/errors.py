"""The errors that cross module borders, and the exit code that each kind of end has.

ConfigError is for the user, ProtocolError for a peer; our own invariants are asserts. Between processes an error is a
message.
"""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every process that Tether starts."""

    DONE = 0
    SETTINGS = 2  # a setting or the data is wrong
    PREFLIGHT = 3  # the machine cannot run this plan
    ENGINE_STALLED = 70  # a generator's engine died or stood still
    RUN_LOCKED = 73  # another run uses this folder or port
    ORPHAN = 74  # the parent or the broker is gone for good
    NO_PROGRESS = 75  # the broker ended the run: no progress, no signal, or too many prompts that fail
    NUMERIC = 76  # too many non-finite steps
    REFUSED = 77  # the broker refused this process
    INTERRUPTED = 130  # Ctrl-C


class TetherError(Exception):
    """Base of all errors of ours; `exit_code` is what a process ends with when nobody catches it."""

    exit_code: Exit = Exit.SETTINGS


class ConfigError(TetherError):
    """The user's settings or data are wrong. The message says expected, seen, where, and what to do."""


class PreflightError(TetherError):
    """The machine cannot run what was asked for."""

    exit_code = Exit.PREFLIGHT


class RunLocked(TetherError):
    """Another process owns this run folder or port."""

    exit_code = Exit.RUN_LOCKED


class ProtocolError(TetherError):
    """A peer sent what the protocol does not allow, or refused us. `code` is machine-readable."""

    exit_code = Exit.REFUSED

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


class PeerTimeout(TetherError):
    """A peer did not answer within the deadline. The message names what was waited for, and how long."""

    exit_code = Exit.ORPHAN


class SnapshotError(TetherError):
    """A snapshot or manifest is not what it claims to be, or is not there."""


class NoProgress(TetherError):
    """The watchdog gave up: the message is the one-line verdict."""

    exit_code = Exit.NO_PROGRESS


class NumericError(TetherError):
    """Too many steps in a row had a non-finite loss or gradient."""

    exit_code = Exit.NUMERIC
