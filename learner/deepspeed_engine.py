"""DeepSpeed: ZeRO 0 to 3 behind one face. The only file that imports deepspeed.

Runs in every learner rank. DeepSpeed is held at exactly the settings and internals that were measured; the version is
pinned, and the round trips in tests/test_checkpoint.py and tests/test_policy.py say when a newer one moved them. Not to
be found here: loss scaling and DeepSpeed's own accumulation count, schedule and checkpoints.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from learner.optimizer import GuardedAdamW
from learner.ranks import Ranks
from protocol.errors import ConfigError
from protocol.sections import LearnerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 50_000_000

# Keys of the passthrough that would break what this file promises, and what to set instead.
OWNED = {
    "managed_gradient_accumulation": "micro-batches are counted by the learner; leave it out",
    "gradient_accumulation_steps": "set learner.micro_batch_tokens",
    "train_micro_batch_size_per_gpu": "set learner.micro_batch_tokens",
    "train_batch_size": "set batch.prompts and batch.group_size",
    "gradient_clipping": "set learner.clip_grad",
    "scheduler": "set learner.schedule",
    "bf16": "set model.dtype",
    "fp16": "set model.dtype; float16 is not supported",
    "zero_optimization.stage": "set learner.zero",
    "zero_optimization.compute_grad_norm": "it is what stops a non-finite step; leave it out",
}


def zero_stage(learner: LearnerConfig, dtype: torch.dtype) -> int:
    """The stage that runs: ZeRO 0 cannot sum bfloat16 gradients in float32, so it becomes 1."""
    return max(1, learner.zero) if dtype == torch.bfloat16 else learner.zero


def engine_config(learner: LearnerConfig, dtype: torch.dtype, passthrough: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's config. Raises ConfigError if `passthrough` has a key that is ours."""
    for key, instead in OWNED.items():
        section, _, name = key.rpartition(".")
        if name in (passthrough.get(section, {}) if section else passthrough):
            raise ConfigError(f"deepspeed.{key} is decided by the learner; {instead}")
    stage = zero_stage(learner, dtype)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # wanted by DeepSpeed's validation, without meaning here
        "managed_gradient_accumulation": False,  # backward adds up, step is always the boundary
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET_ELEMENTS},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    if dtype == torch.bfloat16:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if stage == 0:
        config["gradient_clipping"] = 0.0  # GuardedAdamW clips; the default of 1.0 would clip before it sees the norm
        if "optimizer" in passthrough:
            raise ConfigError(
                "deepspeed.optimizer has no effect under ZeRO 0, which uses the learner's own; set learner.zero"
            )
    else:
        config["gradient_clipping"] = learner.clip_grad
        config["optimizer"] = {"type": "AdamW", "params": _adamw_settings(learner) | {"torch_adam": True}}
    return _merged(config, passthrough)


def _adamw_settings(learner: LearnerConfig) -> dict[str, Any]:
    return {"lr": learner.learning_rate, "betas": learner.betas, "weight_decay": learner.weight_decay}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in over.items():
        inner = both.get(key)
        both[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return both


class DeepSpeedEngine:
    """A module, its optimizer and its partitions. Every method is collective unless it says otherwise."""

    def __init__(
        self,
        module: nn.Module,
        learner: LearnerConfig,
        dtype: torch.dtype,
        passthrough: Mapping[str, Any],
        ranks: Ranks,
    ) -> None:
        self.stage = zero_stage(learner, dtype)
        self._ranks = ranks
        config = engine_config(learner, dtype, passthrough)
        deepspeed.ops.__compatible_ops__ = {}  # no C++ is built or probed for; must precede the communication backend
        deepspeed.logger.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
        parameters = [p for p in module.parameters() if p.requires_grad]
        own = GuardedAdamW(parameters, learner.clip_grad, **_adamw_settings(learner)) if self.stage == 0 else None
        with redirect_stdout(StringIO()):  # the bfloat16 optimizer prints its memory use, unasked
            self._engine, *_ = deepspeed.initialize(
                model=module, model_parameters=parameters, optimizer=own, config=config
            )

    def __call__(self, *arguments: Any) -> Any:
        """The module's forward. Calling the module itself would make ZeRO 3 drop gradients in silence."""
        return self._engine(*arguments)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the sum of all ranks' `loss`; DeepSpeed would average, so each is scaled up."""
        self._engine.backward(loss * self._ranks.num_ranks, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> tuple[float, bool]:
        """Clip and apply what was added up, or drop it on every rank if it is not finite.

        Returns the norm before clipping, and whether the step was applied.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), bool(self._engine.was_step_applied())

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self._engine.basic_optimizer

    # Weights in the dtype that computes.

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Local."""
        return tuple(parameter.ds_shape if self.stage == 3 else parameter.shape)

    def owned(self, parameter: nn.Parameter) -> tuple[int, Tensor] | None:
        """Local: the first element and the flat elements that this rank writes of a parameter; None if it has none."""
        if self.stage < 3:
            return (0, parameter.detach().reshape(-1)) if self._ranks.is_first else None
        start = parameter.ds_tensor.ds_numel * self._ranks.rank
        count = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)  # the end of the last slice is padding
        return (start, parameter.ds_tensor.detach().reshape(-1)[:count]) if count > 0 else None

    def layout(self, named: Sequence[tuple[str, nn.Parameter]]) -> list[tuple[str, str, tuple[int, ...]]]:
        """Local: (name, dtype, shape) of each."""
        return [(name, str(p.dtype).removeprefix("torch."), self.shape(p)) for name, p in named]

    def owned_of(self, named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, int, Tensor]]:
        """Local: (name, first element, flat elements) that this rank writes; over the ranks each element comes once."""
        for name, parameter in named:
            owned = self.owned(parameter)
            if owned is not None:
                yield name, *owned

    def gathered(self, named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters, in the order given; each is valid until the next is asked for."""
        for name, parameter in named:
            if self.stage < 3:
                yield name, parameter.detach()
            else:
                with deepspeed.zero.GatheredParameters([parameter]):
                    yield name, parameter.detach()

    def opened(self, named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
        """As `FrozenEngine.opened`; for parameters that are not trained: there are no master weights to be set."""
        return _opened(named, self.stage)

    def close(self) -> None:
        """Local: let go of weights, gradients and moments; the engine is of no use afterwards.

        Under ZeRO 3 and in bfloat16 DeepSpeed keeps views of them alive, so it is their memory that is given back.
        """
        held = [*self._flat_partitions(), *self._flat_gradients()]
        held += [p.ds_tensor if self.stage == 3 else p for p in self._engine.module.parameters()]
        self._optimizer.state.clear()
        self._engine.destroy()
        for tensor in held:
            storage = tensor.untyped_storage()
            tensor.data = tensor.new_empty(0)
            if storage.resizable():  # all but what is mapped from a file
                storage.resize_(0)

    # What training goes on from: float32 weights and AdamW's moments, whole, by parameter.

    @property
    def num_applied(self) -> int:
        """Steps that AdamW has taken."""
        steps = [float(state["step"]) for state in self._optimizer.state.values() if "step" in state]
        return int(max(steps, default=0.0))

    def training_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """{"fp32", "exp_avg", "exp_avg_sq"}; without moments before the first step."""
        names = MOMENTS if self.num_applied else ()
        if self.stage == 0:
            return {"fp32": parameter.detach()} | {name: self._optimizer.state[parameter][name] for name in names}
        moments = {name: safe_get_full_optimizer_state(parameter, name) for name in names}
        return {"fp32": safe_get_full_fp32_param(parameter)} | moments

    def begin_restore(self, num_applied: int) -> None:
        """Make room for moments; `restore` of every parameter and `end_restore` follow."""
        if num_applied:
            for tensor in self._flat_partitions():
                step = torch.tensor(float(num_applied))
                self._optimizer.state[tensor] = {"step": step} | {name: torch.zeros_like(tensor) for name in MOMENTS}
            if self.stage in (1, 2):
                self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def restore(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Local: set what `training_state` gave, at any stage and on any number of ranks."""
        moments = {name: state[name] for name in MOMENTS if name in state}
        if self.stage == 0:
            parameter.data.copy_(state["fp32"])
            for name, value in moments.items():
                self._optimizer.state[parameter][name].copy_(value)
        elif self.stage < 3:
            safe_set_full_fp32_param(parameter, state["fp32"])
            for name, value in moments.items():
                safe_set_full_optimizer_state(parameter, value, name)
        else:  # the setters for whole parameters do not pad the last slice, so each rank sets its own
            safe_set_local_fp32_param(parameter, self._own_slice(parameter, state["fp32"]))
            for name, value in moments.items():
                safe_set_local_optimizer_state(parameter, self._own_slice(parameter, value), name)
            parameter.ds_tensor.data.copy_(self._own_slice(parameter, state["fp32"]))

    def end_restore(self) -> None:
        if self.stage in (1, 2):
            self._engine.optimizer.update_lp_params()

    def reset_moments(self) -> None:
        """Local: AdamW starts anew from the weights as they are."""
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()

    def _flat_partitions(self) -> Sequence[Tensor]:
        if self.stage == 0:
            return [p for group in self._optimizer.param_groups for p in group["params"]]
        optimizer = self._engine.optimizer
        if self.stage == 3:
            return optimizer.fp32_partitioned_groups_flat
        if hasattr(optimizer, "single_partition_of_fp32_groups"):
            return optimizer.single_partition_of_fp32_groups
        return optimizer.fp32_groups_flat_partition  # bfloat16 under ZeRO 1

    def _flat_gradients(self) -> Sequence[Tensor]:
        """Where gradients are added up for as long as the engine lives."""
        if self.stage == 3:
            return [self._engine.optimizer.grad_partitions_flat_buffer]
        return getattr(self._engine.optimizer, "fp32_groups_gradients_flat", [])  # bfloat16 under ZeRO 1

    def _own_slice(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        size, ranks = parameter.ds_tensor.ds_numel, self._ranks
        padded = F.pad(whole.reshape(-1), (0, size * ranks.num_ranks - parameter.ds_numel))
        return padded[size * ranks.rank : size * (ranks.rank + 1)]


class FrozenEngine:
    """A module that is only evaluated. Under ZeRO 3 it is partitioned too, and every method is collective."""

    def __init__(self, module: nn.Module, learner: LearnerConfig, dtype: torch.dtype) -> None:
        self._stage = zero_stage(learner, dtype)
        self._module = module.requires_grad_(False)
        if self._stage == 3:
            config = {
                "train_micro_batch_size_per_gpu": 1,  # as in `engine_config`
                "bf16": {"enabled": dtype == torch.bfloat16},
                "zero_optimization": {"stage": 3},
            }
            self._module, *_ = deepspeed.initialize(model=module, config=config)

    def __call__(self, *arguments: Any) -> Any:
        return self._module(*arguments)

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Local."""
        return tuple(parameter.ds_shape if self._stage == 3 else parameter.shape)

    def opened(self, named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters, each until the next is asked for; what all ranks write into one stays."""
        return _opened(named, self._stage)


def _opened(named: Sequence[tuple[str, nn.Parameter]], stage: int) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in named:
        if stage < 3:
            yield name, parameter.data
        else:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                yield name, parameter.data
