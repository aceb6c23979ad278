"""What an engine holds of a run, piece by piece: float32 weights, Adam's moments, counters, loss scale.

DeepSpeed spreads these over ranks in a way that depends on the ZeRO stage and the number of ranks. Here each rank's part
is seen as fragments of whole parameters, (name, start, length) of the flattened parameter, which do not depend on
either: what one layout wrote, any other can read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from vlmo_ds.distributed.collector import Collector

MOMENTS = ("exp_avg", "exp_avg_sq")  # of an optimiser that does not say which it has
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

Span = tuple[int, int]  # first element and number of elements of a flattened parameter


class Held(NamedTuple):
    """What this rank has of a flattened parameter: its first element, float32 values."""

    start: int
    values: Tensor


NOTHING: Mapping[str, Held] = {}


class Layout:
    """ZeRO-0: every rank holds everything, and answers for an even share of each parameter when it is written.

    Subclasses: what ZeRO-1/2 and ZeRO-3 make of it. `kind` is "weight" or one of the parameter's `moments`; values are flat and float32.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        self.engine = engine
        self.optimizer = engine.optimizer
        self.inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self.parameters = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}

    def moments(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Kinds of the optimiser's states of a parameter."""
        return moments_of(self.inner, id(parameter) in getattr(self.inner, "matrices", ()))

    def stepped(self) -> Iterator[tuple[Tensor, list[tuple[nn.Parameter, int]]]]:
        """Each tensor that the optimiser steps, with the parameters in it, on every rank the same, and where in it this rank's parts begin."""
        for parameter in self.parameters.values():
            yield self.master[id(parameter)], [(parameter, 0)]

    @cached_property
    def master(self) -> dict[int, Tensor]:
        """By parameter the tensor that the optimiser steps: the parameter, or the float32 copy of a half-precision one."""
        half = getattr(self.optimizer, "fp16_groups", None)
        if half is None:
            return {id(p): p for p in self.parameters.values()}
        pairs = zip(half, self.optimizer.fp32_groups, strict=True)
        return {id(p): master for group, masters in pairs for p, master in zip(group, masters, strict=True)}

    def held(self, parameter: nn.Parameter) -> Span | None:
        """What this rank has to be given of a parameter."""
        return 0, parameter.numel()

    def written(self, parameter: nn.Parameter) -> Span | None:
        """What this rank writes of it; all ranks together write everything once."""
        share = -(-parameter.numel() // self.engine.world_size)
        return clipped(self.engine.global_rank * share, share, parameter.numel())

    def get(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The written part."""
        start, count = needed(self.written(parameter))
        return self.whole(parameter, kind)[start : start + count]

    def set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Replaces the held part."""
        self.whole(parameter, kind).copy_(value)

    def whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        master = self.master[id(parameter)]
        return (master if kind == "weight" else self.inner.state[master][kind]).detach().view(-1)

    def full(self, parameter: nn.Parameter) -> Tensor:
        """The whole float32 weight, gathered from all ranks (every rank has to call)."""
        return self.whole(parameter, "weight")

    def live(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        """(first element, flat values) of what this rank computes with, of any parameter, trained or not."""
        return 0, parameter.detach().view(-1)

    def gathered(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """What all ranks have of flat values, of each as much as `live` gives (every rank has to call)."""
        return part

    def create_moments(self, steps: int) -> None:
        """Moments of zero after so many steps: PyTorch's optimisers have none before their first step."""
        for group in self.inner.param_groups:
            for parameter in group["params"]:
                self.inner.state[parameter] = fresh_state(self.inner, parameter, steps, group.get("muon", False))

    def steps(self) -> int:
        """Steps that the optimiser has taken (fp16 leaves some out)."""
        return next((int(state["step"]) for state in self.inner.state.values() if "step" in state), 0)


# DeepSpeed hangs what it knows of a parameter on the parameter itself, as attributes that torch's types do not have.


class FlatLayout(Layout):
    """ZeRO-1/2: all parameters of a group in one vector, of which each rank has an even part."""

    def held(self, parameter: nn.Parameter) -> Span | None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        return None if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)

    written = held

    def get(self, parameter: nn.Parameter, kind: str) -> Tensor:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if kind == "weight":
            return mapping.get_hp_fragment()
        # Not by the mapping's own moments: DeepSpeed 0.19 links them after the first group's first step, when the
        # other groups have none yet, and never again.
        flat = self.inner.param_groups[mapping.param_group_index]["params"][0]
        address = mapping.get_hp_fragment_address()
        return self.inner.state[flat][kind].narrow(0, address.start, address.numel)

    def set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        self.get(parameter, kind).data.copy_(value)

    def full(self, parameter: nn.Parameter) -> Tensor:
        return safe_get_full_fp32_param(parameter)

    def stepped(self) -> Iterator[tuple[Tensor, list[tuple[nn.Parameter, int]]]]:
        # bf16 gradients that are summed in float32 have an optimiser of their own under ZeRO-1
        name = "bit16_groups" if hasattr(self.optimizer, "bit16_groups") else "bf16_groups"
        for group, parameters in zip(self.inner.param_groups, getattr(self.optimizer, name), strict=True):
            mappings = [parameter._hp_mapping for parameter in parameters]
            starts = [mapping.get_hp_fragment_address().start if mapping else 0 for mapping in mappings]
            yield group["params"][0], list(zip(parameters, starts, strict=True))


class PartitionedLayout(Layout):
    """ZeRO-3: of each parameter every rank has an even part, padded at the end."""

    def held(self, parameter: nn.Parameter) -> Span | None:
        part = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        rank = deepspeed.comm.get_rank(group=parameter.ds_process_group)  # type: ignore[attr-defined]
        return clipped(rank * part, part, parameter.ds_numel)  # type: ignore[attr-defined]

    written = held

    def get(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if kind == "weight":
            found = safe_get_local_fp32_param(parameter)
        else:
            found = safe_get_local_optimizer_state(parameter, kind)
        return found[: needed(self.held(parameter))[1]]

    def set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        part = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        padded = nn.functional.pad(value, (0, part - value.numel()))
        if kind == "weight":
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, kind)

    def full(self, parameter: nn.Parameter) -> Tensor:
        return safe_get_full_fp32_param(parameter)

    def live(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        span = self.held(parameter)
        if span is None or parameter.ds_tensor.status != PartitionedParamStatus.AVAILABLE:  # type: ignore[attr-defined]
            return 0, parameter.detach().new_empty(0)  # padding, or on a disk, where nothing moves it
        return span[0], parameter.ds_tensor.detach().view(-1)[: span[1]]  # type: ignore[attr-defined]

    def gathered(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        even = nn.functional.pad(part, (0, parameter.ds_tensor.ds_numel - part.numel()))  # type: ignore[attr-defined]
        where = torch.device(get_accelerator().current_device_name())  # parts may wait in host memory
        return Collector().gather(even.to(where))[: parameter.ds_numel]  # type: ignore[attr-defined]

    def stepped(self) -> Iterator[tuple[Tensor, list[tuple[nn.Parameter, int]]]]:
        place, number = self.optimizer.grad_position, self.optimizer.get_param_id
        flats = self.optimizer.fp32_partitioned_groups_flat
        for flat, parameters in zip(flats, self.optimizer.fp16_groups, strict=True):
            yield flat, [(parameter, place[number(parameter)][1]) for parameter in parameters]

    def create_moments(self, steps: int) -> None:
        for number in range(len(self.optimizer.fp32_partitioned_groups_flat)):
            swapped = self.optimizer._swappable_optimizer_subgroup(number)
            if swapped:
                self.optimizer._optimizer_states_and_gradient_swap_in(number)
            flat = self.optimizer.fp32_partitioned_groups_flat[number]
            group = self.inner.param_groups[self.optimizer.sub_group_to_group_id[number]]
            self.inner.state[flat] = fresh_state(self.inner, flat, steps, group.get("muon", False))
            if swapped:
                self.optimizer._optimizer_states_and_gradient_swap_out(number)


def layout_of(engine: deepspeed.DeepSpeedEngine) -> Layout:
    return (Layout, FlatLayout, FlatLayout, PartitionedLayout)[int(engine.zero_optimization_stage())](engine)


def needed(span: Span | None) -> Span:
    if span is None:
        raise ValueError("a part of a parameter is asked for of which this rank has none")
    return span


def clipped(start: int, count: int, total: int) -> Span | None:
    count = min(count, total - start)
    return (start, count) if count > 0 else None


def moments_of(optimizer: torch.optim.Optimizer, by_muon: bool) -> tuple[str, ...]:
    return MOMENTS[:1] if by_muon else getattr(optimizer, "moments", MOMENTS)


def fresh_state(optimizer: torch.optim.Optimizer, parameter: Tensor, steps: int, by_muon: bool) -> dict[str, Any]:
    """A state of zero moments: torch's AdamW counts its steps in a tensor, DeepSpeed's in a number, Muon not at all."""
    state: dict[str, Any] = {
        kind: torch.zeros_like(parameter, dtype=torch.float32) for kind in moments_of(optimizer, by_muon)
    }
    if by_muon:
        return state
    if isinstance(optimizer, torch.optim.AdamW):
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        state["step"] = torch.tensor(float(steps), device=parameter.device if on_device else "cpu")
    else:
        state["step"] = steps
    return state


# ---- the whole of it ----


class Moved(RuntimeError):
    """A parameter that a stage does not train is no longer what it was."""


def refuse_moved(engine: deepspeed.DeepSpeedEngine, frozen: Mapping[str, Tensor], collector: Collector) -> None:
    """Moved, on every rank, where a frozen parameter differs from its copy (every rank has to call).

    What is written is the copy, in float32. Something that moves without a gradient would be written as it began: it has to
    be among its family's `averaged`. What every rank has whole is looked at by the ranks in turn.
    """
    layout, parameters = layout_of(engine), dict(engine.module.named_parameters())
    found = None
    for number, (name, copy) in enumerate(frozen.items()):
        start, live = layout.live(parameters[name])
        if live.numel() == copy.numel() and number % collector.world_size != collector.rank:
            continue
        if not live.is_floating_point():  # ZeRO++ keeps what is not trained as small whole numbers
            continue
        kept = copy.flatten()[start : start + live.numel()]
        if not torch.equal(live, kept.to(live.dtype).to(live.device)):
            found = name
            break
    moved = next(filter(None, collector.each_rank(found)), None)
    if moved:
        raise Moved(
            f"{moved} is not trained in this stage, and has changed since it began: what moves without a gradient has to be "
            "named in its family's `averaged`"
        )


def averaged_parameters(engine: deepspeed.DeepSpeedEngine, frozen: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Those that have neither a gradient nor a frozen copy: they move in a way of their own."""
    found = engine.module.named_parameters()
    return {name: p for name, p in found if not p.requires_grad and name not in frozen}


def fragments(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    """(parameter's name, start, {kind: flat float32 values}) of what this rank writes."""
    layout = layout_of(engine)
    for name, parameter in layout.parameters.items():
        span = layout.written(parameter)
        if span:
            yield name, span[0], {kind: layout.get(parameter, kind) for kind in ("weight", *layout.moments(parameter))}


def set_weights(engine: deepspeed.DeepSpeedEngine, weights: Mapping[str, Tensor]) -> None:
    """Gives the optimiser float32 weights of whole parameters (every rank has to call)."""
    layout = layout_of(engine)
    for name, value in weights.items():
        span = layout.held(layout.parameters[name])
        if span:
            layout.set(layout.parameters[name], "weight", value.flatten()[span[0] : span[0] + span[1]])


def full_state(
    engine: deepspeed.DeepSpeedEngine,
    frozen: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    averages: Mapping[str, Held] = NOTHING,
) -> dict[str, Tensor]:
    """The model's float32 state dict, gathered from all ranks (every rank has to call; the result is rank 0's).

    frozen: float32 copies of what does not move, so that half precision never reaches them (frozen_state).
    averages: float32 values of what follows other weights (training.averages); what else moves is there as it is.
    shapes: the parameters' shapes before the engine took them. A parameter with several names is there under each.
    """
    first = engine.global_rank == 0
    state = dict(frozen) if first else {}
    layout = layout_of(engine)
    for name, parameter in averaged_parameters(engine, frozen).items():
        if name in averages:
            value = layout.gathered(parameter, averages[name].values)
            if first:
                state[name] = value.cpu().view(shapes[name]).clone()
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=isinstance(layout, PartitionedLayout)):
            if first:
                state[name] = parameter.detach().float().cpu().reshape(shapes[name]).clone()
    for name, parameter in layout.parameters.items():
        value = layout.full(parameter)
        if first:
            state[name] = value.detach().float().cpu().reshape(shapes[name]).clone()
    if first:
        state |= {alias: state[name].clone() for alias, name in aliases(engine.module).items()}
        state |= {name: buffer.detach().cpu().clone() for name, buffer in engine.module.named_buffers()}
    return state


def aliases(module: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several (tied weights) -> the name that named_parameters() gives."""
    names = {id(p): n for n, p in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {n: names[id(p)] for n, p in every if names[id(p)] != n}


def progress(engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    """Counters, learning-rate schedule and loss scale, as JSON holds them."""
    scaler = loss_scaler(engine)
    return {
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "optimizer_steps": layout_of(engine).steps(),
        "schedule": {"last_epoch": engine.lr_scheduler.last_epoch},
        "learning_rates": [float(group["lr"]) for group in engine.optimizer.param_groups],
        "loss_scale": {name: getattr(scaler, name) for name in LOSS_SCALE if hasattr(scaler, name)},
    }


def set_progress(engine: deepspeed.DeepSpeedEngine, saved: Mapping[str, Any]) -> None:
    for name in COUNTERS:
        setattr(engine, name, saved["counters"][name])
    engine.lr_scheduler.load_state_dict({**engine.lr_scheduler.state_dict(), **saved["schedule"]})
    for group, lr in zip(engine.optimizer.param_groups, saved["learning_rates"], strict=True):
        group["lr"] = lr
    scaler = loss_scaler(engine)
    for name, value in saved["loss_scale"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def loss_scaler(engine: deepspeed.DeepSpeedEngine) -> Any:
    """Where DeepSpeed's optimiser of this stage keeps its loss scale; nothing in float32 without ZeRO."""
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
