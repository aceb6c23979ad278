"""What the installed DeepSpeed accepts in each section of its config, read from its source.

Importing DeepSpeed takes seconds and PyTorch; its models' classes say the same as text. Sections that it reads without a
model of their own are listed here.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from vlmo_ds.config import nearest

# Section -> (file, class) of DeepSpeed that it is validated by.
MODELS = {
    "bf16": ("runtime/precision_config.py", "DeepSpeedBF16Config"),
    "fp16": ("runtime/precision_config.py", "DeepSpeedFP16Config"),
    "zero_optimization": ("runtime/zero/config.py", "DeepSpeedZeroConfig"),
    "zero_optimization.offload_optimizer": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
    "zero_optimization.offload_param": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
    "zero_optimization.zenflow": ("runtime/zenflow/zenflow_config.py", "ZenFlowConfig"),
    "zero_optimization.leaf_module": ("runtime/zero/leaf_module_config.py", "DeepSpeedZeroLeafModuleConfig"),
    "comms_logger": ("comm/config.py", "CommsLoggerConfig"),
    "tensorboard": ("monitor/config.py", "TensorBoardConfig"),
    "wandb": ("monitor/config.py", "WandbConfig"),
    "csv_monitor": ("monitor/config.py", "CSVConfig"),
}
# Sections without a model -> setting -> kind; DeepSpeed 0.19 ignores what it does not know in them.
PLAIN: dict[str, dict[str, str]] = {
    "": {
        "dump_state": "bool",
        "gradient_predivide_factor": "float",
        "memory_breakdown": "bool",
        "prescale_gradients": "bool",
        "steps_per_print": "int",
        "wall_clock_breakdown": "bool",
        "zero_allow_untested_optimizer": "bool",
        "zero_force_ds_cpu_optimizer": "bool",
    },
    "activation_checkpointing": {
        "partition_activations": "bool",
        "contiguous_memory_optimization": "bool",
        "cpu_checkpointing": "bool",
        "number_checkpoints": "int",
        "synchronize_checkpoint_boundary": "bool",
        "profile": "bool",
    },
    "aio": {
        "block_size": "int",
        "queue_depth": "int",
        "intra_op_parallelism": "int",
        "thread_count": "int",
        "single_submit": "bool",
        "overlap_events": "bool",
        "use_gds": "bool",
    },
    "data_types": {"grad_accum_dtype": "str"},
    "flops_profiler": {
        "enabled": "bool",
        "recompute_fwd_factor": "float",
        "profile_step": "int",
        "module_depth": "int",
        "top_modules": "int",
        "detailed": "bool",
        "output_file": "str",
    },
    "mlflow": {
        "enabled": "bool",
        "tracking_uri": "str",
        "experiment_name": "str",
        "run_name": "str",
    },  # training.mlflow_log
    "optimizer": {"type": "str", "params": "dict"},
}
KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "list": (list,),
    "dict": (dict,),
}
WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text in quotes",
    "list": "a list",
    "dict": "settings in braces",
}


@cache
def folder() -> Path | None:
    """Where DeepSpeed is installed; nothing where it is not."""
    found = importlib.util.find_spec("deepspeed")
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


@cache
def parsed(file: str) -> ast.Module | None:
    installed = folder()
    try:
        return ast.parse((installed / file).read_text()) if installed else None
    except (OSError, SyntaxError):
        return None  # another DeepSpeed: its own check comes with the import


@cache
def settings_of(section: str) -> dict[str, str] | None:
    """Setting -> kind ("bool", ..., "" if it is something else) of a section; None where that cannot be told.

    A setting of DeepSpeed with an alias is there under both names.
    """
    if section in PLAIN:
        return PLAIN[section]
    file, name = MODELS[section]
    tree = parsed(file)
    found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None) if tree else None
    if found is None:
        return None
    settings: dict[str, str] = {}
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind = ast.unparse(node.annotation).removeprefix("Optional[").removesuffix("]")
            kind = kind if kind in KINDS else ""
            settings[node.target.id] = kind
            for keyword in node.value.keywords if isinstance(node.value, ast.Call) else ():
                alias = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg == "alias" and isinstance(alias, str):
                    settings[alias] = kind
    return settings


def removed(name: str) -> set[str]:
    """Keys that the installed DeepSpeed refuses by name, from one of its tables."""
    for node in tree.body if (tree := parsed("runtime/config.py")) else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and ast.unparse(node.targets[0]) == name:
            keys = (key.value for key in node.value.keys if isinstance(key, ast.Constant))
            return {key for key in keys if isinstance(key, str)}
    return set()


def section_problems(config: dict[str, Any]) -> Iterator[str]:
    """Unknown settings and values of the wrong kind in every section; sections are dictionaries where they are there."""
    for path in (*PLAIN, *MODELS):
        values: Any = config
        for part in path.split(".") if path else ():
            values = values.get(part) if isinstance(values, dict) else None
        settings = settings_of(path)
        if not isinstance(values, dict) or settings is None:
            continue
        for key, value in values.items():
            where = f"{path}.{key}" if path else key
            if path and key not in settings:
                yield f"'{where}' is not known{nearest(key, settings)}; accepted in '{path}': {', '.join(sorted(settings))}"
            elif key in settings and not fits(value, settings[key]):
                yield f"'{where}' is {value!r}, expected {WORDS[settings[key]]}"


def fits(value: Any, kind: str) -> bool:
    """Whether a value of JSON is of a kind; whole numbers may be written as 5e8, and null means the default."""
    if not kind or value is None or value == "auto":
        return True
    if kind in ("int", "float") and (
        isinstance(value, bool) or value in (float("inf"), float("-inf")) or value != value
    ):
        return False
    if kind == "int" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, KINDS[kind])
