"""What can go wrong with the numbers: steps whose gradients are not finite, losses that jump."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor

from vlmo_ds.config import Recipe, SpikeConfig
from vlmo_ds.data.storage import write_atomically
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.models.vlmo import StepOutput


class Diverged(RuntimeError):
    """Training has failed for good: starting it again would fail again."""


@torch.no_grad()
def optimizer_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """engine.step(), which leaves out a step whose gradients are not finite, and counts it in engine.skipped_steps.

    DeepSpeed does so itself but for float32 without ZeRO. There the gradients are summed by now: all ranks see the same.
    """
    plain = not (engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled())
    if not plain or not engine.is_gradient_accumulation_boundary():
        engine.step()
        return
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    # DeepSpeed looks for `overflow` on the optimiser: with it, it counts the step as left out and keeps the schedule
    engine.optimizer.overflow = not bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients)).sum()))
    if not engine.optimizer.overflow:
        engine.step()
        return
    torch._foreach_zero_(gradients)
    step = engine.optimizer.step
    engine.optimizer.step = lambda: None
    engine.step()
    engine.optimizer.step = step


class SkippedSteps:
    """Counts steps that were left out because a loss or gradient was not finite, and writes down their samples.

    Under fp16 with dynamic loss scaling an overflow is how the scale is found: only a loss that is not finite counts
    towards the end of the run.
    """

    def __init__(self, recipe: Recipe, stage: str, run: Path, collector: Collector):
        self.allowed, self.stage, self.folder, self.collector = recipe.max_nonfinite_steps, stage, run, collector
        self.in_a_row = 0

    def look(
        self,
        step: int,
        skipped: bool,
        engine: deepspeed.DeepSpeedEngine,
        outputs: list[StepOutput],
        batches: list[dict],
    ) -> None:
        """After a step: skipped, the same on every rank, and what it was made of. Raises Diverged past the limit."""
        losses = [{task: float(loss) for task, loss in out.losses.items()} for out in outputs] if skipped else []
        finite = all(math.isfinite(value) for loss in losses for value in loss.values())
        if not skipped:
            self.in_a_row = 0
            return
        details = {"rank": self.collector.rank, "losses": losses, **batch_ids(batches)}
        every = self.collector.each_rank({**details, "finite": finite})
        if engine.fp16_enabled() and engine.dynamic_loss_scale() and all(entry["finite"] for entry in every):
            return
        self.in_a_row += 1
        file = self.folder / "nonfinite" / f"{self.stage}-step-{step:08d}.json"
        if self.collector.rank == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            content = {"stage": self.stage, "step": step, "ranks": as_json(every)}
            write_atomically(file, json.dumps(content, indent=1).encode())
            bad = [entry["rank"] for entry in every if not entry["finite"]]
            what = f"the loss of ranks {bad} is not finite" if bad else "a gradient is not finite"
            print(
                f"warning: {self.stage}: step {step} left out, {what}; its samples are in {file}",
                file=sys.stderr,
                flush=True,
            )
        if self.in_a_row > self.allowed:
            raise Diverged(
                f"stage '{self.stage}': losses or gradients of {self.in_a_row} steps in a row are not finite, "
                f"max_nonfinite_steps is {self.allowed}; the samples of the last are in {file}"
            )


def batch_ids(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, list[int]]:
    """sample_id and image_id of all samples of a step, in order."""
    return {
        key: [i for b in batches for i in b[key].tolist()] for key in ("sample_id", "image_id") if key in batches[0]
    }


def as_json(value: Any) -> Any:
    """A value with numbers that JSON does not know as text."""
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Spike(NamedTuple):
    """Losses jumped from step `first` to step `last` (optimiser steps of the stage, from 1)."""

    first: int
    last: int


class SpikeGuard:
    """Notices a loss that stays far above its recent median. Its memory is part of every checkpoint."""

    def __init__(self, config: SpikeConfig, memory: Mapping[str, Any] | None = None):
        self.config = config
        memory = memory or {}
        self.losses: deque[float] = deque(memory.get("losses", ()), maxlen=config.window)
        self.high = int(memory.get("high", 0))

    @property
    def memory(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "high": self.high}

    def look(self, step: int, loss: float) -> Spike | None:
        """A step's loss over all ranks; the spike when it has lasted `patience` steps."""
        if not math.isfinite(loss):
            return None  # SkippedSteps' matter
        full = len(self.losses) == self.config.window
        if full and loss > self.config.factor * statistics.median(self.losses):
            self.high += 1
            if self.high >= self.config.patience:
                return Spike(step - self.high + 1, step)
            return None
        self.high = 0
        self.losses.append(loss)
        return None
