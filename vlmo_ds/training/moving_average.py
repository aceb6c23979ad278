"""A moving average of a stage's trained weights (Polyak & Juditsky 1992), the third kind of a stage's state beside weights and moments.

It is in float32, and cut among the ranks as checkpoints are, whatever the ZeRO stage: no collective crosses ranks for it in a step.
"""

from __future__ import annotations

from collections.abc import Mapping

import deepspeed
import torch
from torch import Tensor

from vlmo_ds.config import EMAConfig
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.training.checkpoint import AVERAGE, Reader
from vlmo_ds.training.state import Held, aliases, layout_of


class MovingAverage:
    """This rank's part of it. Begins with the stage's initial weights, or with what a checkpoint holds (reader)."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, config: EMAConfig, reader: Reader | None = None):
        self.engine, self.config = engine, config
        layout = layout_of(engine)
        self.held: dict[str, Held] = {}
        self.begun_anew = reader is not None and not reader.has_average
        for name, parameter in layout.parameters.items():
            if span := layout.written(parameter):
                value = layout.get(parameter, "weight").detach().float().clone()
                if reader and not self.begun_anew:
                    value.copy_(reader.read(AVERAGE, name, *span))
                self.held[name] = Held(span[0], value)

    def kept(self, step: int) -> float:
        """What of the average stays after so many steps of the stage."""
        decay, every = self.config.decay, self.config.every
        return (min(decay, (1 + step) / (10 + step)) if self.config.warmup else decay) ** every

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After a step that was taken, the stage's step-th."""
        if step % self.config.every or not self.held:
            return
        layout = layout_of(self.engine)
        now = [layout.get(layout.parameters[name], "weight").detach().float() for name in self.held]
        torch._foreach_lerp_([part.values for part in self.held.values()], now, 1 - self.kept(step))

    def into(self, state: Mapping[str, Tensor], collector: Collector) -> dict[str, Tensor]:
        """A model's float32 state dict with the average in place of the trained weights. (Every rank has to call; the result is rank
        0's.) state: as full_state gives it."""
        found = dict(state)
        layout, first = layout_of(self.engine), collector.rank == 0
        device = torch.device(deepspeed.get_accelerator().current_device_name())
        for name, parameter in layout.parameters.items():
            size = getattr(parameter, "ds_numel", parameter.numel())
            whole = torch.zeros(size, device=device)  # of which each rank fills in its part
            if name in self.held:
                start, values = self.held[name]
                whole[start : start + values.numel()] = values
            whole = collector.sum(whole)
            if first:
                found[name] = whole.cpu().view(state[name].shape)
        if first:
            found |= {
                alias: found[name].clone()
                for alias, name in aliases(self.engine.module).items()
                if name in layout.parameters
            }
        return found
