"""The DeepSpeed config of a stage and the engine made from it.

Values that belong to the recipe are "auto" in the config file (as in the Hugging Face integration); a value that is
given in both places must agree, or the run stops and says where.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import nn

from vlmo_ds.config import RecipeError, StageConfig, nearest
from vlmo_ds.training.host import prepare_cpu
from vlmo_ds.training.optim import adamw, learning_rate, parameter_groups
from vlmo_ds.training.state import layout_of, set_weights

REMOVED = (
    "elasticity",
    "amp",
    "sparse_attention",
    "curriculum_learning",
    "progressive_layer_drop",
    "nebula",
    "compression_training",
)


def start_distributed(timeout: float = 600) -> None:
    """Joins the process group that the launcher describes (deepspeed, torchrun, srun), or a group of one.

    timeout: seconds that ranks wait for each other to join. Once all are there `Watch` looks after them, with messages
    that name the rank at fault, and collectives are given a day.
    """
    slurm = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
    if "RANK" not in os.environ and "MASTER_ADDR" in os.environ and "SLURM_PROCID" in os.environ:
        os.environ.update({name: os.environ[source] for name, source in slurm.items()})
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        prepare_cpu()
        # DeepSpeed would compile an all-reduce over shared memory at the first start (25 s and a C++ compiler; the
        # quickstart's steps are 3 to 6% faster with it). Without it every CPU run goes through gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 calls collectives by names that PyTorch 2.13 renamed: one warning per call site and rank
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    deepspeed.init_distributed(timeout=datetime.timedelta(seconds=timeout), verbose=False)
    torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(days=1))


def device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def read_config(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("ds_configs").glob("*.json"))) or "none found"
        raise RecipeError(
            f"--deepspeed_config: {path} does not exist{nearest(path, [str(p) for p in Path('ds_configs').glob('*.json')])}; in ds_configs: {known}"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise RecipeError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{path} holds a {type(config).__name__}, expected an object of DeepSpeed settings")
    for key in REMOVED:
        if key in config:
            raise RecipeError(f"{path}: '{key}' was removed from DeepSpeed; take it out")
    if "scheduler" in config:
        raise RecipeError(f"{path}: 'scheduler' belongs to the recipe (stages.<name>.schedule); take it out")
    fp16 = config.get("fp16", {}).get("enabled") is True
    if fp16 and not get_accelerator().is_fp16_supported():
        raise RecipeError(
            f"{path}: fp16 is enabled, which this {get_accelerator().device_name()} device cannot do; "
            "use ds_configs/zero2.json (bf16)"
        )
    return config


def micro_batch(stage: StageConfig, world_size: int) -> tuple[int, int]:
    """(samples per rank and forward pass, forward passes per optimiser step)."""
    micro = stage.micro_batch_size
    per_rank, rest = divmod(stage.global_batch_size, world_size)
    where = f"stages.{stage.name}.global_batch_size is {stage.global_batch_size}"
    if rest:
        lower, upper = per_rank * world_size, (per_rank + 1) * world_size
        accepted = f"{lower} or {upper}" if lower else str(upper)
        raise RecipeError(
            f"{where}, which {world_size} ranks do not divide: take {accepted}, or another number of ranks"
        )
    if micro is None:
        return per_rank, 1
    if per_rank % micro:
        raise RecipeError(
            f"{where}, that is {per_rank} on each of {world_size} ranks, which micro_batch_size {micro} does not divide"
        )
    return micro, per_rank // micro


def merge(config: dict[str, Any], stage: StageConfig, world_size: int) -> dict[str, Any]:
    """The file's config with every "auto" filled in from the recipe; contradictions are errors."""
    micro, accumulation = micro_batch(stage, world_size)
    ours: dict[str, tuple[Any, str]] = {
        "train_batch_size": (stage.global_batch_size, "global_batch_size"),
        "train_micro_batch_size_per_gpu": (micro, "micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, "global_batch_size and micro_batch_size"),
        "gradient_clipping": (stage.optimizer.gradient_clipping, "optimizer.gradient_clipping"),
    }
    merged = copy.deepcopy(config)

    def settle(place: dict, key: str, path: str, value: Any, setting: str) -> None:
        given = place.get(key, "auto")
        if given != "auto" and given != value:
            raise RecipeError(
                f"the DeepSpeed config has {path} = {given!r}, but the recipe's stages.{stage.name}.{setting} gives {value!r}: "
                'change one of them, or set "auto" in the DeepSpeed config'
            )
        place[key] = value

    for key, (value, setting) in ours.items():
        settle(merged, key, key, value, setting)
    optimizer = merged.pop("optimizer", None)
    if optimizer is not None:
        if str(optimizer.get("type", "AdamW")).lower() not in ("adamw", "auto"):
            raise RecipeError(
                f"the DeepSpeed config has optimizer.type = {optimizer['type']!r}; accepted: 'AdamW' or 'auto'"
            )
        params = optimizer.get("params", {})
        for key in params:
            if key not in ("lr", "betas", "eps", "weight_decay"):
                raise RecipeError(
                    f"the DeepSpeed config has optimizer.params.{key}; accepted: lr, betas, eps, weight_decay"
                )
            value = getattr(stage.optimizer, key)
            value = list(value) if isinstance(value, tuple) else value
            settle(params, key, f"optimizer.params.{key}", value, f"optimizer.{key}")
    if not torch.cuda.is_available() or "offload_optimizer" in merged.get("zero_optimization", {}):
        merged.setdefault("zero_force_ds_cpu_optimizer", torch.cuda.is_available())
    return merged


def build_engine(model: nn.Module, stage: StageConfig, merged: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    for parameter in model.parameters():
        if (
            parameter.dim() == 0
        ):  # DeepSpeed 0.19 cannot broadcast a scalar in half precision (seen in _broadcast_model)
            parameter.data = parameter.data.view(1)
    offloaded = "device" in merged.get("zero_optimization", {}).get("offload_optimizer", {})
    optimizer = adamw(parameter_groups(model, stage.optimizer), stage.optimizer, offloaded=offloaded)
    half = any(merged.get(precision, {}).get("enabled") for precision in ("bf16", "fp16"))
    exact = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad} if half else {}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda optimizer: learning_rate(optimizer, stage),
        config=copy.deepcopy(merged),
        dist_init_required=False,
    )
    # DeepSpeed makes its float32 weights from the half-precision ones: give them back the bits they lost, so that a
    # hand-over changes nothing.
    set_weights(engine, exact)
    layout_of(engine).create_moments(0)
    return engine


def release(engine: deepspeed.DeepSpeedEngine) -> None:
    """Ends an engine; with its last reference goes all of its memory.

    DeepSpeed 0.19's destroy() leaves every ZeRO-3 engine alive in two places: the list of modules in their forward
    pass keeps the model, and a cache on a method of the parameter coordinator keeps the coordinator.
    """
    engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()
    method = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(method, "__closure__", None) or ():  # the cache is inside a decorator for profiler ranges
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
