"""What goes wrong while training, noticed: numbers that are not finite, losses that jump, bad samples, ranks that part."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor

from vlmo_ds.config import Recipe, SpikeConfig, StageConfig
from vlmo_ds.data.loader import Streams, in_stream
from vlmo_ds.data.shards import stable_id
from vlmo_ds.data.storage import DataError, write_atomically
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.families.step import StepOutput
from vlmo_ds.training import checkpoint
from vlmo_ds.training.engine import device

LEAST_JUDGED = 256  # samples of a source before its share of bad ones counts


class Diverged(RuntimeError):
    """Training has failed for good: starting it again would fail again."""


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
        if not skipped:
            self.in_a_row = 0
            return
        losses = [{task: float(loss) for task, loss in out.losses.items()} for out in outputs]
        finite = all(math.isfinite(value) for loss in losses for value in loss.values())
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


class Guessing:
    """Warns once of a task whose loss stays what a model reaches that guesses. Its memory is part of every checkpoint."""

    STEPS, WITHIN = 500, 0.005

    def __init__(self, stage: StageConfig, memory: Mapping[str, int] | None = None):
        self.stage = stage.name
        self.guesses = {
            name: task.guess for name, task in stage.family.tasks.items() if name in stage.tasks and task.guess
        }
        self.in_a_row = Counter(dict.fromkeys(self.guesses, 0) | dict(memory or {}))

    @property
    def memory(self) -> dict[str, int]:
        return dict(self.in_a_row)

    def look(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """After a step: what there is to be said."""
        said = []
        for name, guess in self.guesses.items():
            if self.in_a_row[name] >= self.STEPS:  # said already
                continue
            near = abs(metrics[f"loss/{name}"] - guess.loss) < self.WITHIN
            self.in_a_row[name] = self.in_a_row[name] + 1 if near else 0
            if self.in_a_row[name] == self.STEPS:
                said.append(
                    f"warning: {self.stage}, step {step}: the loss of {name} has been {guess.loss:.3f} for {self.STEPS} steps, which is "
                    f"what guessing gives; check {guess.check}"
                )
        return said


class Rollback(NamedTuple):
    """Go on from the stage's newest checkpoint, with so many steps' data left out."""

    skip: int
    message: str


def roll_back(spike: Spike, skip: int, folder: Path, collector: Collector) -> Rollback:
    """Removes the checkpoints that a jump of the loss has spoilt (every rank has to call)."""

    def remove_spoilt() -> int:
        found = checkpoint.list_checkpoints(folder)
        for path in found:
            if checkpoint.step_of(path) >= spike.first:
                shutil.rmtree(path)
        return max((s for s in map(checkpoint.step_of, found) if s < spike.first), default=0)

    step = int(collector.from_rank0(remove_spoilt() if collector.rank == 0 else None))
    message = (
        f"the loss has jumped from step {spike.first} to {spike.last}: back to step {step}, and on with the data "
        f"that follows step {spike.last}"
    )
    return Rollback(skip + spike.last - step, message)


class RankDivergence(RuntimeError):
    """Ranks are about to compute different things: under ZeRO-3 they would wait for each other for ever."""


def check_ranks(collector: Collector, number: int, stage: StageConfig, batch: Mapping[str, Tensor]) -> None:
    """Compares what all ranks are about to compute, by a hash: one number per rank travels.

    Lengths of texts are left out: each rank trims its own.
    """
    texts = ("text_", "false_text_")
    shapes = {k: [len(v), "*"] if k.rpartition("/")[2].startswith(texts) else list(v.shape) for k, v in batch.items()}
    parts = [f"{key} {shapes[key]} {str(batch[key].dtype).removeprefix('torch.')}" for key in sorted(batch)]
    what = f"{stage.name}, pass {number}, tasks {', '.join(stage.tasks)}: {'; '.join(parts)}"
    hashes = collector.gather(torch.tensor([stable_id(what)], device=device())).tolist()
    if len(set(hashes)) > 1:
        every = collector.each_rank(what)
        other = next(rank for rank, value in enumerate(hashes) if value != hashes[0])
        raise RankDivergence(
            f"the ranks are about to compute different things:\n  rank 0: {every[0]}\n  rank {other}: {every[other]}"
        )


class ReplacedSamples:
    """Counts samples that could not be used and were replaced, by source; too many end the run.

    first: steps of the stage whose data was read before this start.
    """

    def __init__(self, dataset: Streams, stage: StageConfig, first: int):
        self.dataset, self.stage, self.first, self.parts = dataset, stage, first, stage.parts
        self.names = [in_stream(stream, name) for stream, part in dataset.parts.items() for name in part.names]
        self.total = dict.fromkeys(self.names, 0.0)
        self.told: set[str] = set()
        self.bad: Counter[str] = Counter()

    def take(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The batch without what the loader tells of samples that it replaced; each is told of once."""
        for name, reason in batch.pop("replaced"):
            self.bad[name] += 1
            if reason not in self.told:
                self.told.add(reason)
                print(f"{self.stage.name}: replaced a sample: {reason}", file=sys.stderr, flush=True)
        return batch

    def of_step(self) -> dict[str, int]:
        """Samples of each source that this rank has replaced since it was last asked."""
        counts = {name: self.bad[name] for name in self.names}
        self.bad.clear()
        return counts

    def look(self, replaced: Mapping[str, float], done: int) -> dict[str, float]:
        """Metrics after so many steps of which the last replaced so many on all ranks.

        DataError when a source has had more than its share since the start.
        """
        epochs: dict[str, float] = {}
        for stream, stage in self.parts.items():
            dataset, batch = self.dataset.parts[stream], stage.global_batch_size
            names = [in_stream(stream, name) for name in dataset.names]
            began, now = (dataset.order.mixture.consumed(step * batch) for step in (self.first, done))
            for name, seen in zip(names, (now - began).tolist(), strict=True):
                self.total[name] += replaced[name]
                if seen >= LEAST_JUDGED and self.total[name] > stage.data.max_bad_fraction * seen:
                    raise DataError(
                        f"stages.{self.stage.name}: {self.total[name]:.0f} of {seen} samples of source '{name}' could not be "
                        f"used and were replaced, more than max_bad_fraction {stage.data.max_bad_fraction}; they are "
                        "named above"
                    )
            epochs |= dict(zip(names, dataset.order.epochs(done * batch), strict=True))
        metrics = {"data/replaced": sum(replaced.values())}
        if len(epochs) == 1:
            return metrics | {"data/epoch": epochs.popitem()[1]}
        metrics |= {f"data/replaced/{name}": count for name, count in replaced.items()}
        return metrics | {f"data/epoch/{name}": epoch for name, epoch in epochs.items()}
