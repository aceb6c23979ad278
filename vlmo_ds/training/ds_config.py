"""The DeepSpeed config: read, checked, and completed from the recipe.

Values that belong to the recipe are "auto" in the config file (as in the Hugging Face integration); a value that is
given in both places must agree, or the run stops and says where. Nothing here needs PyTorch or DeepSpeed to be imported,
but for `refuse_by_models` and `refuse_by_device`: a mistake is told in a second.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlmo_ds import shipped
from vlmo_ds.config import Recipe, RecipeError, StageConfig, nearest
from vlmo_ds.training.ds_schema import MODELS, removed, section_problems
from vlmo_ds.training.mlflow_log import URI, uri_of

AUTO = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
)
# Top-level settings of DeepSpeed 0.19 that do something here, and mlflow, which is our own; it ignores what it does not know.
KNOWN = (
    *AUTO,
    "activation_checkpointing",
    "aio",
    "bf16",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "data_types",
    "dump_state",
    "flops_profiler",
    "fp16",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "memory_breakdown",
    "mlflow",
    "prescale_gradients",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
# Where the installed DeepSpeed still has what a later one removed, the key is refused too.
REMOVED = {
    "elasticity": "start again with another number of ranks: every checkpoint can be read by any number",
    "amp": "use bf16 or fp16",
    "sparse_attention": "take it out",
    "curriculum_learning": "take it out",
    "progressive_layer_drop": "use the recipe's model.drop_path_rate",
    "nebula": "checkpoints are written in the background (the recipe's background_checkpoints)",
    "compression_training": "take it out",
    "sparse_gradients": "take it out",
}
REFUSED = {
    "scheduler": "belongs to the recipe (stages.<name>.schedule): take it out",
    "torch_autocast": "computes contrastive features and logits in 16 bits, where small differences are lost: use bf16",
}
REMOVED_ZERO = {
    "mics_shard_size": "use zero_hpz_partition_size (ds_configs/zeropp.json)",
    "mics_hierarchical_params_gather": "use zero_hpz_partition_size (ds_configs/zeropp.json)",
    "zeropp_loco_param": "take it out",
}


# What "auto" stands for in settings that Hugging Face derives from the width of a language model: the shipped configs' sizes.
AUTO_SIZES = {
    "reduce_bucket_size": 5e7,
    "allgather_bucket_size": 5e7,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
}
PRECISIONS = ("bf16", "fp16", "float32")
# Dynamic loss scale of fp16 where "auto" leads to it, as in ds_configs/zero2_fp16.json.
FP16 = {"initial_scale_power": 16, "loss_scale_window": 500, "min_loss_scale": 1}
# Section -> the package that it needs, and how it is installed.
MONITORS = {
    "wandb": ("wandb", "pip install wandb"),
    "tensorboard": ("tensorboard", "pip install tensorboard"),
    "mlflow": ("mlflow", 'pip install "vlmo_ds[mlflow]"'),
}

# Settings that hold further settings, with an example.
SECTIONS = {
    "zero_optimization": '{"stage": 2}',
    "zero_optimization.offload_optimizer": '{"device": "cpu"}',
    "zero_optimization.offload_param": '{"device": "cpu"}',
    "bf16": '{"enabled": true}',
    "fp16": '{"enabled": true}',
    "optimizer": '{"type": "AdamW"}',
    "optimizer.params": '{"lr": "auto"}',
    "data_types": '{"grad_accum_dtype": "fp32"}',
    "activation_checkpointing": '{"cpu_checkpointing": true}',
    "aio": '{"block_size": 1048576}',
    "comms_logger": '{"enabled": true}',
    "csv_monitor": '{"enabled": true}',
    "flops_profiler": '{"enabled": true}',
    "mlflow": '{"enabled": true, "tracking_uri": "http://localhost:5000"}',
    "tensorboard": '{"enabled": true}',
    "wandb": '{"enabled": true}',
}


def accepted_from_elsewhere(config: dict[str, Any]) -> dict[str, Any]:
    """A config with what is pasted from Hugging Face's pages and is safe put as the rest of this file expects it."""
    config = copy.deepcopy(config)
    for name in ("bf16", "fp16"):
        if config.get(name) == "auto":
            config[name] = {"enabled": "auto"}
    zero = config.get("zero_optimization")
    if isinstance(zero, dict):
        for key, size in AUTO_SIZES.items():
            if zero.get(key) == "auto":
                zero[key] = size
    scheduler = config.get("scheduler")
    if isinstance(scheduler, dict):
        given = scheduler.get("params", {})
        if isinstance(given, dict) and given and set(given.values()) == {"auto"}:  # the recipe's, then
            del config["scheduler"]
    params = section(config, "optimizer.params")
    for key in ("torch_adam", "adam_w_mode"):  # that is what is taken anyway
        if isinstance(params, dict) and params.get(key) is True:
            del params[key]
    return config


def problems_of(config: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a config whatever the recipe: the key, what it holds, and the way out."""
    if section(config, "fp16.auto_cast") is True:
        yield "'fp16.auto_cast' is true: it rounds features to 16 bits before contrast: take it out"
    gone = dict.fromkeys(removed("_REMOVED_TOP_LEVEL_CONFIG_KEYS"), "take it out") | REMOVED
    for key in config:
        if key in gone:
            yield f"'{key}' was removed from DeepSpeed: {gone[key]}"
        elif key in REFUSED:
            yield f"'{key}' {REFUSED[key]}"
        elif key not in KNOWN:
            yield f"'{key}' is not known{nearest(key, KNOWN)}; DeepSpeed would ignore it. Known: {', '.join(sorted(KNOWN))}"
    yield from (
        f"'{path}' is 'auto', but the recipe has no value for it: give one, or take it out"
        for path, value in leaves(config)
        if value == "auto" and not path.startswith(AUTO) and path not in ("bf16.enabled", "fp16.enabled")
    )
    flat = [path for path in SECTIONS if not isinstance(section(config, path), dict)]
    for path in flat:
        yield f"'{path}' is {section(config, path)!r}, expected settings such as {SECTIONS[path]}"
    if flat:
        return
    zero = config.get("zero_optimization", {})
    wrong = [*removed_zero_keys(zero), *section_problems({**config, "zero_optimization": without_removed(zero)})]
    yield from wrong
    if wrong:
        return
    yield from zero_problems(config, zero)
    yield from precision_problems(config)
    yield from offload_problems(zero)
    yield from engine_problems(config, zero)
    checkpointing = config.get("activation_checkpointing", {})
    for key, value in checkpointing.items():
        if key == "partition_activations" and value:
            yield (
                "'activation_checkpointing.partition_activations' is true: it splits activations over tensor-parallel "
                "ranks, of which there are none here; use cpu_checkpointing"
            )
        elif key not in ("cpu_checkpointing", "partition_activations") and value:
            yield (
                f"'activation_checkpointing.{key}' is {value!r}; accepted: cpu_checkpointing. "
                "What is recomputed is the recipe's model.recompute"
            )


def removed_zero_keys(zero: dict[str, Any]) -> Iterator[str]:
    gone = dict.fromkeys(removed("_REMOVED_ZERO_CONFIG_KEYS"), "take it out") | REMOVED_ZERO
    yield from (f"'zero_optimization.{key}' was removed from DeepSpeed: {gone[key]}" for key in zero if key in gone)


def without_removed(zero: dict[str, Any]) -> dict[str, Any]:
    gone = removed("_REMOVED_ZERO_CONFIG_KEYS") | REMOVED_ZERO.keys()
    return {key: value for key, value in zero.items() if key not in gone}


def engine_problems(config: dict[str, Any], zero: dict[str, Any]) -> Iterator[str]:
    """What DeepSpeed finds out when it builds its engine, or never says."""
    if str(config.get("gradient_allreduce_op", "mean")).lower() != "mean":
        yield (
            f"'gradient_allreduce_op' is {config['gradient_allreduce_op']!r}: the losses are written for gradients that are "
            "averaged over ranks, and ZeRO-3 cannot sum them; scale stages.<name>.tasks in the recipe instead"
        )
    if (
        (config.get("gradient_predivide_factor") or 1) != 1
        and zero.get("stage", 0)
        and zero.get("reduce_scatter", True)
    ):
        yield (
            f"'gradient_predivide_factor' is {config['gradient_predivide_factor']!r}, which DeepSpeed does not support under "
            "ZeRO: take it out, or set zero_optimization.stage to 0"
        )
    kinds = ("fp16", "fp32", "bf16", None)
    if config.get("communication_data_type") not in kinds:
        yield f"'communication_data_type' is {config['communication_data_type']!r}; accepted: 'fp16', 'bf16', 'fp32'"
    if config.get("steps_per_print") is not None and config["steps_per_print"] < 1:
        yield f"'steps_per_print' is {config['steps_per_print']!r}; accepted: a whole number from 1 on"
    for name, (package, command) in MONITORS.items():
        if config.get(name, {}).get("enabled") and importlib.util.find_spec(package) is None:
            yield f"'{name}.enabled' is true, but the package {package} is not installed: {command}, or take '{name}' out"
    if config.get("mlflow", {}).get("enabled"):
        uri = uri_of(config["mlflow"])
        if not uri:
            yield f"'mlflow.enabled' is true, and nothing says where: set mlflow.tracking_uri, or {URI} in the environment"
        elif uri.startswith("file:") or ("://" not in uri and uri != "databricks"):
            yield (
                f"'mlflow.tracking_uri' is {uri!r}: MLflow's store of files has no place for loss/x beside loss; accepted: a server's "
                "http://..., or sqlite:///file.db"
            )


def section(config: dict[str, Any], path: str) -> Any:
    """What a config holds under a dotted name; {} if nothing."""
    for part in path.split("."):
        config = config.get(part, {}) if isinstance(config, dict) else {}
    return config


def precision_of(config: dict[str, Any]) -> str:
    """One of PRECISIONS, or "auto": what the device computes natively, as far as the config leaves that open."""
    enabled = {name: config.get(name, {}).get("enabled") for name in ("bf16", "fp16")}
    for name, value in enabled.items():
        if value is True:
            return name
    return "auto" if "auto" in enabled.values() else "float32"


def with_precision(config: dict[str, Any], precision: str) -> dict[str, Any]:
    """The config with one of PRECISIONS in the place of "auto"."""
    settled = {key: value for key, value in config.items() if key not in ("bf16", "fp16")}
    for name in ("bf16", "fp16"):
        if name in config or name == precision:
            settled[name] = {**config.get(name, {}), "enabled": name == precision}
    if precision == "fp16":
        settled["fp16"] = {**FP16, **settled["fp16"]}
    return settled


def is_half(config: dict[str, Any]) -> bool:
    """Whether weights are in 16 bits, with float32 ones in the optimiser; of a config whose precision is settled."""
    return precision_of(config) in ("bf16", "fp16")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def zero_problems(config: dict[str, Any], zero: dict[str, Any]) -> Iterator[str]:
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        yield f"'zero_optimization.stage' is {stage!r}; accepted: 0, 1, 2, 3"
        return
    optimizer = str(config.get("optimizer", {}).get("type", "adamw")).lower()
    if "lamb" in optimizer and stage >= 1:
        yield (
            f"'optimizer.type' is {config['optimizer']['type']!r} with ZeRO-{stage}: LAMB scales by the norms of whole "
            "tensors, which ZeRO cuts into parts (DeepSpeed issues 490, 1217): use AdamW"
        )
    for key in ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients"):
        if zero.get(key) and stage != 3 and zero[key] != 1:
            yield f"'zero_optimization.{key}' is {zero[key]!r} with stage {stage}: ZeRO++ needs stage 3"


def precision_problems(config: dict[str, Any]) -> Iterator[str]:
    enabled = [name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") is True]
    if len(enabled) > 1:
        yield "'bf16.enabled' and 'fp16.enabled' are both true: keep one"
    accumulation = config.get("data_types", {}).get("grad_accum_dtype")
    half = enabled or precision_of(config) == "auto"
    if half and accumulation not in (None, "auto", "fp32", "float32", "torch.float32", "float"):
        yield (
            f"'data_types.grad_accum_dtype' is {accumulation!r}: sums of many small gradients lose most of them in 16 bits "
            "(DeepSpeed issues 1800, 2768): set 'fp32', or take it out"
        )
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if config.get("bf16", {}).get(key):
            yield f"'bf16.{key}' is true: checkpoints and hand-overs need float32 weights and moments: take it out"


def offload_problems(zero: dict[str, Any]) -> Iterator[str]:
    stage = zero.get("stage", 0)
    for part, least in (("offload_optimizer", 1), ("offload_param", 3)):
        settings = zero.get(part, {})
        device = settings.get("device", "none")
        if device not in ("cpu", "nvme", "none"):
            yield f"'zero_optimization.{part}.device' is {device!r}; accepted: 'none', 'cpu' or 'nvme'"
        if device not in ("cpu", "nvme"):
            continue
        key = f"zero_optimization.{part}"
        if stage < (3 if device == "nvme" else least):
            yield f"'{key}.device' is {device!r} with stage {stage}: it needs stage {3 if device == 'nvme' else least}"
        if device == "nvme" and not settings.get("nvme_path"):
            yield f"'{key}.nvme_path' is missing: name a folder on a local disk"


def read_config(path: str | Path) -> dict[str, Any]:
    path = shipped.find("ds_configs", path)
    if not path.is_file():
        known = shipped.names("ds_configs")
        what = "is a folder" if path.is_dir() else "does not exist"
        raise RecipeError(
            f"--deepspeed_config: {path} {what}{nearest(path.stem, known)}; in ds_configs: {', '.join(known)}"
        )
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{path} holds a {type(config).__name__}, expected an object of DeepSpeed settings")
    config = accepted_from_elsewhere(config)
    problems = list(problems_of(config))
    if problems:
        raise RecipeError(f"{path}:\n  " + "\n  ".join(problems))
    return config


def refuse_by_models(config: dict[str, Any], path: str | Path) -> None:
    """RecipeError for what the installed DeepSpeed's own models do not take; imports DeepSpeed."""
    if problems := list(model_problems(config)):
        raise RecipeError(f"{path}:\n  " + "\n  ".join(problems))


def refuse_by_device(config: dict[str, Any], path: str | Path) -> None:
    """RecipeError for what this machine's device cannot do; imports DeepSpeed."""
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if precision_of(config) == "fp16" and not get_accelerator().is_fp16_supported():
        raise RecipeError(
            f"{path}:\n  'fp16.enabled' is true, which this {get_accelerator().device_name()} device cannot do: "
            "use ds_configs/zero2.json"
        )
    zero = config.get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device") == "nvme" and not AsyncIOBuilder().is_compatible():
            raise RecipeError(
                f"{path}:\n  'zero_optimization.{key}.device' is 'nvme', for which DeepSpeed compiles its async_io: "
                "install a C++ compiler and libaio with its headers (Debian and Ubuntu: libaio-dev)"
            )
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        if zero.get(key) and not torch.cuda.is_available():
            raise RecipeError(
                f"{path}:\n  'zero_optimization.{key}' needs a GPU (DeepSpeed's quantiser is a CUDA kernel): "
                "take it out on this machine"
            )


def model_problems(config: dict[str, Any]) -> Iterator[str]:
    """Values that DeepSpeed's own models refuse."""
    for path, (file, name) in MODELS.items():
        values = section(config, path)
        if "." in path or not isinstance(values, dict):  # an inner section is part of its outer one
            continue
        model = getattr(importlib.import_module(f"deepspeed.{file.removesuffix('.py').replace('/', '.')}"), name)
        try:
            model(**values)
        except ValidationError as error:
            for item in error.errors():
                where = ".".join(str(part) for part in (path, *item["loc"]))
                yield f"'{where}' is {item['input']!r}: {item['msg'].removeprefix('Assertion failed, ').removeprefix('Value error, ')}"


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
    settle_accumulation(merged, stage, accumulation)
    if (
        stage.optimizer.name != "adamw"
    ):  # DeepSpeed knows AdamW alone, and would have it compiled where states are in host memory
        merged |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    offloaded = merged.get("zero_optimization", {}).get("offload_optimizer", {})
    for key, usable in {"device": ("none", "cpu"), "ratio": (1,)}.items():
        if stage.optimizer.name == "muon" and offloaded.get(key, usable[0]) not in usable:
            raise RecipeError(
                f"stages.{stage.name}.optimizer.name is 'muon', whose matrices have to be in one memory, and the DeepSpeed config has "
                f"zero_optimization.offload_optimizer.{key} = {offloaded[key]!r}; accepted: {' or '.join(map(repr, usable))}"
            )
    if (merged.get("zero_optimization", {}).get("zero_hpz_partition_size") or 1) > 1:
        part = merged["zero_optimization"]["zero_hpz_partition_size"]
        if world_size % part:
            raise RecipeError(
                f"the DeepSpeed config has zero_optimization.zero_hpz_partition_size = {part}, which does not divide "
                f"{world_size} ranks: take the number of GPUs of a machine"
            )
    return merged


def settle_accumulation(merged: dict[str, Any], stage: StageConfig, accumulation: int) -> None:
    """Several bfloat16 micro-batches are summed in float32."""
    if accumulation == 1 or precision_of(merged) != "bf16":
        return
    if merged.get("zero_optimization", {}).get("stage", 0) == 0:
        raise RecipeError(
            f"stages.{stage.name}.micro_batch_size {stage.micro_batch_size} makes {accumulation} micro-batches a step, "
            "whose gradients DeepSpeed sums in bfloat16 without ZeRO: set zero_optimization.stage to 1, 2 or 3"
        )
    merged.setdefault("data_types", {})["grad_accum_dtype"] = "fp32"


def check_recipe(config: dict[str, Any], recipe: Recipe) -> None:
    """What is wrong with a config beside this recipe."""
    offloads = config.get("activation_checkpointing", {}).get("cpu_checkpointing")
    if offloads and not recipe.model.recompute_every:
        raise RecipeError(
            "the DeepSpeed config has activation_checkpointing.cpu_checkpointing = true, but the recipe's "
            f"model.recompute is {recipe.model.recompute}: set it to blocks, or to n (every n-th block)"
        )
