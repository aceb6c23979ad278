"""What a run will need, before anything is rented: memory per GPU, bytes on the wire, time and cost.

    python -m vlmo_ds.planning.plan --recipe R --deepspeed_config C --nodes 4 --gpus_per_node 8 --gpu_memory 80
    python -m vlmo_ds.planning.plan --check --recipe R --deepspeed_config C

Weights, gradients, optimiser states and collectives are counted from the model's own parameters and from how DeepSpeed 0.19
cuts them up (tests/planning/test_plan.py compares them with real runs); activations are an estimate from shapes; time is
FLOPs over the given rate. W is the number of ranks, b the bytes of a number in the run's precision.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vlmo_ds.config import ModelConfig, Recipe, RecipeError, StageConfig, number
from vlmo_ds.data.storage import DataError, write_atomically
from vlmo_ds.data.tokenizer import load_tokenizer
from vlmo_ds.families.interface import Load
from vlmo_ds.families.step import FamilyModel
from vlmo_ds.recipe_file import QUICKSTART, load_recipe
from vlmo_ds.training.ds_config import (
    PRECISIONS,
    check_recipe,
    is_half,
    merge,
    micro_batch,
    precision_of,
    read_config,
    refuse_by_models,
    with_precision,
)
from vlmo_ds.training.optim import parameter_groups, set_trainable

VOCABULARIES = {"openai/clip-vit-base-patch32": 49408, "bert-base-uncased": 30522}  # known without the hub
MASTER, MOMENTS = 4, 8  # bytes per trained parameter: float32 weight, Adam's two moments
SWEEP = tuple(2**i for i in range(11))  # 1 to 1,024 GPUs


@dataclass
class Memory:
    """Bytes on the fullest rank. The first three are exact between backward pass and step, the rest are estimates."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    features: float
    collector: float
    buffers: float  # DeepSpeed's buckets, and under ZeRO-3 the weights gathered at a time
    host: float  # in host memory, not on the device

    @property
    def device(self) -> float:
        return sum(asdict(self).values()) - self.host


@dataclass
class Plan:
    """One stage on so many ranks. wire: collective -> bytes that a rank receives in a step."""

    stage: str
    ranks: int
    parameters: int
    trained: int
    memory: Memory
    wire: dict[str, float]
    flops: float  # of a step over all ranks
    seconds: float
    steps: int
    fault: str = ""

    @property
    def days(self) -> float:
        return self.seconds * self.steps / 86_400


@dataclass
class Machine:
    """What a GPU gives."""

    memory_gb: float = 80
    tflops: float = 989  # dense bf16 of an H100
    efficiency: float = 0.4
    network_gb_per_s: float = 50  # received by one GPU
    price: float = 0  # per GPU and hour


def build(recipe: Recipe, stage: StageConfig) -> FamilyModel:
    """The stage's model without memory."""
    with torch.device("meta"):
        model = recipe.family.build(settled(recipe, stage), stage.weights, None)
    set_trainable(model, stage)
    return model


def settled(recipe: Recipe, stage: StageConfig) -> ModelConfig:
    """The stage's architecture with the vocabulary's size filled in."""
    size, name = recipe.model.vocab_size, recipe.tokenizer.name
    if not size:
        known = recipe.tokenizer.vocab_size if name == "train" else VOCABULARIES.get(name)
        size = (known or len(load_tokenizer(name, *recipe.family.tokenizer))) + recipe.model.extra_words
    return recipe.model_of(stage).model_copy(update={"vocab_size": size})


def parameter_count(recipe: Recipe) -> int:
    """Parameters of the largest stage."""
    return max(sum(p.numel() for p in build(recipe, stage).parameters()) for stage in recipe.stages)


# ---- memory ----


def flat_partition(groups: list[list[nn.Parameter]], ranks: int) -> tuple[int, int]:
    """ZeRO-1/2: (elements of a rank's part, elements of the parameters that overlap the fullest part).

    The parameters of a group lie one after the other, padded to a multiple of 2 W and cut evenly. Until the step a rank
    keeps the gradients of parameters that overlap its part whole.
    """
    part, overlap = 0, np.zeros(ranks, dtype=np.int64)
    for group in groups:
        size = math.ceil(sum(p.numel() for p in group) / (2 * ranks)) * 2
        part += size
        start = 0
        for parameter in group:
            end = start + parameter.numel()
            overlap[start // size : (end - 1) // size + 1] += parameter.numel()
            start = end
    return part, int(overlap.max())


def partitioned(parameters: list[nn.Parameter], ranks: int) -> int:
    """ZeRO-3: elements of a rank's parts, each parameter cut evenly and rounded up."""
    return sum(-(-p.numel() // ranks) for p in parameters)


def persistent(parameters: list[nn.Parameter], zero: dict[str, Any]) -> list[nn.Parameter]:
    """ZeRO-3 keeps small parameters whole: the first ones below a threshold, as far as a total allows."""
    threshold = zero.get("stage3_param_persistence_threshold", zero.get("param_persistence_threshold", 1e5))
    left = zero.get("stage3_model_persistence_threshold", zero.get("model_persistence_threshold", sys.maxsize))
    kept = []
    for parameter in parameters:
        if parameter.numel() <= threshold and parameter.numel() <= left:
            kept.append(parameter)
            left -= parameter.numel()
    return kept


def load_of(stage: StageConfig, ranks: int, merged: dict[str, Any]) -> Load:
    """What a rank holds at a time. merged: the DeepSpeed config as the stage has it."""
    offloaded = bool(merged.get("activation_checkpointing", {}).get("cpu_checkpointing"))
    return Load(*micro_batch(stage, ranks), ranks, 2 if is_half(merged) else 4, offloaded)


def memory_of(recipe: Recipe, stage: StageConfig, config: dict[str, Any], ranks: int, model: FamilyModel) -> Memory:
    merged = merge(config, stage, ranks)
    zero = merged.get("zero_optimization", {})
    level = zero.get("stage", 0)
    half = is_half(merged)
    b = 2 if half else 4
    everything = list(model.parameters())
    trained = [p for p in everything if p.requires_grad]
    count, learnt = (sum(p.numel() for p in some) for some in (everything, trained))
    gradient = 4 if merged.get("data_types", {}).get("grad_accum_dtype") == "fp32" else b
    moments = MOMENTS // 2 if stage.optimizer.name == "lion" else MOMENTS  # Muon's matrices have half, the rest all
    weights: float
    optimizer: float
    buffers = 0.0
    if level == 0:
        weights, gradients = b * count, b * learnt
        optimizer = (moments + (MASTER if half else 0)) * learnt
    elif level < 3:
        part, overlap = flat_partition([group["params"] for group in parameter_groups(model, stage)], ranks)
        weights, gradients, optimizer = b * count, gradient * overlap, (MASTER + moments) * part
        buckets = 2 if zero.get("overlap_comm") else 1
        buffers = b * (
            buckets * min(zero.get("reduce_bucket_size", 5e8), learnt)
            + min(zero.get("allgather_bucket_size", 5e8), learnt)
        )
    else:
        small = persistent(everything, zero)
        weights = b * (partitioned(everything, ranks) + sum(p.numel() for p in small))
        gradients = gradient * partitioned(trained, ranks)
        optimizer = (MASTER + moments) * partitioned(trained, ranks)
        live = zero.get("stage3_max_live_parameters", zero.get("max_live_parameters", 1e9))
        buffers = b * (min(live, count) + min(zero.get("reduce_bucket_size", 5e8), learnt))
    if stage.ema:
        optimizer += MASTER * learnt / ranks
    host = 0.0
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        host, optimizer = host + optimizer + gradients, 0.0
    if zero.get("offload_param", {}).get("device", "none") != "none":
        host, weights = host + weights, 0.0
    return Memory(
        weights,
        gradients,
        optimizer,
        **recipe.family.cost().activations(settled(recipe, stage), stage, load_of(stage, ranks, merged)),
        buffers=buffers,
        host=host,
    )


# ---- the wire ----


def wire_of(
    recipe: Recipe, stage: StageConfig, config: dict[str, Any], ranks: int, model: FamilyModel
) -> dict[str, float]:
    """Bytes that a rank receives in an optimiser step, by collective (an all-reduce counts twice: reduce, gather).

    Under ZeRO-3 a weight is gathered anew for each use that is further away than max_reuse_distance elements; every
    walk of the block stack is a use, forward and backward.
    """
    merged = merge(config, stage, ranks)
    zero = merged.get("zero_optimization", {})
    level = zero.get("stage", 0)
    b = 2 if is_half(merged) else 4
    _, accumulation = micro_batch(stage, ranks)
    away = (ranks - 1) / ranks
    learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
    wire = dict.fromkeys(("all-reduce", "all-gather", "reduce-scatter", "all-to-all"), 0.0)
    if level < 3:
        wire["all-reduce"] = 2 * away * b * learnt * (accumulation if level == 2 else 1)
        if level:
            wire["all-gather"] = away * b * learnt
    else:
        wire["all-gather"] = away * b * gathered(model, stage, zero) * accumulation
        wire["reduce-scatter"] = away * b * learnt * accumulation
    further = recipe.family.cost().collectives(settled(recipe, stage), stage, load_of(stage, ranks, merged))
    return wire | {name: wire[name] + value for name, value in further.items()}


def gathered(model: FamilyModel, stage: StageConfig, zero: dict[str, Any]) -> int:
    """Elements that ZeRO-3 gathers for a forward and a backward pass."""
    small = {id(p) for p in persistent(list(model.parameters()), zero)}
    walks = stage.family.cost().walks(model, stage)
    kept = sum(p.numel() for p in model.parameters() if id(p) in small)  # once, after the step
    others = [(p.numel(), walks[name]) for name, p in model.named_parameters() if id(p) not in small]
    once = sum(size for size, times in others if times)
    if zero.get("stage3_max_reuse_distance", zero.get("max_reuse_distance", 1e9)) >= 4 * once:
        return kept + once
    return kept + sum(2 * times * size for size, times in others)


# ---- all together ----


def plan(recipe: Recipe, stage: StageConfig, config: dict[str, Any], ranks: int, machine: Machine) -> Plan:
    """A stage on so many ranks. Raises RecipeError where the batch cannot be split among them."""
    model = build(recipe, stage)
    memory = memory_of(recipe, stage, config, ranks, model)
    wire = wire_of(recipe, stage, config, ranks, model)
    settings = settled(recipe, stage)
    # the backward pass is worth two forward ones
    passes = 3 + (settings.recompute_every == 1) + stage.gradient_cache
    flops = passes * recipe.family.cost().forward_flops(settings, stage, stage.global_batch_size)
    compute = flops / ranks / (machine.tflops * 1e12 * machine.efficiency)
    seconds = max(compute, sum(wire.values()) / (machine.network_gb_per_s * 1e9))
    over = memory.device > machine.memory_gb * 1e9
    return Plan(
        stage.name,
        ranks,
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        memory,
        wire,
        flops,
        seconds,
        stage.steps,
        f"needs {memory.device / 1e9:.1f} of {machine.memory_gb:g} GB" if over else "",
    )


# ---- what is printed ----


def gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e7 else f"{value / 1e6:.2f} MB"


def text_of(found: Plan, machine: Machine) -> str:
    lines = [
        f"stage {found.stage} on {found.ranks} GPUs: {found.parameters / 1e6:.1f}M parameters, {found.trained / 1e6:.1f}M trained",
        f"  memory per GPU    {gb(found.memory.device)}" + (f"  DOES NOT FIT: {found.fault}" if found.fault else ""),
    ]
    lines += [f"    {name:<15} {gb(value)}" for name, value in asdict(found.memory).items() if value and name != "host"]
    if found.memory.host:
        lines.append(f"  in host memory    {gb(found.memory.host)}")
    lines.append(f"  received per step {gb(sum(found.wire.values()))}")
    lines += [f"    {name:<15} {gb(value)}" for name, value in found.wire.items() if value]
    lines.append(f"  work per step     {found.flops / 1e12:.1f} TFLOP")
    lines.append(
        f"  time              {found.seconds:.3f} s/step at {machine.efficiency:.0%} of {machine.tflops:g} TFLOP/s, {found.days:.2f} days"
    )
    return "\n".join(lines)


def sweep(recipe: Recipe, config: dict[str, Any], machine: Machine) -> str:
    """The whole recipe on 1 to 1,024 GPUs."""
    lines = [f"{'GPUs':>5} {'memory/GPU':>12} {'wire/step':>12} {'days':>9} {'cost':>12}"]
    for ranks in SWEEP:
        try:
            plans = [plan(recipe, stage, config, ranks, machine) for stage in recipe.stages]
        except RecipeError as error:
            lines.append(f"{ranks:>5} {str(error).splitlines()[0]}")
            continue
        most, wire = max(p.memory.device for p in plans), max(sum(p.wire.values()) for p in plans)
        days = sum(p.days for p in plans)
        cost = f"{days * 24 * ranks * machine.price:,.0f}" if machine.price else "-"
        note = "  does not fit" if any(p.fault for p in plans) else ""
        lines.append(f"{ranks:>5} {gb(most):>12} {gb(wire):>12} {days:>9.2f} {cost:>12}{note}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 it fits, 1 it does not, 2 a setting or file that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m vlmo_ds.planning.plan", description="What a run will need.")
    parser.add_argument("--recipe", default=QUICKSTART)
    parser.add_argument("--deepspeed_config", default="ds_configs/zero2.json")
    parser.add_argument("--nodes", type=number(int), default=1)
    parser.add_argument("--gpus_per_node", type=number(int), default=1)
    parser.add_argument("--gpu_memory", type=number(float), default=Machine.memory_gb, metavar="GB")
    parser.add_argument(
        "--gpu_tflops",
        type=number(float),
        default=Machine.tflops,
        help="dense rate in the run's precision (default: %(default)s, H100 bf16)",
    )
    parser.add_argument(
        "--efficiency",
        type=number(float),
        default=Machine.efficiency,
        help="share of it that is reached (default: %(default)s)",
    )
    parser.add_argument(
        "--network",
        type=number(float),
        default=Machine.network_gb_per_s,
        metavar="GB/s",
        help="received by one GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="bf16",
        help="what 'auto' in the DeepSpeed config becomes on these GPUs: fp16 before compute capability 8.0 (default: %(default)s)",
    )
    parser.add_argument("--price", type=number(float, 0), default=0, help="per GPU and hour")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the stages to this file")
    parser.add_argument("--check", action="store_true", help="only check the settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe to change")
    args = parser.parse_intermixed_args(argv)
    ranks = args.nodes * args.gpus_per_node
    machine = Machine(args.gpu_memory, args.gpu_tflops, args.efficiency, args.network, args.price)
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        config = read_config(args.deepspeed_config)
        check_recipe(config, recipe)
        refuse_by_models(config, args.deepspeed_config)
        wanted = precision_of(config)
        config = with_precision(config, args.precision if wanted == "auto" else wanted)
        for stage in recipe.stages:
            merge(config, stage, ranks)
        if args.check:
            print(f"{args.recipe} with {args.deepspeed_config} on {ranks} ranks: precision {wanted}, no mistakes found")
            return 0
        print(f"precision: {precision_of(config)}{' (auto; --precision names another)' if wanted == 'auto' else ''}\n")
        plans = [plan(recipe, stage, config, ranks, machine) for stage in recipe.stages]
        if args.json:
            rows = [{**asdict(p), "device_bytes": p.memory.device, "days": p.days} for p in plans]
            write_atomically(args.json, json.dumps(rows, indent=1).encode())
        print("\n\n".join(text_of(p, machine) for p in plans))
        days = sum(p.days for p in plans)
        cost = f", {days * 24 * ranks * args.price:,.0f} at {args.price:g} per GPU-hour" if args.price else ""
        print(f"\n{recipe.name}: {days:.2f} days on {ranks} GPUs{cost}\n\n{sweep(recipe, config, machine)}")
        return 1 if any(p.fault for p in plans) else 0
    except (RecipeError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
