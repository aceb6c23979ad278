"""A whole run: command line, checks before anything is trained, the stages, the evaluation."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import QUICKSTART, Recipe, RecipeError, StageConfig, load_recipe, nearest, number, parse_recipe
from vlmo_ds.data.loader import check_samples, source_shards
from vlmo_ds.data.shards import ANSWERS, answer_list, list_shards
from vlmo_ds.data.storage import DataError, write_atomically
from vlmo_ds.data.tokenizer import load_tokenizer, train_tokenizer
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import nlvr2, retrieval, vqa
from vlmo_ds.evaluation.held_out import check_held_out
from vlmo_ds.evaluation.report import write_report
from vlmo_ds.evaluation.runs import as_json, load_model
from vlmo_ds.training import checkpoint
from vlmo_ds.training.ds_config import check_recipe, merge, read_config
from vlmo_ds.training.engine import device, name_ranks, start_distributed
from vlmo_ds.training.exit_status import ASKED_TO_STOP, DIVERGED, DONE, UNUSABLE
from vlmo_ds.training.guard import Diverged
from vlmo_ds.training.loop import Run, build_dataset, train_stage
from vlmo_ds.training.monitor import Monitor
from vlmo_ds.training.signals import Stopped, StopRequest
from vlmo_ds.training.watch import Watch

TOKENIZER_TEXTS = 200_000
# Settings of a stage that do not change what is trained: a run may go on with other values.
FREE_SETTINGS = (
    ".checkpoint_every",
    ".log_images_every",
    ".workers",
    ".prefetch",
    ".max_bad_fraction",
    ".index",
    ".cache",
    ".cache_size_gb",
    ".tries",
    ".stall_seconds",
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_ds.py",
        description="Pretrains a vision-language mixture-of-modality-experts transformer in stages under DeepSpeed.",
        epilog="Start it with deepspeed, torchrun, srun or plain python. Settings: key=value, such as stages.joint.steps=100.",
    )
    parser.add_argument(
        "--deepspeed_config", default="ds_configs/zero2.json", help="how the run is spread (default: %(default)s)"
    )
    parser.add_argument("--recipe", default=QUICKSTART, help="what is trained (default: %(default)s)")
    parser.add_argument("--stages", help="only these stages, separated by commas (default: all)")
    parser.add_argument("--output_dir", type=Path, help="the run's directory (default: runs/<name of the recipe>)")
    parser.add_argument(
        "--resume", default="auto", help="auto (continue if there is something), never, or a checkpoint folder"
    )
    parser.add_argument(
        "--timeout",
        type=number(float),
        default=600,
        metavar="SECONDS",
        help="a rank that takes longer to join, to read a batch or to make a step ends the run (default: %(default)s)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe to change")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done; UNUSABLE, DIVERGED, LOST_A_RANK, ASKED_TO_STOP as docs/resuming.md says; 1 anything else."""
    args = parse_arguments(argv)
    stop = StopRequest()
    status = DONE
    rank = 0
    try:
        name_ranks()
        rank = int(os.environ.get("RANK", "0"))
        recipe = load_recipe(args.recipe, args.overrides)
        ds_config = read_config(args.deepspeed_config)
        check_recipe(ds_config, recipe)
        stages = chosen_stages(recipe, args.stages)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        for stage in stages:
            merge(ds_config, stage, world_size)
        start_distributed(args.timeout)
        stop.listen()
        with Watch(args.timeout, stop) as watch:
            run_stages(args, recipe, ds_config, stages, stop, watch)
    except (RecipeError, DataError, Diverged) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return leave(DIVERGED if isinstance(error, Diverged) else UNUSABLE)
    except Stopped as stopped:
        if rank == 0:
            print(stopped, flush=True)
        status = ASKED_TO_STOP
    except Exception:
        traceback.print_exc()
        return leave(1)
    dist.barrier()  # rank 0 keeps the store of the process group: it leaves with the others, not before them
    dist.destroy_process_group()
    return status


def leave(status: int) -> int:
    """The exit status after an error; in a process group the process ends here.

    The other ranks may be gone, or never come: PyTorch can neither wait for them nor take the group down without them
    (with gloo a rank sometimes aborted in it).
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


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


def on_rank0(collector: Collector, function: Callable[[], Any]) -> Any:
    """Runs a check on rank 0; its result, or its error, reaches every rank, so that all go on or all stop."""
    result, message = collector.attempt_on_rank0(function, RecipeError, DataError)
    if message is not None:
        raise RecipeError(message)
    return result


def run_stages(
    args: argparse.Namespace,
    recipe: Recipe,
    ds_config: dict,
    stages: list[StageConfig],
    stop: StopRequest,
    watch: Watch,
) -> None:
    collector = Collector()
    folder = args.output_dir or Path("runs") / recipe.name
    on_rank0(collector, lambda: check_before_start(args, recipe, stages, folder))
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    recipe.model.vocab_size = recipe.model.vocab_size or len(tokenizer)
    recipe.model.vqav2_label_size = on_rank0(collector, lambda: count_answers(recipe, folder))
    on_rank0(collector, lambda: check_data(recipe, stages, tokenizer, collector))
    check_held_out(recipe, collector)
    on_rank0(collector, lambda: write_resolved(folder, recipe, ds_config, stages, collector.world_size))

    monitor = Monitor(folder, collector.rank, sum(stage.steps for stage in recipe.stages))
    run = Run(recipe, ds_config, folder, tokenizer, collector, monitor, stop, watch)
    try:
        for stage in stages:
            if (run.folder_of(stage) / "final").is_dir() and args.resume == "auto":
                if collector.rank == 0:
                    print(f"{stage.name}: finished already", flush=True)
                continue
            train_to_its_end(run, stage, find_checkpoint(args.resume, run.folder_of(stage), collector))
    finally:
        monitor.close()
    watch.unlimited("evaluation")
    finish(recipe, folder, tokenizer, collector)


def train_to_its_end(run: Run, stage: StageConfig, resume_from: Path | None) -> None:
    """Trains a stage, and goes back and on when its loss jumps, as often as the recipe allows."""
    rollback = train_stage(run, stage, resume_from)
    rollbacks = 0
    while rollback:
        rollbacks += 1
        if rollbacks > run.recipe.loss_spike.max_rollbacks:
            raise Diverged(
                f"stage '{stage.name}': {rollback.message}: {rollbacks} times back, "
                f"loss_spike.max_rollbacks is {run.recipe.loss_spike.max_rollbacks}"
            )
        if run.collector.rank == 0:
            print(f"warning: {stage.name}: {rollback.message}", file=sys.stderr, flush=True)
        newest = checkpoint.latest_whole(run.folder_of(stage), run.collector)
        rollback = train_stage(run, stage, newest, skip=rollback.skip)


def check_before_start(args: argparse.Namespace, recipe: Recipe, stages: list[StageConfig], run: Path) -> None:
    """Everything that can be wrong without reading samples; makes the run's tokenizer."""
    begun = (run / "recipe.yaml").exists()
    if args.resume == "never" and begun:
        raise RecipeError(f"--resume never, but {run} holds a run already: choose another --output_dir")
    if args.resume not in ("auto", "never"):
        path = Path(args.resume)
        if path not in checkpoint.list_checkpoints(path.parent) or path.parent.name not in [s.name for s in stages]:
            raise RecipeError(
                f"--resume: {path} is no checkpoint; accepted: auto, never, or {run}/checkpoints/<stage>/step-<number>"
            )
        if fault := checkpoint.fault_of(path):
            raise RecipeError(f"--resume: {path} is damaged: {fault}")
        compare_recipes(recipe, checkpoint.Reader(path).state["recipe"], f"{path} was written by")
    if begun:
        try:
            old = yaml.safe_load((run / "recipe.yaml").read_text())
        except (OSError, yaml.YAMLError):
            raise RecipeError(f"{run}/recipe.yaml cannot be read: choose another --output_dir") from None
        compare_recipes(recipe, old, f"{run} was begun with")
    first = recipe.stages.index(stages[0])
    if stages[0].init.weights == "previous" and first > 0:
        before = run / "checkpoints" / recipe.stages[first - 1].name / "final"
        if not before.is_dir():
            raise RecipeError(
                f"stage '{stages[0].name}' starts from stage '{recipe.stages[first - 1].name}', which has not finished in {run}: "
                f"add it to --stages, or set stages.{stages[0].name}.init.weights to 'fresh' or a file"
            )
    for stage in stages:
        source_shards(stage.data)
        if stage.init.weights not in ("previous", "fresh") and not Path(stage.init.weights).exists():
            raise RecipeError(f"stages.{stage.name}.init.weights: {stage.init.weights} does not exist")
    for held_out in (recipe.retrieval, recipe.vqa, recipe.nlvr2):
        if held_out:
            list_shards(held_out.shards)
    checkpoint.clear_leftovers(run)
    if not (run / "tokenizer").is_dir():
        make_tokenizer(recipe).save_pretrained(str(run / "tokenizer.tmp"))
        (run / "tokenizer.tmp").replace(run / "tokenizer")


def compare_recipes(recipe: Recipe, old: dict[str, Any], whose: str) -> None:
    """A run goes on with the recipe it began with. old: as JSON or YAML holds it."""
    try:
        earlier = parse_recipe(old, whose)
    except RecipeError as error:
        raise RecipeError(f"{whose} a recipe that cannot be read: choose another --output_dir ({error})") from None
    before, now = flatten(earlier.model_dump(mode="json")), flatten(recipe.model_dump(mode="json"))
    free = (
        "retrieval",
        "vqa",
        "nlvr2",
        "keep_checkpoints",
        "checkpoint_failures",
        "background_checkpoints",
        "max_nonfinite_steps",
        "loss_spike",
        "check_ranks",
        "name",
    )
    changed = [
        f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not key.startswith(free)
        and not key.endswith(FREE_SETTINGS)
        and not (key in ("model.vocab_size", "model.vqav2_label_size") and now[key] == 0)
    ]
    if changed:
        raise RecipeError(
            f"{whose} another recipe; choose another --output_dir or checkpoint, or undo:\n  "
            + "\n  ".join(changed[:12])
        )


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    return {k: v for key, inner in items for k, v in flatten(inner, f"{prefix}.{key}" if prefix else str(key)).items()}


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    if recipe.tokenizer.name != "train":
        return load_tokenizer(recipe.tokenizer.name)
    with_text = [stage.data for stage in recipe.stages if stage.tasks.keys() - {"mim"}]
    if not with_text:
        raise RecipeError("tokenizer.name is 'train', but no stage reads text; name a tokenizer")

    def texts():
        shards = list({s.url: s for data in with_text for source in source_shards(data) for s in source}.values())
        stride = -(-sum(s.samples for s in shards) // TOKENIZER_TEXTS)
        for shard in tqdm(shards, desc="training the tokenizer", unit="shard"):
            for row in range(0, shard.samples, stride):
                try:
                    yield from shard.read(row).texts
                except DataError:
                    continue

    return train_tokenizer(texts(), recipe.tokenizer.vocab_size)


def count_answers(recipe: Recipe, run: Path) -> int:
    """The answers that vqa chooses among, whose list goes into the run; what the recipe says without vqa."""
    asking = [stage.data for stage in recipe.stages if "vqa" in stage.tasks]
    wanted = recipe.model.vqav2_label_size
    if not asking:
        return wanted
    answers = answer_list(s.url for data in asking for source in source_shards(data) for s in source)
    if wanted not in (0, len(answers)):
        raise RecipeError(
            f"model.vqav2_label_size is {wanted}, the data has {len(answers)} answers: take 0 (the data's) or {len(answers)}"
        )
    write_atomically(run / ANSWERS, json.dumps(answers, ensure_ascii=False).encode())
    return len(answers)


def check_data(
    recipe: Recipe, stages: list[StageConfig], tokenizer: PreTrainedTokenizerBase, collector: Collector
) -> None:
    if len(tokenizer) > recipe.model.vocab_size:
        raise RecipeError(
            f"model.vocab_size is {recipe.model.vocab_size}, the tokenizer has {len(tokenizer)} pieces: take 0 (the tokenizer's) or more"
        )
    for stage in stages:
        try:
            check_samples(build_dataset(recipe, stage, tokenizer, collector))
        except DataError as error:
            raise RecipeError(f"stages.{stage.name}.data: {error}") from None


def write_resolved(run: Path, recipe: Recipe, ds_config: dict, stages: list[StageConfig], world_size: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).encode())
    resolved = {stage.name: merge(ds_config, stage, world_size) for stage in stages}
    write_atomically(run / "ds_config.json", json.dumps(resolved, indent=1).encode())


def find_checkpoint(resume: str, folder: Path, collector: Collector) -> Path | None:
    """The checkpoint that a stage goes on from (every rank has to call)."""
    if resume in ("auto", "never"):
        return checkpoint.latest_whole(folder, collector) if resume == "auto" else None
    if Path(resume).parent.name != folder.name:
        return None
    if fault := checkpoint.shared_fault(Path(resume), collector):
        raise RecipeError(f"--resume: {resume} is damaged: {fault}")
    return Path(resume)


def finish(recipe: Recipe, run: Path, tokenizer: PreTrainedTokenizerBase, collector: Collector) -> None:
    """Evaluation after the last stage, and the report."""
    last = recipe.stages[-1]
    final = run / "checkpoints" / last.name / "final"
    tables: dict[str, dict[str, float]] = {}
    data = result = None
    if final.is_dir():
        if recipe.retrieval and {"itc", "irtr"} & last.tasks.keys():
            model = load_model(recipe, final).to(device())
            data = retrieval.load_set(recipe.retrieval, recipe.model.image_size, recipe.model.max_text_len, tokenizer)
            result = retrieval.evaluate(model, data, recipe.retrieval, collector)
        if recipe.vqa and "vqa" in last.tasks:
            model = load_model(recipe, final).to(device())
            answers = vqa.read_answers(run, recipe.model.vqav2_label_size)
            rows = vqa.evaluate(model, recipe.vqa, answers, tokenizer, collector)
            tables["vqa"] = vqa.overall(rows)
        if recipe.nlvr2 and "nlvr2" in last.tasks:
            model = load_model(recipe, final).to(device())
            tables["nlvr2"] = nlvr2.scores(nlvr2.evaluate(model, recipe.nlvr2, tokenizer, collector))
    if collector.rank == 0:
        if result is not None:
            write_atomically(run / "retrieval.json", as_json(result.metrics))
            print(retrieval.table(result.metrics, len(data.images), len(data.captions)))
        for name, module in (("vqa", vqa), ("nlvr2", nlvr2)):
            if name in tables:
                write_atomically(run / f"{name}.json", as_json(tables[name]))
                print(module.table(tables[name]))
        queries = recipe.retrieval.gallery if recipe.retrieval else 0
        path = write_report(run, recipe.name, data, result, queries, tables)
        print(f"report: {path}", flush=True)
    collector.barrier()
