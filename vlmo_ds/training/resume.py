"""What a run's directory holds already, and where a start goes on in it: settings, results, data, leftovers.

Called on rank 0, which holds the run's lock. Everything that cannot be gone on from is a RecipeError, before anything is
changed; nothing that a finished stage has left is shortened or overwritten.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmo_ds import ledger, metrics
from vlmo_ds.config import EVALUATIONS, Recipe, RecipeError, StageConfig
from vlmo_ds.data.loader import in_stream, source_shards
from vlmo_ds.data.shards import Shard
from vlmo_ds.data.storage import is_remote, write_atomically
from vlmo_ds.manifest import MANIFEST, fault_of
from vlmo_ds.recipe_file import changed_settings, parse_recipe, read_yaml
from vlmo_ds.training import checkpoint, mlflow_log
from vlmo_ds.training.command import Command
from vlmo_ds.weights_file import EMA, FINAL, STAGE

DATA = "data.json"
# What a run goes on with beside its checkpoints; its recipe first.
COPIED = (
    "recipe.yaml",
    "ds_config.json",
    metrics.FILE,
    metrics.SCORES,
    metrics.PACE,
    ledger.FILE,
    mlflow_log.FILE,
    "answers.json",
    DATA,
)
# Files at the top of a run's directory that write_atomically writes.
OWN_FILES = (
    *COPIED,
    "captions.json",
    "codes.png",
    *(f"{name}{of}.json" for name in EVALUATIONS for of in ("", f"_{EMA}")),
)
BLOCK, MOST_BLOCKS = (
    4096,
    4000,
)  # bytes read at a time to tell shards apart, and how many times over all shards of a source
SHOWN = 4


def stage_folder(run: Path, stage: StageConfig) -> Path:
    return run / "checkpoints" / stage.name


def is_finished(run: Path, stage: StageConfig) -> bool:
    return (stage_folder(run, stage) / FINAL).is_dir()


def is_begun(run: Path, stage: StageConfig) -> bool:
    return is_finished(run, stage) or bool(checkpoint.list_checkpoints(stage_folder(run, stage)))


# ---- settings ----


def check_resume(args: argparse.Namespace, recipe: Recipe, stages: Sequence[StageConfig], run: Path) -> None:
    """Whether the recipe is the one that the run, or the checkpoint that --resume names, began with."""
    begun = (run / "recipe.yaml").exists()
    if args.resume == "never" and begun:
        raise RecipeError(f"--resume never, but {run} holds a run already: choose another --output_dir")
    if args.resume not in ("auto", "never"):
        check_checkpoint(Path(args.resume), recipe, stages, run)
    if begun:
        try:
            old = read_yaml((run / "recipe.yaml").read_bytes(), f"{run}/recipe.yaml")
        except (OSError, RecipeError) as error:
            raise RecipeError(f"{run}/recipe.yaml cannot be read: choose another --output_dir ({error})") from None
        compare_recipes(recipe, old, f"{run} was begun with")


def check_checkpoint(path: Path, recipe: Recipe, stages: Sequence[StageConfig], run: Path) -> None:
    """A checkpoint that --resume names: whole, of this recipe, and not in the way of what is finished."""
    stage = next((stage for stage in stages if stage.name == path.parent.name), None)
    if stage is None or path not in checkpoint.list_checkpoints(path.parent):
        raise RecipeError(
            f"--resume: {path} is no checkpoint; accepted: auto, never, or {run}/checkpoints/<stage>/step-<number>"
        )
    if fault := fault_of(path):
        raise RecipeError(f"--resume: {path} is damaged: {fault}")
    compare_recipes(recipe, checkpoint.Reader(path).state["recipe"], f"{path} was written by")
    for later in recipe.stages[recipe.stages.index(stage) :]:
        if is_finished(run, later):
            raise RecipeError(
                f"--resume: {path}: stage '{later.name}' has finished in {run}, and its result would be overwritten: choose "
                "another --output_dir"
            )


def compare_recipes(recipe: Recipe, old: Any, whose: str) -> None:
    """A run goes on with the recipe it began with. old: as JSON or YAML holds it.

    Shards are compared by what they hold (`check_shards`), and a stage's steps may be raised.
    """
    try:
        earlier = parse_recipe(old, whose)
    except RecipeError as error:
        raise RecipeError(f"{whose} a recipe that cannot be read: choose another --output_dir ({error})") from None
    changed = [
        f"{key}: was {before!r}, is {now!r}"
        for key, (before, now) in changed_settings(earlier, recipe).items()
        if not longer(key, before, now)
    ]
    if changed:
        raise RecipeError(
            f"{whose} another recipe; choose another --output_dir or checkpoint, or undo:\n  "
            + "\n  ".join(changed[:12])
        )


def longer(key: str, before: Any, now: Any) -> bool:
    """Whether a stage's steps are raised."""
    parts = key.split(".")
    return parts[0] == "stages" and parts[-1] == "steps" and len(parts) == 3 and before is not None and now > before


# ---- results ----


def check_results(command: Command) -> None:
    """Looks at the results that this start builds on: a damaged one, or one of fewer steps than the recipe says now, is set
    aside, and its stage goes on from its last checkpoint."""
    recipe, stages, run = command.recipe, command.stages, command.folder
    for number, stage in enumerate(recipe.stages):
        later = [s for s in recipe.stages[number + 1 :] if is_begun(run, s)]
        final = stage_folder(run, stage) / FINAL
        if not is_finished(run, stage):
            continue
        if steps_of(final) not in (None, stage.steps):
            make_longer(stage, later, final)
        elif not later and (final / MANIFEST).exists() and (fault := fault_of(final, (0, 1))):
            make_again(stage, stage in stages, final, fault)
    resumed = Path(command.args.resume).parent.name  # of "auto" and "never" nothing
    for stage in stages:
        before = recipe.stages[: recipe.stages.index(stage)][-1:]
        if stage.init.weights != "previous" or not before or is_begun(run, stage) or resumed == stage.name:
            continue
        if not (is_finished(run, before[0]) or before[0] in stages):
            raise RecipeError(
                f"stage '{stage.name}' starts from stage '{before[0].name}', which has not finished in {run}: "
                f"add it to --stages, or set stages.{stage.name}.init.weights to 'fresh' or a file"
            )


def make_again(stage: StageConfig, chosen: bool, final: Path, fault: str) -> None:
    """Sets a damaged result aside, so that its stage goes on from its last checkpoint."""
    what = f"the result of stage '{stage.name}', {final}, is damaged: {fault}"
    if not chosen:
        raise RecipeError(f"{what}: add the stage to --stages, and it goes on from its last checkpoint")
    if not checkpoint.list_checkpoints(final.parent):
        raise RecipeError(f"{what}; it has no checkpoint to go on from: rename the folder to train the stage anew")
    aside = checkpoint.set_aside(final, "damaged")
    print(
        f"warning: {what}; it is {aside} now, and the stage goes on from its last checkpoint",
        file=sys.stderr,
        flush=True,
    )


def steps_of(final: Path) -> int | None:
    """Optimiser steps that a result was trained for, as far as it says."""
    try:
        return int(json.loads((final / STAGE).read_bytes())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_longer(stage: StageConfig, later: Sequence[StageConfig], final: Path) -> None:
    if later:
        raise RecipeError(
            f"stages.{stage.name}.steps is {stage.steps}, the stage has finished with {steps_of(final)}, and stage "
            f"'{later[0].name}' has begun from its result: choose another --output_dir"
        )
    if not checkpoint.list_checkpoints(final.parent):
        raise RecipeError(
            f"stages.{stage.name}.steps is {stage.steps}, the stage has finished with {steps_of(final)}, and there is no "
            f"checkpoint of it to go on from: start a stage from {final} instead (init.weights)"
        )
    aside = checkpoint.set_aside(final, f"after-{steps_of(final)}-steps")
    print(f"{stage.name}: goes on to {stage.steps} steps; its result so far is {aside} now", flush=True)


def set_newer_aside(path: Path) -> None:
    """Where --resume names a checkpoint, those after it belong to a course that is left."""
    for newer in checkpoint.list_checkpoints(path.parent):
        if checkpoint.step_of(newer) > checkpoint.step_of(path):
            aside = checkpoint.set_aside(newer, "left")
            print(f"{newer} is {aside} now: the run goes on from {path.name}", flush=True)


# ---- data ----


def check_shards(
    stages: Sequence[StageConfig], run: Path, accepted: Sequence[str]
) -> dict[str, dict[str, list[list[str]]]]:
    """Compares the shards of the stages that go on with those they began with, and notes those of the others.

    accepted: stages whose shards may have changed. Returns, by stage and stream, the names under which shards that have moved are
    known, by source; sample ids are made of them, so that everything random stays what it was.
    """
    file = run / DATA
    try:
        noted = json.loads(file.read_bytes()) if file.exists() else {}
        old = {
            name: {source: [list(map(str, row)) for row in rows] for source, rows in sources.items()}
            for name, sources in noted.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        raise RecipeError(f"{file} cannot be read: remove it if the shards are those that the run began with") from None
    new = dict(old)
    known: dict[str, dict[str, list[list[str]]]] = {}
    for stage in stages:
        if is_finished(run, stage):
            continue
        for stream, part in stage.parts.items():
            key = in_stream(stage.name, stream) if len(stage.parts) > 1 and stream else stage.name
            names = list(part.data.mixture)
            found = {name: rows_of(shards) for name, shards in zip(names, source_shards(part.data), strict=True)}
            before = old.get(key)
            if before is None or before == found or not is_begun(run, stage):
                new[key] = found
            elif changes := differences(before, found):
                if stage.name not in accepted:
                    raise RecipeError(
                        f"stages.{stage.name}.data: the shards are not those that the stage began with:\n  "
                        + "\n  ".join(changes)
                        + f"\n  undo that, choose another --output_dir, or go on with the new ones by --accept_data {stage.name}"
                    )
                print(f"{stage.name}: goes on with other shards:\n  " + "\n  ".join(changes), flush=True)
                new[key] = found
            else:  # the same contents under other names
                known.setdefault(stage.name, {})[stream] = [[row[0] for row in before[name]] for name in names]
    if new != old:
        write_atomically(file, json.dumps(new).encode())
    return known


def rows_of(shards: Sequence[Shard]) -> list[list[str]]:
    """[name, samples, bytes, digest] of each shard."""
    blocks = max(0, min(8, MOST_BLOCKS // len(shards)))
    return [[shard.name, str(shard.samples), str(shard.index.bytes), digest(shard, blocks)] for shard in shards]


def digest(shard: Shard, blocks: int) -> str:
    """Of a shard's index, and of so many blocks of its content where it is local."""
    index = shard.index
    value = hashlib.blake2b(f"{index.samples} {index.bytes} {index.offsets} {index.lengths}".encode(), digest_size=8)
    if not is_remote(shard.url) and blocks:
        with open(shard.url, "rb") as file:
            size = file.seek(0, 2)
            for number in range(blocks):
                file.seek(number * max(0, size - BLOCK) // max(1, blocks - 1))
                value.update(file.read(BLOCK))
    return value.hexdigest()


def differences(before: Mapping[str, list[list[str]]], now: Mapping[str, list[list[str]]]) -> list[str]:
    """What has changed in the contents or the order of shards, a line each; nothing if only their names have."""
    lines = []
    for source in sorted(before.keys() | now.keys()):
        old, new = before.get(source, []), now.get(source, [])
        if [row[1:] for row in old] == [row[1:] for row in new]:
            continue
        old_rows, new_rows = {row[0]: row[1:] for row in old}, {row[0]: row[1:] for row in new}
        rewritten = [name for name in old_rows.keys() & new_rows.keys() if old_rows[name] != new_rows[name]]
        what = {
            "added": [name for name in new_rows if name not in old_rows],
            "removed": [name for name in old_rows if name not in new_rows],
            "rewritten": sorted(rewritten),
        }
        told = [
            f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{', ...' if names[SHOWN:] else ''})"
            for kind, names in what.items()
            if names
        ]
        lines.append(f"source '{source}': " + ("; ".join(told) or "in another order"))
    return lines


# ---- leftovers ----


def clear_leftovers(run: Path, recipe: Recipe) -> None:
    """Removes what a killed start of this run was writing, and nothing else."""
    for name in OWN_FILES:
        for leftover in run.glob(f".{name}.*.tmp"):
            leftover.unlink(missing_ok=True)
    shutil.rmtree(run / "tokenizer.tmp", ignore_errors=True)
    for stage in recipe.stages:
        if stage_folder(run, stage).is_dir():
            checkpoint.clear_leftovers(stage_folder(run, stage))
