"""What TRL hands to a reward function beside the rows: a way to log numbers and columns, and the trainer's state.

Runs in a reward worker. A function that has parameters for them gets them, and uses them as under TRL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import fmean
from typing import Any


@dataclass(frozen=True, slots=True)
class TrainerState:
    """As far as there is one: completions are scored before any trainer has them."""

    global_step: int  # updates of the policy that wrote the completion's end

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"expected trainer_state.global_step, all that is known when scoring, got .{name}")


class Logs:
    """What one call of a function logs."""

    def __init__(self, num_completions: int) -> None:
        self._numbers: dict[str, list[float]] = {}
        self._columns: list[dict[str, float]] = [{} for _ in range(num_completions)]

    def log_metric(self, name: str, value: float) -> None:
        """A number about the whole call; of several under one name their mean counts."""
        self._numbers.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """One value for each completion. Numbers count as metrics do; text has no curve and is left out."""
        if len(values) != len(self._columns):
            raise ValueError(
                f"expected one value for each of {len(self._columns)} completions in log_extra({column!r}), got "
                f"{len(values)}"
            )
        for metrics, value in zip(self._columns, values, strict=True):
            if isinstance(value, Real):
                metrics[column] = float(value)

    def of_completions(self) -> list[dict[str, float]]:
        """What was logged of each completion, by name."""
        numbers = {name: fmean(values) for name, values in self._numbers.items()}
        return [numbers | metrics for metrics in self._columns]
