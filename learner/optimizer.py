"""AdamW that DeepSpeed needs where it has no guard of its own: ZeRO 0 in float32.

There DeepSpeed reports no gradient norm, and a NaN goes into every weight while the step counts as applied. The engine
reads the two attributes `overflow` and `_global_grad_norm` of its optimizer; all else is torch's AdamW, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch


class GuardedAdamW(torch.optim.AdamW):
    """Clips to a gradient norm, keeps the norm before clipping, and does nothing when that is not finite."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], clip_grad: float, **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self.clip_grad = clip_grad
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        if self.clip_grad > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        super().step()
