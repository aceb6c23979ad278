"""The precision of a run: what "auto" in the DeepSpeed config means on the devices of all ranks."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator

from vlmo_ds.config import RecipeError
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.training.ds_config import PRECISIONS, precision_of, with_precision

NATIVE_ON_CPU = (
    "avx512_bf16",
    "amx_bf16",
)  # bf16 matrix products elsewhere are emulated, 100 times slower than float32
SLOW = "ten times slower than float32, or more"  # on a CPU of AVX2: benchmarks/results/precision_epyc_zen3_2core.json


class Native(NamedTuple):
    """What a rank's device computes natively: the one of PRECISIONS to take for it, and why."""

    precision: str
    reason: str
    kind: str


def cpu_flags() -> set[str]:
    """What this CPU says of itself; nothing elsewhere than on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def native() -> Native:
    """Of this rank's device: bf16 on GPUs from compute capability 8.0 on and CPUs with avx512_bf16 or amx_bf16, fp16 on
    other GPUs, float32 on other CPUs."""
    kind = get_accelerator().device_name()
    if kind == "cpu":
        found = sorted(cpu_flags() & set(NATIVE_ON_CPU))
        if found:
            return Native("bf16", f"{cpu_name()} has {' and '.join(found)}", kind)
        return Native("float32", f"{cpu_name()} has neither {' nor '.join(NATIVE_ON_CPU)}", kind)
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}"
        return Native("bf16", name, kind) if major >= 8 else Native("fp16", f"{name}, bf16 begins at 8.0", kind)
    can = get_accelerator().is_bf16_supported()
    return Native("bf16" if can else "float32", f"DeepSpeed's {kind} accelerator says so", kind)


def all_can(every: Sequence[Native]) -> Native:
    """What all ranks can do natively, and the reason of the first rank that decides it."""
    if len({one.kind for one in every}) > 1:
        kinds = ", ".join(sorted({one.kind for one in every}))
        return Native("float32", f"the ranks are on devices of several kinds ({kinds})", kinds)
    weakest = max(every, key=lambda one: PRECISIONS.index(one.precision))
    rank = every.index(weakest)
    return weakest._replace(reason=weakest.reason if len(set(every)) == 1 else f"rank {rank}'s {weakest.reason}")


def begun_in(folder: Path) -> str | None:
    """The precision in which the run in this folder began; None for a new one."""
    try:
        stages = json.loads((folder / "ds_config.json").read_text()).values()
        found = {precision_of(stage) for stage in stages}
    except (OSError, ValueError, AttributeError):
        return None
    return found.pop() if len(found) == 1 and found <= set(PRECISIONS) else None


def settle(config: dict[str, Any], begun: str | None, collector: Collector) -> tuple[dict[str, Any], str]:
    """(the config with its precision settled, one line that says which and why), the same on every rank.

    A run goes on in the precision it began with (begun), unless the config names one. RecipeError where it cannot.
    """
    wanted = precision_of(config)
    device = all_can(collector.each_rank(native()))
    chosen = wanted if wanted != "auto" else begun or device.precision
    if chosen == "fp16" and device.kind == "cpu":
        raise RecipeError(
            "the run began in fp16, which a CPU cannot train in: go on on a GPU, or name a precision in the DeepSpeed config "
            '("bf16": {"enabled": false} for float32)'
        )
    if wanted != "auto":
        line = f"precision: {chosen}, as the DeepSpeed config says"
        if begun not in (None, chosen):
            line += f" (the run began in {begun})"
    elif begun is None:
        line = f"precision: {chosen} (auto: {device.reason})"
    else:
        line = f"precision: {chosen}, in which the run began"
        if chosen != device.precision:
            line += f" (a new one would take {device.precision}: {device.reason})"
    if chosen == "bf16" and device.kind == "cpu" and device.precision == "float32":
        line = f'warning: {line}: {SLOW}, here, as {device.reason}; "bf16": {{"enabled": "auto"}} takes float32'
    return with_precision(config, chosen), line
