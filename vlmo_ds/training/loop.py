"""One stage: from initial weights to the stage's final weights."""

from __future__ import annotations

import gc
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import InitConfig, Recipe, RecipeError, StageConfig
from vlmo_ds.data.loader import BatchDataset, batches, spec_for
from vlmo_ds.data.shards import stable_id
from vlmo_ds.data.storage import DataError
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.models.vlmo import StepOutput, VLMo
from vlmo_ds.objectives.itc import MAX_LOG_SCALE
from vlmo_ds.training import checkpoint
from vlmo_ds.training.ds_config import merge, micro_batch
from vlmo_ds.training.engine import build_engine, device, release
from vlmo_ds.training.guard import SkippedSteps, Spike, SpikeGuard, optimizer_step
from vlmo_ds.training.monitor import Monitor, global_metrics
from vlmo_ds.training.optim import set_trainable
from vlmo_ds.training.signals import Stopped, StopRequest
from vlmo_ds.training.state import full_state, get_weight, set_weights
from vlmo_ds.training.watch import Watch
from vlmo_ds.training.weights import frozen_state, hand_over, write_final

NEAR_MAX_SCALE = 90.0
ASKED, WRITING = "asked to stop", "writing a checkpoint"  # counts among those that a step sums over ranks
LEAST_JUDGED = 256  # samples of a source before its share of bad ones counts


def stage_seed(recipe: Recipe, stage: StageConfig) -> int:
    """Every stage has its own stream of randomness."""
    return recipe.seed * 1_000_003 + next(i for i, s in enumerate(recipe.stages) if s.name == stage.name)


def build_dataset(
    recipe: Recipe, stage: StageConfig, tokenizer: PreTrainedTokenizerBase, collector: Collector
) -> BatchDataset:
    model = recipe.model
    micro, _ = micro_batch(stage, collector.world_size)
    spec = spec_for(stage.tasks, model.image_size, model.patch_size, model.max_text_len, stage_seed(recipe, stage))
    return BatchDataset(
        stage.data, spec, tokenizer, rank=collector.rank, world_size=collector.world_size, batch_size=micro
    )


def build_model(
    recipe: Recipe,
    stage: StageConfig,
    source: dict[str, Tensor] | None,
    origin: str,
    collector: Collector,
    resumed: bool = False,
) -> VLMo:
    """The stage's model with its initial weights, the same on every rank; what it does not train is frozen.

    source: weights from elsewhere, handed over as the stage's `init` says; resumed: from a checkpoint of the stage itself.
    """
    torch.manual_seed(stage_seed(recipe, stage))
    model = VLMo(recipe.model, stage.weights, collector)
    if source is not None:
        report = hand_over(model, source, InitConfig() if resumed else stage.init, origin)
        if collector.rank == 0:
            counts = ", ".join(f"{len(names)} {what}" for what, names in report.items())
            print(f"{stage.name}: weights from {origin}: {counts}", flush=True)
    trained = set_trainable(model, stage)
    if collector.rank == 0:
        total = sum(p.numel() for p in model.parameters())
        learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(
            f"{stage.name}: trains {learnt / 1e6:.2f}M of {total / 1e6:.2f}M parameters ({len(trained)} tensors)",
            flush=True,
        )
    return model


def train_stage(
    recipe: Recipe,
    stage: StageConfig,
    ds_config: dict,
    *,
    source: dict[str, Tensor] | None,
    origin: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    resume_from: Path | None,
    monitor: Monitor,
    offset: int,
    collector: Collector,
    stop: StopRequest,
    watch: Watch,
    skip: int | None = None,
) -> Rollback | None:
    """Trains a stage to its end and writes its final weights.

    offset: optimiser steps of the stages before; skip: steps whose data is left out, None: as the checkpoint says.
    Returns where to go on if the loss has jumped. Raises Stopped, with a checkpoint written, at the end of the step in
    which any rank was asked to stop; Diverged when too many steps in a row are not finite.
    """
    _, accumulation = micro_batch(stage, collector.world_size)
    dataset = build_dataset(recipe, stage, tokenizer, collector)
    reader = checkpoint.Reader(resume_from) if resume_from else None
    if reader:
        source, origin = reader.weights(), str(resume_from)
    model = build_model(recipe, stage, source, origin, collector, resumed=reader is not None)
    frozen = frozen_state(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    buffer_shapes = {name: buffer.shape for name, buffer in model.named_buffers()}
    engine = build_engine(model, stage, merge(ds_config, stage, collector.world_size))
    first = checkpoint.restore(engine, reader) if reader else 0
    saved = reader.state if reader else {}
    skip = saved.get("skip", 0) if skip is None else skip
    guard = SpikeGuard(recipe.loss_spike, saved.get("guard")) if recipe.loss_spike else None
    compare = engine.zero_optimization_stage() == 3 if recipe.check_ranks is None else recipe.check_ranks
    del source, reader
    if first and collector.rank == 0:
        print(f"{stage.name}: resumed at step {first} from {resume_from}", flush=True)
    monitor.begin(stage.name, first, offset)
    seed = stage_seed(recipe, stage)
    begin, end = ((step + skip) * accumulation for step in (first, stage.steps))
    stream = batches(dataset, begin, end, stage.data.workers, stage.data.prefetch)
    engine.train()
    named: set[str] = set()  # bad samples that this rank has told of
    replaced = dict.fromkeys(dataset.names, 0.0)
    writer = checkpoint.CheckpointWriter(folder, recipe.keep_checkpoints, recipe.background_checkpoints, collector)
    about = checkpoint.about_run(stage.name, recipe.model_dump(mode="json"), {**shapes, **buffer_shapes}, engine)
    failures = FailedCheckpoints(recipe, folder, collector)
    nonfinite = SkippedSteps(recipe, stage.name, monitor.run, collector)
    rollback = None
    for step in range(first, stage.steps):
        outputs: list[StepOutput] = []
        taken: list[dict[str, Tensor]] = []
        bad = dict.fromkeys(dataset.names, 0)
        skipped_before = engine.skipped_steps
        for part in range(accumulation):
            watch.beat(f"reading the data of step {step + 1} of {stage.name}")
            batch = next(stream)
            for name, reason in batch.pop("replaced"):
                bad[name] += 1
                if reason not in named:
                    named.add(reason)
                    print(f"{stage.name}: replaced a sample: {reason}", file=sys.stderr, flush=True)
            number = (step + skip) * accumulation + part
            if stage.log_images_every and part == 0 and step % stage.log_images_every == 0:
                monitor.images(step + 1, batch, tokenizer)
            watch.beat(f"step {step + 1} of {stage.name}")
            if compare:
                check_ranks(collector, number, stage, batch)
            taken.append(batch)
            batch = {k: v.to(device(), non_blocking=True) for k, v in batch.items()}
            batch["negative_seed"] = torch.tensor(seed * 1_000_003 + number)
            # Dropout and stochastic depth need no saved state: they restart from a function of the step.
            torch.manual_seed((seed * 1_000_003 + number) * 65_537 + collector.rank)
            out = engine(batch)
            engine.backward(out.loss)
            optimizer_step(engine)
            outputs.append(out)
        skipped = engine.skipped_steps > skipped_before
        flags = {ASKED: float(stop.asked()), WRITING: float(writer.busy)}
        metrics, counts = global_metrics(outputs, {**bad, **flags}, collector)
        asked = counts.pop(ASKED)
        failures.count(writer.settle(counts.pop(WRITING)))
        metrics["lr"] = engine.get_lr()[0] if step + 1 < stage.steps else 0.0
        norm = engine.get_global_grad_norm()
        if norm is not None:
            metrics["grad_norm"] = math.nan if skipped else float(norm)
        metrics["skipped_steps"] = engine.skipped_steps
        if max(metrics.get("itc/logit_scale", 0.0), metrics.get("itc/vl_logit_scale", 0.0)) > NEAR_MAX_SCALE:
            clamp_scales(engine)
        metrics |= data_metrics(dataset, counts, (step + 1 + skip) * stage.global_batch_size)
        check_replaced(replaced, counts, dataset, stage, first + skip, step + 1 + skip)
        monitor.log(step + 1, stage.steps, metrics, stage.global_batch_size)
        nonfinite.look(step + 1, skipped, engine, outputs, taken)
        spike = guard.look(step + 1, metrics["loss"]) if guard else None
        if spike:
            failures.count(writer.finish())
            rollback = roll_back(spike, skip, folder, collector)
            break
        due = stage.checkpoint_every and (step + 1) % stage.checkpoint_every == 0
        if (due or asked) and step + 1 < stage.steps:
            failures.count(writer.finish())
            memory = {"skip": skip, "guard": guard.memory if guard else None}
            problem = writer.start(engine, step + 1, frozen, {**about, **memory})
            failures.count((step + 1, problem) if problem else None)
            if asked or not recipe.background_checkpoints:
                failures.count(writer.finish())
            if asked:
                raise Stopped(
                    f"stopped in stage '{stage.name}' at step {step + 1}; the same command goes on from there"
                )
    watch.unlimited(f"ending {stage.name}")
    failures.count(writer.finish())
    if not rollback:
        state = full_state(engine, frozen, shapes)
        meta = {"stage": stage.name, "steps": stage.steps, "tasks": stage.weights}
        problem = checkpoint.on_disk(collector, lambda: write_final(folder / "final", state, meta))
        if problem:
            raise RecipeError(f"the result of stage '{stage.name}' cannot be written to {folder / 'final'}: {problem}")
    release(engine)
    del engine, model, stream, dataset
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rollback


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
    shapes = {k: [len(v), "*"] if k.startswith(("text_", "false_text_")) else list(v.shape) for k, v in batch.items()}
    parts = [f"{key} {shapes[key]} {str(batch[key].dtype).removeprefix('torch.')}" for key in sorted(batch)]
    what = f"{stage.name}, pass {number}, tasks {', '.join(stage.tasks)}: {'; '.join(parts)}"
    hashes = collector.gather(torch.tensor([stable_id(what)], device=device())).tolist()
    if len(set(hashes)) > 1:
        every = collector.each_rank(what)
        other = next(rank for rank, value in enumerate(hashes) if value != hashes[0])
        raise RankDivergence(
            f"the ranks are about to compute different things:\n  rank 0: {every[0]}\n  rank {other}: {every[other]}"
        )


class FailedCheckpoints:
    """Reports checkpoints that could not be written; too many in a row end the run."""

    def __init__(self, recipe: Recipe, folder: Path, collector: Collector):
        self.allowed, self.folder, self.tells = recipe.checkpoint_failures, folder, collector.rank == 0
        self.in_a_row = 0

    def count(self, outcome: tuple[int, str] | None) -> None:
        """outcome: (step, why it failed or "") of a checkpoint; the same on every rank."""
        if outcome is None:
            return
        step, problem = outcome
        self.in_a_row = self.in_a_row + 1 if problem else 0
        what = f"checkpoint {self.folder}/step-{step:08d}: {problem}"
        if self.in_a_row > self.allowed:
            raise RecipeError(
                f"{what}; {self.in_a_row} in a row could not be written, checkpoint_failures is {self.allowed}"
            )
        if problem and self.tells:
            left = self.allowed - self.in_a_row
            print(f"warning: {what}; training goes on, {left} more may fail", file=sys.stderr, flush=True)


def data_metrics(dataset: BatchDataset, replaced: Mapping[str, float], position: int) -> dict[str, float]:
    """Samples of a step that were replaced, and the epochs before a position; of a mixture for each source."""
    epochs = dict(zip(dataset.names, dataset.order.epochs(position), strict=True))
    metrics = {"data/replaced": sum(replaced.values())}
    if len(epochs) == 1:
        return metrics | {"data/epoch": epochs.popitem()[1]}
    metrics |= {f"data/replaced/{name}": count for name, count in replaced.items()}
    return metrics | {f"data/epoch/{name}": epoch for name, epoch in epochs.items()}


def check_replaced(
    total: dict[str, float],
    replaced: Mapping[str, float],
    dataset: BatchDataset,
    stage: StageConfig,
    first: int,
    done: int,
) -> None:
    """Adds a step's replaced samples; DataError when a source has more than its share since the start at `first`."""
    began, now = (dataset.order.mixture.consumed(step * stage.global_batch_size) for step in (first, done))
    for name, seen in zip(dataset.names, (now - began).tolist(), strict=True):
        total[name] += replaced[name]
        if seen >= LEAST_JUDGED and total[name] > stage.data.max_bad_fraction * seen:
            raise DataError(
                f"stages.{stage.name}: {total[name]:.0f} of {seen} samples of source '{name}' could not be used and "
                f"were replaced, more than max_bad_fraction {stage.data.max_bad_fraction}; they are named above"
            )


@torch.no_grad()
def clamp_scales(engine: deepspeed.DeepSpeedEngine) -> None:
    """Keeps the contrastive scales at 100 at most, in the float32 values that the optimiser holds."""
    for name in ("logit_scale", "logit_vl_scale"):
        value = get_weight(engine, getattr(engine.module, name))
        if float(value) > MAX_LOG_SCALE:
            set_weights(engine, {name: value.clamp(max=MAX_LOG_SCALE)})
