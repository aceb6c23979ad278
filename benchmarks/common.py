"""What the benchmarks share: the machine's name, timing, the result file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vlmo_ds.data.storage import write_atomically
from vlmo_ds.training.precision import cpu_flags, cpu_name

INSTRUCTIONS = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}  # what the speed of matrix products hangs on


def machine() -> dict[str, str | int]:
    if torch.cuda.is_available():
        name, instructions = torch.cuda.get_device_name(), ""
    else:
        name, instructions = cpu_name(), " ".join(sorted(INSTRUCTIONS & cpu_flags()))
    return {
        "device": name,
        "instructions": instructions,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(function: Callable[[], object], repeats: int, warmup: int) -> float:
    """Median seconds."""
    times = []
    for i in range(warmup + repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        if i >= warmup:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def matrix_rate(dtype: torch.dtype, device: torch.device, repeats: int = 20, warmup: int = 5) -> float:
    """FLOP/s of large matrix products of the shapes that the blocks use."""
    rows, d = (1536, 768) if device.type == "cpu" else (16384, 4096)
    a, b = torch.randn(rows, d, dtype=dtype, device=device), torch.randn(d, 4 * d, dtype=dtype, device=device)
    return 2 * rows * d * 4 * d / measured(lambda: a @ b, repeats, warmup)


def memory(reset: bool = False) -> int:
    """Bytes that this process has at most held since the last reset."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def versions_beside(script: str, settings: list[str], case: list[str], named: tuple[str, ...]) -> list[dict]:
    """What `script --one plain CASE` and `--one ours CASE` print, each in a process of its own, and the ratios of the two.

    named: the fields that say which case it is.
    """
    pair = {}
    for version in ("plain", "ours"):
        command = [sys.executable, script, *settings, "--one", version, *case]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        pair[version] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(pair[version]), flush=True)
    held = "peak_beyond_weights_and_gradients_gb"
    ratios = {
        **{name: pair["ours"][name] for name in named},
        "time, ours over plain": round(pair["ours"]["seconds"] / pair["plain"]["seconds"], 3),
        "memory, ours over plain": round(pair["ours"][held] / pair["plain"][held], 3),
    }
    print(json.dumps(ratios), flush=True)
    return [*pair.values(), ratios]


def write_results(path: Path, results: list[dict]) -> None:
    """The results with the machine and the command that made them."""
    script = Path(sys.argv[0])
    command = " ".join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])
    record = {"machine": machine(), "command": command, "results": results}
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
