"""Weights that follow others without a gradient: a teacher that is a moving average of its student (MoCo, arXiv:1911.05722)."""

from __future__ import annotations

import deepspeed
import torch

from vlmo_ds.config import RecipeError
from vlmo_ds.families.step import FamilyModel
from vlmo_ds.training.state import Held, PartitionedLayout, layout_of


class Averages:
    """The teacher's weights in float32, of each what this rank computes with: all of it, under ZeRO-3 its part. Half precision
    alone would lose most of what a step moves.

    Made of a model before an engine takes it, so that what a checkpoint holds is not rounded.
    """

    def __init__(self, model: FamilyModel):
        self.followed = model.followed()
        self.exact = {name: model.get_parameter(name).detach().float().clone() for name in self.followed}
        self.held: dict[str, Held] = {}

    def attach(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Takes the parts of the engine's layout. (Every rank has to call.) RecipeError where that cannot move a teacher."""
        self.layout = layout_of(engine)
        if self.followed:
            refuse(engine)
        self.parameters = dict(engine.module.named_parameters())
        if self.followed and isinstance(self.layout, PartitionedLayout):
            self.let_go(engine)
        for name, value in self.exact.items():
            start, live = self.layout.live(self.parameters[name])
            if live.dtype == torch.float32:
                part = live  # the model's own: what moves is written as it is
            else:
                part = value.flatten()[start : start + live.numel()].to(live.device, copy=True)
            self.held[name] = Held(start, part)
        self.exact = {}

    def let_go(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """ZeRO-3 keeps small parameters whole on every rank: the teacher's would stay what they were when their parts move."""
        mine = [self.parameters[name] for name in self.followed]
        kept = engine.optimizer.persistent_parameters
        for parameter in mine:
            if parameter.ds_persist:  # type: ignore[attr-defined]
                parameter.ds_persist = False  # type: ignore[attr-defined]
                parameter.partition()  # type: ignore[attr-defined]
        known = {id(parameter) for parameter in mine}
        kept[:] = [parameter for parameter in kept if id(parameter) not in known]

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """One step of the teacher: momentum of what it was, the rest of what the student is."""
        for name, student in self.followed.items():
            _, now = self.layout.live(self.parameters[student])
            part = self.held[name].values
            part.lerp_(now.float(), 1 - momentum)
            _, live = self.layout.live(self.parameters[name])
            if live.data_ptr() != part.data_ptr():
                live.copy_(part)
            # ZeRO++ gathers from a second copy of what is not trained, which it takes once and for all
            self.parameters[name].ds_secondary_tensor = None  # type: ignore[attr-defined]

    def __bool__(self) -> bool:
        return bool(self.followed)


def refuse(engine: deepspeed.DeepSpeedEngine) -> None:
    """RecipeError for settings of the DeepSpeed config under which a teacher would stay as it is."""
    zero = engine.config.get("zero_optimization", {})
    if zero.get("zero_quantized_nontrainable_weights"):
        raise RecipeError(
            "the DeepSpeed config has zero_optimization.zero_quantized_nontrainable_weights = true, which keeps a teacher that moves in 8 "
            "bits: take it out"
        )
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise RecipeError(
            "the DeepSpeed config has zero_optimization.offload_param.device = 'nvme', where a teacher cannot move: accepted are 'cpu' and "
            "'none'"
        )
