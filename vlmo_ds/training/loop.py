"""One stage: from initial weights to the stage's final weights."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import Recipe, StageConfig
from vlmo_ds.data.loader import BatchDataset, batches, spec_for
from vlmo_ds.data.storage import DataError
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.models.vlmo import StepOutput, VLMo
from vlmo_ds.objectives.itc import MAX_LOG_SCALE
from vlmo_ds.training import checkpoint
from vlmo_ds.training.engine import build_engine, device, merge, micro_batch, release, set_full_fp32
from vlmo_ds.training.monitor import Monitor, global_metrics
from vlmo_ds.training.optim import set_trainable

NEAR_MAX_SCALE = 90.0
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
    recipe: Recipe, stage: StageConfig, source: dict[str, Tensor] | None, origin: str, collector: Collector
) -> VLMo:
    """The stage's model with its initial weights, the same on every rank; what it does not train is frozen."""
    torch.manual_seed(stage_seed(recipe, stage))
    model = VLMo(recipe.model, stage.weights, collector)
    if source is not None:
        report = checkpoint.hand_over(model, source, stage.init, origin)
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
) -> None:
    """Trains a stage to its end and writes its final weights. offset: optimiser steps of the stages before."""
    _, accumulation = micro_batch(stage, collector.world_size)
    dataset = build_dataset(recipe, stage, tokenizer, collector)
    model = build_model(recipe, stage, source, origin, collector)
    frozen = checkpoint.frozen_state(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    engine = build_engine(model, stage, merge(ds_config, stage, collector.world_size))
    first = checkpoint.load(engine, resume_from) if resume_from else 0
    if first and collector.rank == 0:
        print(f"{stage.name}: resumed at step {first} from {resume_from}", flush=True)
    monitor.begin(stage.name, first, offset)
    seed = stage_seed(recipe, stage)
    stream = batches(dataset, first * accumulation, stage.steps * accumulation, stage.data.workers, stage.data.prefetch)
    engine.train()
    named: set[str] = set()  # bad samples that this rank has told of
    replaced = dict.fromkeys(dataset.names, 0.0)
    for step in range(first, stage.steps):
        outputs: list[StepOutput] = []
        bad = dict.fromkeys(dataset.names, 0)
        for part in range(accumulation):
            batch = next(stream)
            for source, reason in batch.pop("replaced"):
                bad[source] += 1
                if reason not in named:
                    named.add(reason)
                    print(f"{stage.name}: replaced a sample: {reason}", file=sys.stderr, flush=True)
            number = step * accumulation + part
            if stage.log_images_every and part == 0 and step % stage.log_images_every == 0:
                monitor.images(step + 1, batch, tokenizer)
            batch = {k: v.to(device(), non_blocking=True) for k, v in batch.items()}
            batch["negative_seed"] = torch.tensor(seed * 1_000_003 + number)
            # Dropout and stochastic depth need no saved state: they restart from a function of the step.
            torch.manual_seed((seed * 1_000_003 + number) * 65_537 + collector.rank)
            out = engine(batch)
            engine.backward(out.loss)
            engine.step()
            outputs.append(out)
        metrics = global_metrics(outputs, bad, collector)
        metrics["lr"] = engine.get_lr()[0] if step + 1 < stage.steps else 0.0
        norm = engine.get_global_grad_norm()
        if norm is not None:
            metrics["grad_norm"] = float(norm)
        if max(metrics.get("itc/logit_scale", 0.0), metrics.get("itc/vl_logit_scale", 0.0)) > NEAR_MAX_SCALE:
            clamp_scales(engine.module)
        epochs = dataset.order.epochs((step + 1) * stage.global_batch_size)
        if len(epochs) == 1:
            metrics["data/epoch"] = epochs[0]
        else:
            metrics |= {f"data/epoch/{name}": epoch for name, epoch in zip(dataset.names, epochs, strict=True)}
        count_replaced(replaced, metrics, dataset, stage, first, step + 1)
        monitor.log(step + 1, stage.steps, metrics, stage.global_batch_size)
        if stage.checkpoint_every and (step + 1) % stage.checkpoint_every == 0 and step + 1 < stage.steps:
            checkpoint.save(engine, folder, step + 1, recipe.keep_checkpoints, collector)
    state = checkpoint.full_state(engine, frozen, shapes)
    if collector.rank == 0:
        meta = {"stage": stage.name, "steps": stage.steps, "tasks": stage.weights}
        checkpoint.write_final(folder / "final", state, meta)
    collector.barrier()
    release(engine)
    del engine, model, stream, dataset
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def count_replaced(
    replaced: dict[str, float],
    metrics: dict[str, float],
    dataset: BatchDataset,
    stage: StageConfig,
    first: int,
    done: int,
) -> None:
    """Adds a step's replaced samples; DataError when a source has more than its share since the start at `first`."""
    began, now = (dataset.order.mixture.consumed(step * stage.global_batch_size) for step in (first, done))
    for name, seen in zip(dataset.names, (now - began).tolist(), strict=True):
        replaced[name] += metrics.get(f"data/replaced/{name}", metrics["data/replaced"])
        if seen >= LEAST_JUDGED and replaced[name] > stage.data.max_bad_fraction * seen:
            raise DataError(
                f"stages.{stage.name}: {replaced[name]:.0f} of {seen} samples of source '{name}' could not be used and "
                f"were replaced, more than max_bad_fraction {stage.data.max_bad_fraction}; they are named above"
            )


@torch.no_grad()
def clamp_scales(model: VLMo) -> None:
    """Keeps the contrastive scales at 100 at most, in the float32 values that the optimiser holds."""
    for parameter in (model.logit_scale, model.logit_vl_scale):
        value = safe_get_full_fp32_param(parameter)
        if value is None:
            parameter.clamp_(max=MAX_LOG_SCALE)
        elif float(value) > MAX_LOG_SCALE:
            set_full_fp32(parameter, value.clamp(max=MAX_LOG_SCALE))
