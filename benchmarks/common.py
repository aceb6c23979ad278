"""What the benchmarks share: the machine's name, timing, the result file."""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vlmo_ds.blocks.branch import compile_branches
from vlmo_ds.data.storage import write_atomically
from vlmo_ds.families.comparing import relative_difference
from vlmo_ds.training.host import freed_memory_returned, prepare_cpu
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


def times_of(function: Callable[[], object], repeats: int, warmup: int) -> list[float]:
    """Seconds, the fastest first."""
    times = []
    for i in range(warmup + repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        if i >= warmup:
            times.append(time.perf_counter() - start)
    return sorted(times)


def measured(function: Callable[[], object], repeats: int, warmup: int) -> float:
    """Median seconds."""
    return times_of(function, repeats, warmup)[repeats // 2]


def matrix_rate(dtype: torch.dtype, device: torch.device, repeats: int = 20, warmup: int = 5) -> float:
    """FLOP/s of large matrix products of the shapes that the blocks use, at best: what else a machine does cannot make a step look faster."""
    rows, d = (1536, 768) if device.type == "cpu" else (16384, 4096)
    a, b = torch.randn(rows, d, dtype=dtype, device=device), torch.randn(d, 4 * d, dtype=dtype, device=device)
    return 2 * rows * d * 4 * d / times_of(lambda: a @ b, repeats, warmup)[0]


def memory(reset: bool = False) -> int:
    """Bytes that this process has at most held since the last reset."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not count, nor is it there to be used
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


PARTS = {  # part of a step -> beginnings of the operations' names, on a GPU parts of its kernels' names
    "matrix products": (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "linear",
        "mkldnn_convolution",
        "convolution",
        "gemm",
        "cutlass",
        "nvjet",
    ),
    "attention and softmax": (
        "_scaled_dot",
        "_flash",
        "_efficient",
        "_softmax",
        "_log_softmax",
        "softmax",
        "flash",
        "fmha",
    ),
    "norms": ("native_layer_norm", "layer_norm"),
    "GELU": ("gelu",),
    "copies": (
        "copy_",
        "cat",
        "index",
        "fill_",
        "zero_",
        "clone",
        "_index_put",
        "gather",
        "masked",
        "Cat",
        "Memcpy",
        "Memset",
        "fill",
    ),
}


def part_of(operation: str, kernel: bool) -> str:
    name = operation.removeprefix("aten::")
    fits = name.__contains__ if kernel else name.startswith
    return next((part for part, names in PARTS.items() if any(map(fits, names))), "the rest")


def profiled(function: Callable[[], object]) -> tuple[int, dict[str, float]]:
    """(bytes of tensors that are at most alive at a time beyond those that were before: what a CPU needs without the C library's waste;
    share of the time of each of PARTS)."""
    on_gpu = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * on_gpu]
    before = memory(reset=True)
    with torch.profiler.profile(activities=kinds, profile_memory=True) as found:
        function()
        synchronize()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    alive = memory() - before if on_gpu else max(itertools.accumulate(event.nbytes() for event in events))
    times = dict.fromkeys((*PARTS, "the rest"), 0.0)
    for event in found.key_averages():
        kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if kernel == on_gpu:
            times[part_of(event.key, kernel)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return alive, {part: round(time / sum(times.values()), 3) for part, time in times.items()}


COCO_LENGTHS = (11, 12, 13, 13, 14, 15, 16, 18)  # eighths of COCO's captions in word pieces, start and end included
PARITY = 1e-9  # relative, float64: what a plain version may differ by
HELD = "peak_beyond_weights_and_gradients_gb"
LIVE = "peak_of_live_tensors_gb"  # also beyond those


def step_cost(model: nn.Module, batch: dict, short: dict, repeats: int, flops: float) -> dict:
    """Seconds and memory of forward and backward, with gradients in place from the start. short: a smaller batch, by which threads and
    kernels are there before memory is counted; flops: useful ones of the step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device, dtype, pairs = trained[0].device, trained[0].dtype, len(batch["text_ids"])
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        model(short)
    before = memory(reset=True)
    model(batch).loss.backward()
    peak = memory() - before

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(batch).loss.backward()

    alive, parts = profiled(step)
    times = times_of(step, repeats, 1 if device.type == "cpu" else 5)
    seconds = times[len(times) // 2]
    return {
        "seconds": round(seconds, 3),
        "fastest and slowest": [round(times[0], 3), round(times[-1], 3)],
        "pairs_per_second": round(pairs / seconds, 2),
        HELD: round(peak / 1e9, 3),
        LIVE: round(alive / 1e9, 3),
        "share_of_matrix_product_rate": round(flops / seconds / matrix_rate(dtype, device), 3),
        "parts": parts,
    }


class Step(NamedTuple):
    """What one version of a step is timed on. short: as of step_cost; flops: useful ones of a pair, forward
    and backward; record: what is told beside."""

    model: nn.Module
    batch: dict
    short: dict
    flops: float
    record: dict[str, Any]


def lengths_of(pairs: int, longest: int, captions: str, lengths: Sequence[int] = COCO_LENGTHS) -> list[int]:
    """Of so many texts. captions: "full" for the longest, or "COCO" for these lengths in turn."""
    return [longest if captions == "full" else lengths[i % len(lengths)] for i in range(pairs)]


def computed_by(model: nn.Module, kind: type[nn.Module], plain: type[nn.Module]) -> None:
    """Modules of a kind compute as a subclass of it does, which has the same parameters."""
    for module in model.modules():
        if isinstance(module, kind):
            module.__class__ = plain


def difference(
    plain: nn.Module, ours: nn.Module, batch: dict[str, torch.Tensor], rounding: str | tuple[str, ...] = "-"
) -> float:
    """The largest relative difference of loss and gradients of two versions of a model, in float64, with the first one's weights.
    rounding: end or ends of the names of parameters whose gradient is nothing else."""
    ours = ours.double().train(plain.training)
    ours.load_state_dict(plain.state_dict())
    losses = [model(batch).loss for model in (plain, ours)]
    for loss in losses:
        loss.backward()
    worst = relative_difference(losses[1], losses[0])
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if (one.grad is None) != (other.grad is None):
            sys.exit(f"error: {name} has no gradient in one of the versions")
        if one.grad is not None and not name.endswith(rounding):
            worst = max(worst, relative_difference(one.grad, other.grad))
    return worst


def pairs_of(config: Any, lengths: Sequence[int], words: int, device: torch.device) -> dict[str, torch.Tensor]:
    """image uint8, text_ids and text_masks of texts so long, whose words are below `words`."""
    g, size = torch.Generator().manual_seed(0), config.image_size
    masks = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    batch = {
        "image": torch.randint(0, 256, (len(lengths), 3, size, size), generator=g).to(torch.uint8),
        "text_ids": torch.randint(1, words, masks.shape, generator=g) * masks,
        "text_masks": masks,
    }
    return {name: value.to(device) for name, value in batch.items()}


def of_model(settings: dict) -> dict[str, Any]:
    """The model's settings among those of a benchmark."""
    return {name: settings[name] for name in ("arch", "image_size", "recompute") if name in settings}


def one_step(settings: dict, version: str, dtype: str, captions: str, build: Callable[..., Step]) -> dict:
    """What one version costs, in this process. settings: arch, batch, repeats, and what else build takes; memory: kept or returned, on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kept = settings.get("memory", "kept") == "kept"
    if device.type == "cpu" and kept:
        prepare_cpu()
    with freed_memory_returned() if kept else nullcontext():  # as in training, where it is kept from then on
        step = build(settings, version, getattr(torch, dtype), captions, device)
    if settings.get("compile") == "blocks":
        compile_branches(step.model)
    return {
        "version": version,
        **{name: value for name, value in settings.items() if name != "repeats"},
        "dtype": dtype,
        "captions": "full" if captions == "full" else "COCO's lengths",
        **step.record,
        **step_cost(step.model, step.batch, step.short, settings["repeats"], step.flops * settings["batch"]),
    }


def compare_with_plain(
    about: str,
    script: str,
    settings: dict[str, str | int],
    check_parity: Callable[[Path | None], float],
    build: Callable[[dict, str, torch.dtype, str, torch.device], Step],
) -> None:
    """The command line of a benchmark that sets a step beside a plain version of it, each in a process of its own.

    settings: further options with their defaults; check_parity(golden): the largest difference of the versions; build(settings,
    version, dtype, captions, device): the step of one version, "plain" or "ours", with captions as of lengths_of.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in settings.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--rounds", type=int, default=2, help="how often the versions take turns; the faster run of each counts"
    )
    parser.add_argument("--golden", type=Path, help="recorded numbers that the plain version has to reach")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--one", nargs=3, metavar=("VERSION", "DTYPE", "LENGTHS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    chosen = {name: getattr(args, name) for name in (*settings, "repeats")}
    if args.one:
        print(json.dumps(one_step(chosen, *args.one, build)))
        return
    worst = check_parity(args.golden)
    print(f"the two versions differ by at most {worst:.1e} in losses and gradients (float64)", flush=True)
    results: list[dict] = [{"largest difference of the versions, float64": worst}]
    options = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    for dtype, lengths in itertools.product(args.dtype, ("COCO", "full")):
        pair: dict[str, dict] = {}
        for version in ("plain", "ours") * args.rounds:
            command = [sys.executable, script, *options, "--one", version, dtype, lengths]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps(found), flush=True)
            if version not in pair or found["seconds"] < pair[version]["seconds"]:
                pair[version] = found
        ours, plain = pair["ours"], pair["plain"]
        ratios = {
            "dtype": dtype,
            "captions": ours["captions"],
            "time, ours over plain": round(ours["seconds"] / plain["seconds"], 3),
            "memory, ours over plain": round(ours[HELD] / plain[HELD], 3),
            "live tensors, ours over plain": round(ours[LIVE] / plain[LIVE], 3),
        }
        print(json.dumps(ratios), flush=True)
        results += [plain, ours, ratios]
    if args.output:
        write_results(args.output, results)


def write_results(path: Path, results: list[dict]) -> None:
    """The results with the machine and the command that made them."""
    script = Path(sys.argv[0])
    command = " ".join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])
    record = {"machine": machine(), "command": command, "results": results}
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
