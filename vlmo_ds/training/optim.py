"""Parameter groups, optimiser, learning-rate schedule and optimiser step of a stage."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from vlmo_ds.config import OptimizerConfig, RecipeError, StageConfig
from vlmo_ds.families.interface import matches
from vlmo_ds.families.step import FamilyModel
from vlmo_ds.training.lion import Lion
from vlmo_ds.training.muon import Muon, Piece
from vlmo_ds.training.state import layout_of


def set_trainable(model: FamilyModel, stage: StageConfig) -> list[str]:
    """Freezes what the stage does not train, or its tasks do not reach, and what follows other weights; returns the names of what
    it trains. A pattern that fits nothing is an error."""
    names = [name for name, _ in model.named_parameters()]
    if not isinstance(stage.trainable, str):
        for pattern in stage.trainable_patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise RecipeError(f"stages.{stage.name}.trainable: '{pattern}' fits no parameter of the model")
    trained, idle = [], model.idle()
    for name, parameter in model.named_parameters():
        still = matches(name, idle) or matches(name, model.family.averaged)
        parameter.requires_grad_(matches(name, stage.trainable_patterns) and not still)
        if parameter.requires_grad:
            trained.append(name)
    if not trained:
        raise RecipeError(
            f"stages.{stage.name}: nothing is trained: {', '.join(stage.tasks)} reaches none of what trainable names "
            f"(it leaves alone {', '.join(idle)})"
        )
    return trained


BLOCK = re.compile(
    r"(.*?(?:^|\.)(?:blocks|resblocks|cross_attn|layers?))\.(\d+)\."
)  # of a stack: its name, and the block's number
BELOW = re.compile(r"embed|cls_token|mask_token|cls_emb|conv1\.|ln_pre")  # what comes before the first block


def layer_multipliers(names: Iterable[str], decay: float) -> dict[str, float]:
    """Learning rate of each parameter over lr: `decay` for every block that is above it in its stack, and once more for what comes before
    the first block (BEiT, arXiv:2106.08254, appendix; all parameters of a block alike). 1 for what is in no block."""
    names = list(names)
    depths: dict[str, int] = {}
    for name in names:
        if found := BLOCK.match(name):
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
    below = decay ** (max(depths.values(), default=0) + 1)
    multipliers = {}
    for name in names:
        found = BLOCK.match(name)
        multipliers[name] = (
            decay ** (depths[found[1]] - int(found[2])) if found else below if BELOW.search(name) else 1.0
        )
    return multipliers


def parameter_groups(model: nn.Module, stage: StageConfig) -> list[dict]:
    """Groups of trainable parameters: decayed or not, by their learning rate and, with Muon, by whether it takes them: matrices of blocks that
    are decayed. RecipeError for a pattern that fits none."""
    config, family = stage.optimizer, stage.family
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    multipliers = layer_multipliers((name for name, _ in model.named_parameters()), config.layer_decay)
    for pattern in config.lr_multipliers:
        if not any(matches(name, [pattern]) for name in trained):
            raise RecipeError(
                f"stages.{stage.name}.optimizer.lr_multipliers: '{pattern}' fits no parameter that is trained"
            )
    groups: dict[tuple[bool, bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        head = matches(name, family.heads) and config.head_lr_multiplier != 1.0
        factor = config.head_lr_multiplier if head else multipliers[name]
        factor *= next((value for pattern, value in config.lr_multipliers.items() if matches(name, [pattern])), 1.0)
        no_decay = matches(name, family.no_decay)
        muon = config.name == "muon" and parameter.dim() == 2 and bool(BLOCK.match(name)) and not (no_decay or head)
        groups.setdefault((no_decay, head, factor, muon), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if no_decay else config.weight_decay,
            "lr": config.lr * factor,
            "name": f"{'head' if head else 'backbone'}{'-no-decay' if no_decay else ''}{'' if head or factor == 1 else f'-times-{factor:.3g}'}"
            + ("-muon" if muon else ""),
            "muon": muon,
        }
        for (no_decay, head, factor, muon), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(groups: list[dict], config: OptimizerConfig, *, offloaded: bool) -> torch.optim.Optimizer:
    """Lion, Muon, or torch's AdamW in one kernel, on a CPU too (three times faster there, benchmarks/results/precision_*.json); DeepSpeed's compiled
    CPU Adam where a GPU run keeps its optimiser states in host memory."""
    if config.name == "lion":
        return Lion(groups, config.lr, config.betas)
    if config.name == "muon":
        return Muon(groups, config.lr, config.betas, config.eps, config.momentum, fused=True)
    settings: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if offloaded and torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def place_matrices(engine: deepspeed.DeepSpeedEngine) -> None:
    """Tells Muon where its matrices are, of an engine that has it."""
    layout = layout_of(engine)
    if not isinstance(layout.inner, Muon):
        return
    pieces: dict[int, list[Piece]] = {}
    for stepped, parameters in layout.stepped():
        for parameter, offset in parameters:
            if id(parameter) in layout.inner.matrices:
                start, count = layout.held(parameter) or (0, 0)
                shape = getattr(parameter, "ds_shape", parameter.shape)
                pieces.setdefault(id(stepped), []).append(Piece(shape, offset, start, count))
    layout.inner.place(pieces, cut=engine.zero_optimization_stage() > 0 and engine.world_size > 1)


def by_steps(warmup: int, decay: float, every: int, step: int) -> float:
    """Share of the peak learning rate at a step: the decay counts from the first step on, and shows after the warm-up (BLIP,
    whose warm-up is in its first epoch)."""
    return step / warmup if step < warmup else decay ** (step // every)


def learning_rate(optimizer: torch.optim.Optimizer, stage: StageConfig) -> LRScheduler:
    """Warm-up, then linear or cosine decay to zero at the stage's last step, decay by steps, or none."""
    if stage.schedule.name == "step":
        return LambdaLR(optimizer, partial(by_steps, stage.warmup, stage.schedule.decay, stage.schedule.decay_every))
    if stage.schedule.name == "constant":
        return get_constant_schedule_with_warmup(optimizer, stage.warmup)
    build = get_linear_schedule_with_warmup if stage.schedule.name == "linear" else get_cosine_schedule_with_warmup
    return build(optimizer, stage.warmup, stage.steps)


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
