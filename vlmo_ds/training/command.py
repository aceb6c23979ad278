"""The command line of a run, and everything that can be checked of it before PyTorch is imported: a mistake is told in a second."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmo_ds.config import EVALUATIONS, Recipe, RecipeError, StageConfig, nearest, number
from vlmo_ds.data.storage import DataError, expand
from vlmo_ds.recipe_file import QUICKSTART, load_recipe
from vlmo_ds.training.ds_config import check_recipe, merge, read_config
from vlmo_ds.training.exit_status import UNUSABLE

ABOUT = "Pretrains a vision-language mixture-of-modality-experts transformer in stages under DeepSpeed."
DS_CONFIG = "ds_configs/zero2.json"
SETTINGS = """\
Start it with deepspeed, torchrun, srun or plain python. Options and settings may come in any order.

Settings are those of the recipe, key=value, such as stages.joint.steps=100. Their groups:
  model.*                      architecture: sizes, positions, dropout, recomputation
  tokenizer.*                  where word pieces come from
  stages.<name>.*              a stage: tasks, trainable, global_batch_size, micro_batch_size, steps, checkpoint_every, ...
  stages.<name>.data.*         shards or a mixture of them, augmentation, masking, order, loader processes
  stages.<name>.optimizer.*    learning rate and AdamW's settings
  stages.<name>.schedule.*     warm-up and decay
  stages.<name>.init.*         initial weights
  stages.<name>.ema.*          a moving average of the weights
  stages.<name>.evaluate.*     what is measured every evaluate_every steps, the best weights, an early end
  retrieval.*, vqa.*, nlvr2.*, captioning.*, zero_shot.*, classification.*  what is evaluated after the last stage
  loss_spike.*                 a guard against jumps of the loss
  name, seed, keep_checkpoints, background_checkpoints, checkpoint_failures, max_nonfinite_steps, check_ranks, check_bits
`vlmo recipe --explain` lists every setting with its type, default and meaning (from a clone: python -m vlmo_ds recipe --explain).
"""
LAUNCHERS = {  # what they call a rank, its number on its machine, and how many there are
    "srun": {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"},
    "mpirun": {
        "RANK": "OMPI_COMM_WORLD_RANK",
        "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
        "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    },
}


@dataclass
class Command:
    """A command line whose recipe and DeepSpeed config fit each other and the number of ranks."""

    args: argparse.Namespace
    recipe: Recipe
    ds_config: dict[str, Any]
    stages: list[StageConfig]

    @property
    def folder(self) -> Path:
        """The run's directory."""
        return self.args.output_dir or Path("runs") / self.recipe.name


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_ds.py", description=ABOUT, epilog=SETTINGS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--deepspeed_config", default=DS_CONFIG, metavar="FILE", help="how the run is spread (default: %(default)s)"
    )
    parser.add_argument(
        "--recipe",
        default=QUICKSTART,
        metavar="FILE",
        help="what is trained: a file, or the name of one in launch/recipes (default: %(default)s)",
    )
    parser.add_argument("--stages", metavar="A,B", help="only these stages, separated by commas (default: all)")
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="the run's directory (default: runs/<name of the recipe>)"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|CHECKPOINT",
        help="auto (continue if there is something), never, or a checkpoint folder",
    )
    parser.add_argument(
        "--timeout",
        type=number(float),
        default=600,
        metavar="SECONDS",
        help="a rank that takes longer to join, to read a batch or to make a step ends the run (default: %(default)s)",
    )
    parser.add_argument(
        "--accept_data",
        type=lambda text: text.split(","),
        metavar="A,B",
        help="stages that go on although their shards have changed since they began",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe to change")
    return parser.parse_intermixed_args(argv)


def name_ranks() -> None:
    """Gives the ranks that srun and mpirun have started the names that torchrun and deepspeed use.

    Raises RecipeError if nobody says where rank 0 is.
    """
    for prefix, names in LAUNCHERS.items():
        if "RANK" in os.environ or int(os.environ.get(names["WORLD_SIZE"], "1")) == 1:
            continue
        if "MASTER_ADDR" not in os.environ:
            raise RecipeError(
                f"{prefix} has started several ranks, but MASTER_ADDR, the address of rank 0's machine, is not set"
            )
        os.environ.update({name: os.environ[source] for name, source in names.items()})
        os.environ.setdefault("MASTER_PORT", "29500")


def chosen_stages(recipe: Recipe, names: str | None) -> list[StageConfig]:
    if names is None:
        return recipe.stages
    known = [stage.name for stage in recipe.stages]
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise RecipeError(
                f"--stages: the recipe has no stage '{name}'{nearest(name, known)}; accepted: {', '.join(known)}"
            )
    return [stage for stage in recipe.stages if stage.name in wanted]


def check(args: argparse.Namespace) -> Command:
    """RecipeError for what is wrong with recipe, DeepSpeed config and the two together on this many ranks."""
    recipe = load_recipe(args.recipe, args.overrides)
    ds_config = read_config(args.deepspeed_config)
    check_recipe(ds_config, recipe)
    stages = chosen_stages(recipe, args.stages)
    for stage in stages:
        merge(ds_config, stage, int(os.environ.get("WORLD_SIZE", "1")))
        for file in stage.init.files:
            if not Path(file).exists():
                raise RecipeError(f"stages.{stage.name}.init.weights: {file} does not exist")
    for name in args.accept_data or ():
        if name not in [stage.name for stage in recipe.stages]:
            known = [stage.name for stage in recipe.stages]
            raise RecipeError(
                f"--accept_data: the recipe has no stage '{name}'{nearest(name, known)}; accepted: {', '.join(known)}"
            )
    command = Command(args, recipe, ds_config, stages)
    if command.folder.exists() and not command.folder.is_dir():
        raise RecipeError(f"--output_dir: {command.folder} is a file; accepted: the run's directory, or a new name")
    if args.resume not in ("auto", "never") and not Path(args.resume).is_dir():
        raise RecipeError(
            f"--resume: {args.resume} does not exist; accepted: auto, never, or {command.folder}/checkpoints/<stage>/step-<number>"
        )
    return command


def check_shards_are_there(command: Command) -> None:
    """DataError for shards that are named and missing; what is in them is looked at later."""
    for stage in command.stages:
        for part in stage.parts.values():
            for source in part.data.mixture.values():
                expand(source.shards)
        expand(stage.evaluate.held_out)
    for name in EVALUATIONS:
        if held_out := getattr(command.recipe, name):
            expand(held_out.shards)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done; UNUSABLE, DIVERGED, MISCOMPUTED, LOST_A_RANK, ASKED_TO_STOP as docs/resuming.md says; 1 anything else."""
    args = parse_arguments(argv)
    try:
        name_ranks()
        command = check(args)
        check_shards_are_there(command)
    except (RecipeError, DataError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # on each machine: a file may be missing on one of them
            print(f"error: {error}", file=sys.stderr, flush=True)
        return UNUSABLE
    try:
        from vlmo_ds.training.run import run
    except KeyboardInterrupt:
        return 130
    return run(command)


if __name__ == "__main__":
    sys.exit(main())
