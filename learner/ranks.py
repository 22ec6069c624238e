"""The learner's ranks: who this process is among them, its device, and the few things ranks tell each other.

Runs in every learner process. A single process without torchrun's variables is a world of one rank. Every collective
reduces one small tensor of numbers: no object and no pickle travels. That a missing rank ends in an error instead of
silence rests on `Ranks.open` (the group's timeout) and `_named`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from protocol.accelerators import backend_of, import_torch_plugin
from protocol.errors import PeerTimeout


def environment(device: str) -> dict[str, str]:
    """What a learner's main sets, where unset, before it imports deepspeed, which reads it when imported."""
    return {"DS_ACCELERATOR": device, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@dataclass(frozen=True)
class Ranks:
    """This process among `num_ranks` equal ones. Its methods are collectives: all ranks call them, in one order."""

    rank: int
    num_ranks: int
    device: torch.device

    @classmethod
    def open(cls, environ: Mapping[str, str], device: str, timeout_s: float = 600.0) -> Ranks:
        """Join the other ranks; `environ` has what torchrun sets. A rank that stays away is an error after `timeout_s`.

        Raises PeerTimeout if the others do not come, ConfigError or PreflightError if there is no such device.
        """
        backend = backend_of(device)
        import_torch_plugin(device)
        rank, num_ranks = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
        place = torch.device(device) if device == "cpu" else torch.device(device, int(environ.get("LOCAL_RANK", "0")))
        if place.type != "cpu":
            torch.get_device_module(place).set_device(place)
        ranks = cls(rank, num_ranks, place)
        timeout = timedelta(seconds=timeout_s)
        with ranks._named("meet"):
            if num_ranks == 1:  # no port to be in use, no address to be unknown
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
            else:
                dist.init_process_group(backend, init_method="env://", timeout=timeout)
        return ranks

    def close(self) -> None:
        dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def same_everywhere(self, values: tuple[int, ...]) -> bool:
        """Whether all ranks gave equal numbers, of any size."""
        digest = np.frombuffer(hashlib.sha256(repr(values).encode()).digest(), dtype=np.int32).astype(np.int64)
        highest = self._reduced(np.concatenate([digest, -digest]), dist.ReduceOp.MAX, "compare values")
        return bool((highest[: len(digest)] == -highest[len(digest) :]).all())

    def sum_across(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over the ranks; all give the same names."""
        return self._by_name(values, dist.ReduceOp.SUM, "sum values")

    def sum_array(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over the ranks, element by element; all give the same shape."""
        return self._reduced(values, dist.ReduceOp.SUM, "sum values")

    def max_across(self, values: Mapping[str, float]) -> dict[str, float]:
        """Largest values over the ranks; all give the same names."""
        return self._by_name(values, dist.ReduceOp.MAX, "compare values")

    def any_true(self, value: bool) -> bool:
        return bool(self._reduced(np.array([int(value)]), dist.ReduceOp.MAX, "compare values")[0])

    def first_rank_says(self, value: int) -> int:
        """Rank 0's number (64 bit); what the others pass does not matter."""
        return int(self._reduced(np.array([value if self.is_first else 0]), dist.ReduceOp.SUM, "hear from rank 0")[0])

    def barrier(self, what: str, timeout_s: float | None = None) -> None:
        """Wait until every rank is here, or raise PeerTimeout naming `what`. None: the group's own deadline."""
        with self._named(what):
            token = torch.zeros(1, device=self.device)
            work = dist.all_reduce(token, async_op=True)
            assert work is not None
            if timeout_s is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=timeout_s))

    def _by_name(self, values: Mapping[str, float], op: dist.ReduceOp.RedOpType, what: str) -> dict[str, float]:
        names = sorted(values)
        reduced = self._reduced(np.array([values[name] for name in names], dtype=np.float64), op, what)
        return dict(zip(names, reduced.tolist(), strict=True))

    def _reduced(self, values: np.ndarray, op: dist.ReduceOp.RedOpType, what: str) -> np.ndarray:
        tensor = torch.from_numpy(values).to(self.device, copy=True)
        with self._named(what):
            dist.all_reduce(tensor, op)
            return tensor.cpu().numpy()

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Errors of torch.distributed say neither who waited nor for what; ours do."""
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            others = self.num_ranks - 1
            raise PeerTimeout(
                f"learner rank {self.rank} waited for {others} other ranks to {what}, and one is gone or too late "
                f"(its own log has the reason): {error}"
            ) from error
