"""Weights and checkpoints: what is written, how a stage finds its way back, and the hand-over between stages.

checkpoints/<stage>/step-00000100/   DeepSpeed's checkpoint: weights, optimiser, schedule; renamed when it is whole
checkpoints/<stage>/final/           model.safetensors in float32 with official parameter names; the stage is done
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmo_ds.config import InitConfig, RecipeError
from vlmo_ds.data.storage import write_atomically
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.models.vlmo import VLMo
from vlmo_ds.training.optim import matches

WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"


# ---- weights ----


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a stage's folder, a .safetensors file, or a .pt file (tensors only; nested under the usual keys)."""
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise RecipeError(
            f"initial weights: {file} does not exist; accepted: a stage's final folder, a .safetensors or .pt file"
        )
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RecipeError(f"initial weights: {file} cannot be read as tensors ({str(error).splitlines()[0]})") from None
    for key in ("state_dict", "module", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise RecipeError(f"initial weights: {file} holds no state dict (names and tensors)")
    return {name.removeprefix("module."): value for name, value in found.items()}


def hand_over(model: VLMo, source: Mapping[str, Tensor], init: InitConfig, origin: str) -> dict[str, list[str]]:
    """Loads weights into a new stage's model. Every key on either side is accounted for.

    Returns what became of them: {"loaded", "fresh", "dropped"}. Raises RecipeError for a key that is missing,
    unexpected, or of another shape, unless `init` names it.
    """
    own = model.state_dict()
    fresh_patterns = list(init.fresh)
    if init.vl_experts != "keep":
        fresh_patterns += ["transformer.blocks.*.mlp_vl.*", "transformer.blocks.*.norm2_vl.*"]
    loaded = [k for k in own if k in source and not matches(k, fresh_patterns)]
    fresh = [k for k in own if matches(k, fresh_patterns)]
    dropped = [k for k in source if k not in own and matches(k, [*init.drop, *fresh_patterns])]
    missing = [k for k in own if k not in source and k not in fresh]
    unexpected = [k for k in source if k not in own and k not in dropped]
    shapes = [k for k in loaded if own[k].shape != source[k].shape]
    problems = []
    if shapes:
        k = shapes[0]
        problems.append(
            f"{len(shapes)} of another shape: {k} is {list(source[k].shape)} there and {list(own[k].shape)} in this model "
            "(a checkpoint of another architecture, image size or vocabulary)"
        )
    if missing:
        problems.append(f"{len(missing)} missing there: {brief(missing)} (name them in init.fresh to start them fresh)")
    if unexpected:
        problems.append(
            f"{len(unexpected)} that this stage does not have: {brief(unexpected)} (name them in init.drop to leave them)"
        )
    for pattern in init.fresh:
        if not any(matches(k, [pattern]) for k in own):
            problems.append(f"init.fresh: '{pattern}' fits no weight of this model")
    if problems:
        raise RecipeError(f"weights from {origin} do not fit:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for k in loaded:
            own[k].copy_(source[k])
    if init.vl_experts in ("text", "image"):
        model.init_vl_experts({"text": "text", "image": "imag"}[init.vl_experts])
    return {"loaded": loaded, "fresh": fresh, "dropped": dropped}


def brief(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def full_state(
    engine: deepspeed.DeepSpeedEngine, frozen: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """The model's float32 state dict, gathered from all ranks (every rank has to call; the result is rank 0's).

    frozen: float32 copies of what the stage does not train, so that half precision never reaches them.
    shapes: the parameters' shapes before the engine took them.
    """
    state = {}
    for name, parameter in engine.module.named_parameters():
        if name in frozen:
            state[name] = frozen[name]
            continue
        value = safe_get_full_fp32_param(parameter)
        value = parameter if value is None else value
        if engine.global_rank == 0:
            state[name] = value.detach().float().cpu().reshape(shapes[name]).clone()
    state |= {name: buffer.detach().cpu().clone() for name, buffer in engine.module.named_buffers()}
    return state


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().float().cpu().clone() for n, p in model.named_parameters() if not p.requires_grad}


def write_final(folder: Path, state: Mapping[str, Tensor], meta: Mapping[str, object]) -> None:
    """Publishes a stage's result in one rename (rank 0)."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(dict(state), temporary / WEIGHTS, metadata={"format": "pt"})
    (temporary / "stage.json").write_text(json.dumps(meta, indent=1))
    temporary.replace(folder)


# ---- DeepSpeed checkpoints ----


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints of a stage, oldest first."""
    found = folder.glob("step-*") if folder.is_dir() else []
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.name)), key=step_of)


def fault_of(path: Path) -> str:
    """What is wrong with a published checkpoint, by its manifest of files and sizes; "" if it is whole."""
    try:
        sizes = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            return f"{name} has {found} bytes, {size} were written" if found is not None else f"{name} is missing"
    return ""


def latest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; tells of those that are not."""
    for path in reversed(list_checkpoints(folder)):
        fault = fault_of(path)
        if not fault:
            return path
        print(f"warning: checkpoint {path} is damaged and left out: {fault}", file=sys.stderr, flush=True)
    return None


def save(engine: deepspeed.DeepSpeedEngine, folder: Path, step: int, keep: int, collector: Collector) -> str:
    """Writes a checkpoint on all ranks, gives it its name when it is whole, and removes old ones.

    Returns why it could not be written (a full disk, say; the same on every rank), or "". Then the ones before stay.
    """
    name = f"step-{step:08d}"
    temporary = folder / f"{name}.tmp"
    problem = on_disk(collector, lambda: clear_leftovers(folder))
    if problem:
        return problem
    with recorded_failures(engine) as failures:
        engine.save_checkpoint(str(folder), tag=temporary.name, client_state={"step": step}, save_latest=False)
    found = [(rank, text) for rank, text in enumerate(collector.each_rank(failures[0] if failures else "")) if text]
    if found:
        on_disk(collector, lambda: clear_leftovers(folder))
        return f"{found[0][1]} (rank {found[0][0]})"
    return on_disk(collector, lambda: publish(temporary, folder / name, keep))


def on_disk(collector: Collector, action: Callable[[], None]) -> str:
    """Does something on rank 0; why it failed, on every rank, or ""."""
    return collector.attempt_on_rank0(action, OSError)[1] or ""


def clear_leftovers(folder: Path) -> None:
    """Makes the folder, and removes from all of it what a killed process was writing."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(folder.rglob("*.tmp")):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def recorded_failures(engine: deepspeed.DeepSpeedEngine) -> Iterator[list[str]]:
    """Collects what goes wrong while DeepSpeed writes files, so that no rank leaves the others waiting in a barrier."""
    failures: list[str] = []
    writer = engine.checkpoint_engine

    def guarded(action: Callable) -> Callable:
        def call(*args, **kwargs):
            try:
                return action(*args, **kwargs)
            except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
                failures.append(str(error).splitlines()[0])

        return call

    writes = ((writer, "save"), (writer, "makedirs"), (engine, "_copy_recovery_script"))
    for owner, name in writes:
        setattr(owner, name, guarded(getattr(owner, name)))
    try:
        yield failures
    finally:
        for owner, name in writes:
            delattr(owner, name)  # the class's own is found again


def publish(temporary: Path, target: Path, keep: int) -> None:
    sizes = {str(p.relative_to(temporary)): p.stat().st_size for p in sorted(temporary.rglob("*")) if p.is_file()}
    write_atomically(temporary / MANIFEST, json.dumps({"files": sizes}, indent=1).encode())
    if target.exists():
        shutil.rmtree(target)
    temporary.replace(target)
    for old in list_checkpoints(target.parent)[:-keep]:
        shutil.rmtree(old)


def load(engine: deepspeed.DeepSpeedEngine, path: Path) -> int:
    """Restores weights, optimiser and schedule; returns the step to go on from."""
    loaded, client = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise RecipeError(f"checkpoint {path} cannot be loaded: it is not a whole DeepSpeed checkpoint")
    return int(client["step"])
