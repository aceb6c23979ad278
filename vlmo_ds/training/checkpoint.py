"""Checkpoints within a stage: written by all ranks, readable by any number of ranks under any ZeRO stage.

checkpoints/<stage>/step-00000100/
    rank-00000.safetensors   what this rank had of each parameter: float32 weights and Adam's moments as
                             "<kind>/<first element>/<name>", their moving averages, frozen weights and buffers too
    state.json               stage, step, recipe, counters, schedule, loss scale, shapes
    manifest.json            size and CRC-32 of every file

DeepSpeed's own checkpoints are pickles tied to a number of ranks and a ZeRO stage; its conversion to universal ones is a
step by hand that leaves frozen parameters out (0.19.8). These need no conversion and hold no code.

    python -m vlmo_ds.training.checkpoint consolidate CHECKPOINT [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmo_ds.config import RecipeError
from vlmo_ds.data.storage import mode_of_umask
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.manifest import MANIFEST, crc32, fault_of, listed, write_manifest
from vlmo_ds.training.state import (
    NOTHING,
    Held,
    PartitionedLayout,
    aliases,
    averaged_parameters,
    fragments,
    layout_of,
    progress,
    refuse_moved,
    set_progress,
)
from vlmo_ds.training.weights import restore_replaced, sync, write_weights
from vlmo_ds.weights_file import RESULTS

STATE = "state.json"
AVERAGE = "average"  # kind of a moving average of a weight
PARTS = re.compile(r"rank-\d{5,}\.safetensors")
FORMAT = 1
DISK_ERRORS = (OSError, SafetensorError)
PAUSE = 5.0  # seconds before what could not be written is tried again


# ---- on disk ----


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints of a stage, oldest first."""
    found = folder.glob("step-*") if folder.is_dir() else []
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.name)), key=step_of)


def shared_fault(path: Path, collector: Collector) -> str:
    """fault_of with the contents of every file, read by all ranks together; the same on each."""
    found = collector.each_rank(fault_of(path, (collector.rank, collector.world_size)))
    return next(filter(None, found), "")


def latest_whole(folder: Path, collector: Collector) -> Path | None:
    """The newest checkpoint that is whole; tells of those that are not (every rank has to call)."""
    for path in reversed(collector.from_rank0(list_checkpoints(folder))):
        fault = shared_fault(path, collector)
        if not fault:
            return path
        if collector.rank == 0:
            print(f"warning: checkpoint {path} is damaged and left out: {fault}", file=sys.stderr, flush=True)
    return None


def on_disk(collector: Collector, action: Callable[[], None]) -> str:
    """Does something on rank 0; why it failed, on every rank, or ""."""
    return collector.attempt_on_rank0(action, *DISK_ERRORS)[1] or ""


def tried_again(collector: Collector, action: Callable[[], None], times: int, what: str) -> str:
    """on_disk, tried again so many times with pauses between; `what` begins the warning."""
    for left in range(times, -1, -1):
        problem = on_disk(collector, action)
        if not problem or not left:
            break
        if collector.rank == 0:
            print(
                f"warning: {what}: {problem}; tried again in {PAUSE:.0f} s, {left} times more",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(PAUSE)
    return problem


def clear_leftovers(folder: Path) -> None:
    """Makes a stage's folder, and removes from it what a killed process was writing; nothing that anybody else has put there."""
    folder.mkdir(parents=True, exist_ok=True)
    restore_replaced(folder)
    for leftover in folder.glob("*.tmp"):
        if re.fullmatch(rf"(step-\d+|{'|'.join(RESULTS)})\.tmp", leftover.name) and leftover.is_dir():
            shutil.rmtree(leftover)


def set_aside(path: Path, why: str) -> Path:
    """Gives a folder another name, under which nothing looks for it."""
    number = 1
    while (target := path.with_name(f"{path.name}.{why}-{number}")).exists():
        number += 1
    return path.rename(target)


# ---- writing ----


class CheckpointWriter:
    """Writes a stage's checkpoints; in the background, a step waits for the copy to host memory alone.

    Every rank calls start, then settle at the end of every step until nothing is pending. No rank ever waits for
    another's disk: `busy` goes along with the numbers that a step sums over ranks anyway.
    """

    def __init__(self, folder: Path, keep: int, background: bool, collector: Collector):
        self.folder, self.keep, self.background, self.collector = folder, keep, background, collector
        self.step: int | None = None  # of the checkpoint that is being written
        self.thread: threading.Thread | None = None
        self.problem, self.checksum = "", 0

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is begun and not published; the same on every rank."""
        return self.step is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self.thread is not None and self.thread.is_alive()

    @property
    def temporary(self) -> Path:
        return self.folder / f"step-{self.step:08d}.tmp"

    def start(
        self,
        engine: deepspeed.DeepSpeedEngine,
        step: int,
        frozen: Mapping[str, Tensor],
        about: Mapping[str, Any],
        averages: Mapping[str, Held] = NOTHING,
        moving_average: Mapping[str, Held] = NOTHING,
    ) -> str:
        """Copies the state and begins to write it. Returns why it cannot be written, the same on every rank, or "".

        frozen: copies of what does not move (frozen_state); Moved where it has. averages: as full_state's. moving_average: this
        rank's part of that of the trained weights.
        """
        refuse_moved(engine, frozen, self.collector)
        self.step = step
        problem = on_disk(self.collector, self.make_folder)
        if problem:
            self.step = None
            return problem
        tensors = snapshot(engine, frozen, averages, moving_average, self.collector)
        state = {"format": FORMAT, "step": step, **about, "aliases": aliases(engine.module), **progress(engine)}
        self.problem = ""
        self.thread = threading.Thread(target=self.write, args=(tensors, state))
        self.thread.start()
        return ""

    def make_folder(self) -> None:
        clear_leftovers(self.folder)
        self.temporary.mkdir()

    def write(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        file = self.temporary / f"rank-{self.collector.rank:05d}.safetensors"
        try:
            save_file(tensors, file)
            mode_of_umask(file)
            sync(file)
            self.checksum = crc32(file)
            if self.collector.rank == 0:
                (self.temporary / STATE).write_text(json.dumps(state))
                sync(self.temporary / STATE)
        except DISK_ERRORS as error:
            self.problem = str(error).splitlines()[0]

    def settle(self, ranks_busy: float) -> tuple[int, str] | None:
        """Publishes the pending checkpoint when no rank is busy: (its step, why it failed or "")."""
        if not self.pending or (self.background and ranks_busy):
            return None
        return self.finish()

    def finish(self) -> tuple[int, str] | None:
        """Waits for all ranks and publishes what is pending (every rank has to call)."""
        if self.step is None or self.thread is None:
            return None
        self.thread.join()
        outcomes = self.collector.each_rank((self.problem, self.checksum))
        failed = [f"{problem} (rank {rank})" for rank, (problem, _) in enumerate(outcomes) if problem]
        if failed:
            on_disk(self.collector, lambda: clear_leftovers(self.folder))
            problem = failed[0]
        else:
            checksums = {f"rank-{rank:05d}.safetensors": checksum for rank, (_, checksum) in enumerate(outcomes)}
            problem = on_disk(self.collector, lambda: self.publish(checksums))
        step, self.step, self.thread = self.step, None, None
        return step, problem

    def publish(self, checksums: dict[str, int]) -> None:
        temporary = self.temporary
        write_manifest(temporary, {**checksums, STATE: crc32(temporary / STATE)})
        target = temporary.with_suffix("")
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
        sync(self.folder)
        for old in list_checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)


class FailedCheckpoints:
    """Reports checkpoints that could not be written; more than `allowed` in a row end the run."""

    def __init__(self, allowed: int, folder: Path, tells: bool):
        self.allowed, self.folder, self.tells = allowed, folder, tells
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


def snapshot(
    engine: deepspeed.DeepSpeedEngine,
    frozen: Mapping[str, Tensor],
    averages: Mapping[str, Held],
    moving_average: Mapping[str, Held],
    collector: Collector,
) -> dict[str, Tensor]:
    """Copies in host memory of what this rank writes, arguments as CheckpointWriter.start's. What every rank has whole is dealt out to the ranks in turn."""
    tensors = {
        f"{kind}/{start}/{name}": value.detach().to("cpu", torch.float32, copy=True)
        for name, start, kinds in fragments(engine)
        for kind, value in kinds.items()
    }
    layout = layout_of(engine)
    moving = averaged_parameters(engine, frozen)
    parts = {n: averages[n] if n in averages else layout.live(p) for n, p in moving.items()}
    tensors |= {
        f"weight/{start}/{n}": part.to("cpu", torch.float32, copy=True)
        for n, (start, part) in parts.items()
        if part.numel() and (isinstance(layout, PartitionedLayout) or collector.rank == 0)
    }
    tensors |= {f"{AVERAGE}/{start}/{n}": part.to("cpu", copy=True) for n, (start, part) in moving_average.items()}
    everywhere = {**{f"weight/0/{n}": v for n, v in frozen.items()}, **buffer_entries(engine)}
    for number, (key, value) in enumerate(everywhere.items()):
        if number % collector.world_size == collector.rank:
            tensors[key] = value.detach().to("cpu", copy=True).flatten()
    return tensors


def buffer_entries(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    return {f"buffer/0/{name}": value for name, value in engine.module.named_buffers()}


# ---- reading ----


class Reader:
    """A published checkpoint, read by parts of parameters. Only tensors and JSON are read."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.state = json.loads((path / STATE).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise RecipeError(f"checkpoint {path} cannot be read: {STATE}: {error}") from None
        try:
            names = sorted(name for name in listed(path) if PARTS.fullmatch(name))
        except ValueError as error:
            raise RecipeError(f"checkpoint {path} cannot be read: {error}") from None
        if not isinstance(self.state, dict) or self.state.get("format") != FORMAT:
            found = self.state.get("format") if isinstance(self.state, dict) else self.state
            raise RecipeError(
                f"checkpoint {path} has format {found!r}, this version reads {FORMAT}: "
                "go on with the version that wrote it"
            )
        self.parts: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for name in names:  # not what else lies there
            try:
                data = safe_open(path / name, "pt")
            except DISK_ERRORS as error:
                raise RecipeError(f"checkpoint {path} cannot be read: {name}: {error}") from None
            for key in data.keys():  # noqa: SIM118 (not a dict)
                kind, start, name = key.split("/", 2)
                length = data.get_slice(key).get_shape()[0]
                self.parts.setdefault((kind, name), []).append((int(start), length, data, key))

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Elements start .. start+count-1 of a flattened parameter or of a moment of it."""
        out, found = None, 0
        for first, length, data, key in self.parts.get((kind, name), ()):
            begin, end = max(start, first), min(start + count, first + length)
            if begin < end:
                value = data.get_slice(key)[begin - first : end - first]
                out = value.new_empty(count) if out is None else out
                out[begin - start : end - start] = value
                found += end - begin
        if out is None or found != count:
            raise RecipeError(f"checkpoint {self.path} holds {found} of {count} elements of {kind} {name}")
        return out

    @property
    def has_average(self) -> bool:
        """Whether the stage had a moving average of its weights."""
        return any(kind == AVERAGE for kind, _ in self.parts)

    def weights(self, average: bool = False) -> dict[str, Tensor]:
        """The model's whole state dict: trained and frozen parameters under all of their names, and buffers. average: the moving average
        of the trained ones; RecipeError where there is none."""
        if average and not self.has_average:
            raise RecipeError(f"checkpoint {self.path} has no moving average of the weights: its stage has no ema")
        shapes = self.state["shapes"]
        whole = {}
        for kind, name in self.parts:
            if kind in ("weight", "buffer"):
                shape = torch.Size(shapes[name])
                of = AVERAGE if average and (AVERAGE, name) in self.parts else kind
                whole[name] = self.read(of, name, 0, shape.numel()).view(shape)
        return whole | {alias: whole[name].clone() for alias, name in self.state["aliases"].items()}


def about_run(stage: str, recipe: dict[str, Any], shapes: Mapping[str, torch.Size], engine) -> dict[str, Any]:
    """What a checkpoint tells of the run that wrote it. recipe: as JSON holds it."""
    return {
        "stage": stage,
        "recipe": recipe,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "world_size": engine.world_size,
        "precision": "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "float32",
        "zero_stage": int(engine.zero_optimization_stage()),
        "deepspeed": deepspeed.__version__,
        "torch": torch.__version__,
    }


def restore(engine: deepspeed.DeepSpeedEngine, reader: Reader) -> int:
    """Gives an engine, built on the checkpoint's weights, the rest of its state; returns the step to go on from."""
    layout = layout_of(engine)
    layout.create_moments(reader.state["optimizer_steps"])
    for name, parameter in layout.parameters.items():
        if span := layout.held(parameter):
            for kind in layout.moments(parameter):
                layout.set(parameter, kind, reader.read(kind, name, *span))
    set_progress(engine, reader.state)
    return int(reader.state["step"])


# ---- command line ----


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlmo_ds.training.checkpoint", description="Works on checkpoints.")
    commands = parser.add_subparsers(required=True)
    consolidate = commands.add_parser(
        "consolidate", help="one safetensors file of float32 weights with the official parameter names"
    )
    consolidate.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or a stage's (its newest whole one)")
    consolidate.add_argument("--output", type=Path, help="default: <checkpoint>.safetensors")
    consolidate.add_argument(
        "--weights", choices=("trained", "ema"), default="trained", help="ema: their moving average"
    )
    args = parser.parse_args(argv)
    path = args.checkpoint
    try:
        if not (path / MANIFEST).exists() and list_checkpoints(path):
            path = latest_whole(path, Collector()) or path
        if fault := fault_of(path, (0, 1)):
            raise RecipeError(
                f"{path} is no whole checkpoint: {fault}; accepted: runs/<name>/checkpoints/<stage>[/step-<n>]"
            )
        reader = Reader(path)
        output = args.output or path.with_suffix(".safetensors")
        weights = reader.weights(average=args.weights == "ema")
        write_weights(output, weights)
    except (RecipeError, *DISK_ERRORS) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = sum(value.numel() for value in weights.values())
    print(
        f"{output}: {len(weights)} tensors, {count / 1e6:.2f}M values, step {reader.state['step']} of {reader.state['stage']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
