"""A whole run: checks before anything is trained, the stages, the evaluation."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import EVALUATIONS, Recipe, RecipeError, StageConfig, VisualTokenSettings
from vlmo_ds.data.loader import BatchDataset, check_samples, source_shards
from vlmo_ds.data.shards import ANSWERS, Shard, answer_list, list_shards
from vlmo_ds.data.storage import DataError, write_atomically
from vlmo_ds.data.tokenizer import load_tokenizer, train_tokenizer
from vlmo_ds.distributed import heartbeat
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import tokenize
from vlmo_ds.evaluation.circumstances import hardware
from vlmo_ds.evaluation.held_out import check_held_out
from vlmo_ds.evaluation.overlap import overlap
from vlmo_ds.evaluation.report import write_report
from vlmo_ds.evaluation.runs import as_json
from vlmo_ds.evaluation.table import Finished, Outcome, due, flat, planned
from vlmo_ds.families.finished import load_model
from vlmo_ds.families.interface import IMAGES, TEXTS
from vlmo_ds.families.outside import digest_of
from vlmo_ds.progress import progress
from vlmo_ds.training import checkpoint
from vlmo_ds.training.bits import WrongBits
from vlmo_ds.training.checkpoint_copy import Copies
from vlmo_ds.training.command import Command
from vlmo_ds.training.command import main as main
from vlmo_ds.training.ds_config import merge, precision_of, refuse_by_device, refuse_by_models
from vlmo_ds.training.engine import device, start_distributed
from vlmo_ds.training.exit_status import ASKED_TO_STOP, DIVERGED, DONE, LOST_A_RANK, MISCOMPUTED, UNUSABLE
from vlmo_ds.training.guard import Diverged
from vlmo_ds.training.lock import RunLock
from vlmo_ds.training.loop import Run, build_dataset, train_stage
from vlmo_ds.training.mlflow_log import MLflow
from vlmo_ds.training.monitor import Monitor
from vlmo_ds.training.precision import begun_in, settle
from vlmo_ds.training.resume import (
    COPIED,
    check_results,
    check_resume,
    check_shards,
    clear_leftovers,
    is_finished,
    set_newer_aside,
)
from vlmo_ds.training.signals import Stopped, StopRequest
from vlmo_ds.training.watch import Watch
from vlmo_ds.weights_file import EMA, FINAL

TOKENIZER_TEXTS = 200_000
SHARDS_SHOWN = 4  # that a tokenizer's report takes images from: each is read as a whole where it is remote


def run(command: Command) -> int:
    """Trains what the command line says; the exit status, as `command.main`'s."""
    args = command.args
    stop = StopRequest()
    status = DONE
    rank = int(os.environ.get("RANK", "0"))
    try:
        refuse_by_models(command.ds_config, args.deepspeed_config)
        refuse_by_device(command.ds_config, args.deepspeed_config)
        join(args.timeout)
        stop.listen()
        with Watch(args.timeout, stop, command.folder):
            run_stages(command, stop)
    except (RecipeError, DataError, Diverged, WrongBits) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return leave({Diverged: DIVERGED, WrongBits: MISCOMPUTED}.get(type(error), UNUSABLE))
    except Stopped as stopped:
        if rank == 0:
            print(stopped, flush=True)
        status = ASKED_TO_STOP
    except NotJoined as error:
        print(f"error: rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return leave(LOST_A_RANK)
    except KeyboardInterrupt:
        return leave(128 + signal.SIGINT)
    except Exception:
        traceback.print_exc()
        return leave(1)
    try:
        if dist.get_world_size() > 1:  # rank 0 keeps the store of the process group: it leaves with the others
            dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:  # a rank that has died since
        print(f"error: rank {rank}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return leave(LOST_A_RANK)
    return status


class NotJoined(RuntimeError):
    """The ranks have not found each other."""


def join(timeout: float) -> None:
    """start_distributed, with errors in words. RecipeError for a port that is taken: another start would fail as well."""
    try:
        start_distributed(timeout)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise RecipeError(
                f"port {os.environ.get('MASTER_PORT')} of this machine, over which the ranks are to meet, is in use by another "
                "process, another run perhaps: name a free one (deepspeed --master_port, torchrun --master-port, or MASTER_PORT)"
            ) from None
        raise NotJoined(
            f"the ranks have not met at {where} within {timeout:.0f} s ({str(error).splitlines()[0][:200]})"
        ) from None


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


def on_rank0(collector: Collector, function: Callable[[], Any]) -> Any:
    """Runs a check on rank 0; its result, or its error, reaches every rank, so that all go on or all stop."""
    result, message = collector.attempt_on_rank0(function, RecipeError, DataError, OSError)
    if message is not None:
        raise RecipeError(message)
    return result


def run_stages(command: Command, stop: StopRequest) -> None:
    collector = Collector()
    recipe, folder = command.recipe, command.folder
    stop.at_once = "stopped before training; the same command starts again"
    lock = RunLock(folder)
    on_rank0(collector, lambda: take(lock, folder))
    try:
        copies: list[Copies] = []
        if recipe.checkpoint_copy:
            on_rank0(collector, lambda: copies.append(opened_copies(recipe, folder)))
        ds_config, line = settle(command.ds_config, collector.from_rank0(begun_in(folder)), collector)
        if collector.rank == 0:
            print(line, file=sys.stderr if line.startswith("warning") else sys.stdout, flush=True)
        known_shards = on_rank0(collector, lambda: check_before_start(command))
        tokenizer = load_tokenizer(str(folder / "tokenizer"), *recipe.family.tokenizer)
        recipe.model.take_words(tokenizer)
        recipe.model.vqav2_label_size = on_rank0(collector, lambda: count_answers(recipe, folder))
        on_rank0(collector, lambda: check_data(recipe, command.stages, tokenizer, collector))
        check_held_out(recipe, collector)
        on_rank0(collector, lambda: warn_of_overlap(recipe, command.stages, folder))
        on_rank0(collector, lambda: write_resolved(folder, recipe, ds_config, command.stages, collector.world_size))
        mlflow: list[MLflow] = []  # rank 0's
        if ds_config.get("mlflow", {}).get("enabled"):
            on_rank0(collector, lambda: mlflow.append(MLflow(ds_config["mlflow"], folder, recipe.name)))
        monitor = Monitor(folder, collector.rank, *mlflow)
        run = Run(
            recipe, ds_config, folder, tokenizer, collector, monitor, stop, known_shards, copies[0] if copies else None
        )
        stop.at_once, trained = None, False
        try:
            for stage in command.stages:
                train_if_needed(run, stage, command)
            trained = True
        finally:
            monitor.close()
            for one in mlflow:
                one.close(finished=trained)
        stop.at_once = "stopped in the evaluation; the same command does it again"
        stop_if_asked(run, "before the evaluation")
        finish(recipe, folder, tokenizer, collector)
    finally:
        stop.at_once = None
        lock.release()


def opened_copies(recipe: Recipe, folder: Path) -> Copies:
    """The second place of a run's checkpoints, from which what this one lacks has come back."""
    copies = Copies(recipe.checkpoint_copy or "", folder, COPIED, recipe.keep_checkpoints)
    copies.restore(recipe.stages)
    return copies


def take(lock: RunLock, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lock.take()


def train_if_needed(run: Run, stage: StageConfig, command: Command) -> None:
    """Trains a stage that has not finished, from where --resume says."""
    resume, collector = command.args.resume, run.collector
    path = None if resume in ("auto", "never") else Path(resume)
    names = [stage.name for stage in run.recipe.stages]
    if is_finished(run.folder, stage):
        if collector.rank == 0:
            print(f"{stage.name}: finished already", flush=True)
        return
    if path and names.index(stage.name) < names.index(path.parent.name):
        if collector.rank == 0:
            print(f"{stage.name}: left out, as --resume names a checkpoint of {path.parent.name}", flush=True)
        return
    if path and path.parent.name == stage.name:
        if fault := checkpoint.shared_fault(path, collector):
            raise RecipeError(f"--resume: {path} is damaged: {fault}")
        start: Path | None = path
    else:
        start = checkpoint.latest_whole(run.folder_of(stage), collector) if resume != "never" else None
    train_to_its_end(run, stage, start)
    stop_if_asked(run, f"after stage '{stage.name}'")


def stop_if_asked(run: Run, where: str) -> None:
    """Stopped on every rank if any of them was asked to between two steps."""
    if any(run.collector.each_rank(run.stop.asked())):
        raise Stopped(f"stopped {where}; the same command goes on from there")


def train_to_its_end(run: Run, stage: StageConfig, resume_from: Path | None) -> None:
    """Trains a stage, and goes back and on when its loss jumps, as often as the recipe allows."""
    rollback = train_stage(run, stage, resume_from)
    rollbacks = 0
    most = run.recipe.loss_spike.max_rollbacks if run.recipe.loss_spike else 0
    while rollback:
        rollbacks += 1
        if rollbacks > most:
            raise Diverged(
                f"stage '{stage.name}': {rollback.message}: {rollbacks} times back, loss_spike.max_rollbacks is {most}"
            )
        if run.collector.rank == 0:
            print(f"warning: {stage.name}: {rollback.message}", file=sys.stderr, flush=True)
        newest = checkpoint.latest_whole(run.folder_of(stage), run.collector)
        rollback = train_stage(run, stage, newest, skip=rollback.skip)


def check_before_start(command: Command) -> dict[str, dict[str, list[list[str]]]]:
    """Everything that can be wrong without reading samples; makes the run's tokenizer. Returns what check_shards does."""
    args, recipe, stages, run = command.args, command.recipe, command.stages, command.folder
    check_resume(args, recipe, stages, run)
    for stage in stages:
        for part in stage.parts.values():
            source_shards(part.data)
        if stage.evaluate.held_out:
            list_shards(stage.evaluate.held_out)
    for name in EVALUATIONS:
        if held_out := getattr(recipe, name):
            list_shards(held_out.shards)
    known_shards = check_shards(stages, run, args.accept_data or ())
    check_results(command)
    clear_leftovers(run, recipe)
    if args.resume not in ("auto", "never"):
        set_newer_aside(Path(args.resume))
    if not (run / "tokenizer").is_dir():
        make_tokenizer(recipe).save_pretrained(str(run / "tokenizer.tmp"))
        (run / "tokenizer.tmp").replace(run / "tokenizer")
    return known_shards


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    if recipe.tokenizer.name != "train":
        return load_tokenizer(recipe.tokenizer.name, *recipe.family.tokenizer)
    with_text = [part.data for stage in recipe.stages for part in stage.parts.values() if part.reads & TEXTS]
    if not with_text:
        return train_tokenizer((), recipe.tokenizer.vocab_size)  # special tokens alone, which nothing reads
    answers = any("answers" in stage.reads for stage in recipe.stages)

    def texts():
        yield from (data.prompt for data in with_text if data.prompt)
        shards = list({s.url: s for data in with_text for source in source_shards(data) for s in source}.values())
        stride = -(-sum(s.samples for s in shards) // TOKENIZER_TEXTS)
        for shard in progress(shards, "training the tokenizer", unit="shards"):
            heartbeat.beat("training the tokenizer")
            for row in range(0, shard.samples, stride):
                try:
                    raw = shard.read(row)
                    yield from raw.texts
                    if answers:
                        yield from raw.answers
                except DataError:
                    continue

    return train_tokenizer(texts(), recipe.tokenizer.vocab_size, recipe.tokenizer.kind)


def count_answers(recipe: Recipe, run: Path) -> int:
    """The answers that questions choose among, whose list goes into the run; what the recipe says where none are asked."""
    asking = [part.data for stage in recipe.stages for part in stage.parts.values() if "questions" in part.reads]
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
    extra = recipe.model.extra_words
    if len(tokenizer) + extra > recipe.model.vocab_size:
        raise RecipeError(
            f"model.vocab_size is {recipe.model.vocab_size}, the tokenizer has {len(tokenizer)} pieces"
            f"{f' and the model {extra} words of its own' if extra else ''}: take 0 (as many as that) or more"
        )
    if any(stage.reads & TEXTS for stage in stages) and not set(tokenizer.get_vocab()) - set(
        tokenizer.all_special_tokens
    ):
        raise RecipeError(
            f"tokenizer.name: {recipe.tokenizer.name} has special words alone, as that of a run which read no text: take 'train', or another"
        )
    for name, evaluation in planned(recipe).items():
        try:
            evaluation.check(getattr(recipe, name), recipe.model.max_text_len, tokenizer)
        except RecipeError as error:
            raise RecipeError(f"{name}: {error}") from None
    for stage in stages:
        try:
            for dataset in build_dataset(recipe, stage, tokenizer, collector).parts.values():
                check_visual_tokens(recipe, dataset)
                check_samples(dataset)
        except DataError as error:
            raise RecipeError(f"stages.{stage.name}.data: {error}") from None


def check_visual_tokens(recipe: Recipe, dataset: BatchDataset) -> None:
    """DataError where tokens that were made before are not those of one tokenizer, the model's."""
    model = recipe.model
    if not isinstance(model, VisualTokenSettings) or not (origins := dataset.origins()):
        return
    for origin in origins:
        if origin.codes != model.num_visual_tokens:
            raise DataError(
                f"visual_tokens are of {origin.codes} codes, and model.num_visual_tokens is {model.num_visual_tokens}: take {origin.codes}"
            )
        if origin.tokenizer != origins[0].tokenizer:
            raise DataError("visual_tokens of the sources are of several tokenizers: make all of them with one")
    if model.visual_tokenizer and (own := digest_of(model.visual_tokenizer)) != origins[0].tokenizer:
        raise DataError(
            f"visual_tokens are of a tokenizer with checksum {origins[0].tokenizer}, and that of model.visual_tokenizer {model.visual_tokenizer} is "
            f"{own}: make them again with it, or leave model.visual_tokenizer out"
        )


def warn_of_overlap(recipe: Recipe, stages: list[StageConfig], folder: Path) -> None:
    """Tells, at a run's first start, where held-out pictures are training pictures."""
    if (folder / "recipe.yaml").exists():
        return
    training: dict[tuple[str, ...], tuple[StageConfig, list[Shard]]] = {}
    for stage in stages:
        for part in stage.parts.values():
            found = [s for source in source_shards(part.data) for s in source]
            if part.reads & IMAGES:
                training.setdefault(tuple(shard.url for shard in found), (stage, found))
    sets = {name: getattr(recipe, name).shards for name in planned(recipe)}
    sets |= {f"stages.{stage.name}.evaluate.held_out": stage.evaluate.held_out for stage in stages}
    for name, shards in sets.items():
        for stage, theirs in training.values() if shards else ():
            shared, looked_at = overlap(list_shards(shards), theirs)
            if shared:
                print(
                    f"warning: {name}: {shared} of {looked_at} held-out pictures that were looked at, or more, are among those that stage "
                    f"'{stage.name}' trains on: its scores are not of unseen pictures",
                    file=sys.stderr,
                    flush=True,
                )


def write_resolved(run: Path, recipe: Recipe, ds_config: dict, stages: list[StageConfig], world_size: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).encode())
    resolved = {stage.name: merge(ds_config, stage, world_size) for stage in stages}
    write_atomically(run / "ds_config.json", json.dumps(resolved, indent=1).encode())


def precisions(run: Path) -> dict[str, str]:
    """Of each stage, from what write_resolved has written."""
    configs = json.loads((run / "ds_config.json").read_bytes())
    return {stage: precision_of(config) for stage, config in configs.items()}


def sheet_of_codes(recipe: Recipe, folder: Path) -> bytes:
    """A picture of the codes of a visual tokenizer, by images that it was trained on; nothing where the last stage trains none, or is not
    there."""
    stage = recipe.stages[-1]
    if tokenize.CALL not in stage.gives or not folder.is_dir():
        return b""
    try:
        shards = [shard for source in source_shards(stage.data) for shard in source]
    except DataError as error:
        print(f"warning: the report shows no codes: {error}", file=sys.stderr, flush=True)
        return b""
    return tokenize.contact_sheet(load_model(recipe, folder).to(device()), shards[:SHARDS_SHOWN])


def finish(recipe: Recipe, run: Path, tokenizer: PreTrainedTokenizerBase, collector: Collector) -> None:
    """Evaluation after the last stage, and the report."""
    started = time.monotonic()
    ranks = collector.each_rank(hardware())
    folder = run / "checkpoints" / recipe.stages[-1].name
    finished = Finished(recipe, run, tokenizer, collector)
    outcomes: dict[str, Outcome] = {}
    for name, evaluation in due(recipe).items():
        for weights in (FINAL, EMA):
            if (folder / weights).is_dir():
                model = load_model(recipe, folder / weights).to(device())
                outcome = evaluation.measure(model, finished, getattr(recipe, name))
                if weights == EMA:
                    outcomes[f"{name}_{EMA}"] = Outcome(outcome.metrics, f"by the moving average: {outcome.text}")
                else:
                    outcomes[name] = outcome
    codes = sheet_of_codes(recipe, folder / FINAL) if collector.rank == 0 else b""

    def publish() -> None:
        for name, outcome in outcomes.items():
            write_atomically(run / f"{name}.json", as_json(outcome.metrics))
            for file, content in outcome.files.items():
                write_atomically(run / file, content)
        tables = {name: flat(outcome.metrics) for name, outcome in outcomes.items() if not outcome.pictures}
        data, result = next((o.pictures for o in outcomes.values() if o.pictures), (None, None))
        queries = recipe.retrieval.gallery if recipe.retrieval else 0
        seconds = time.monotonic() - started
        captions = [one for outcome in outcomes.values() for one in outcome.captions]
        if codes:
            write_atomically(run / tokenize.SHEET, codes)
        path = write_report(
            run, recipe.name, data, result, queries, tables, captions, ranks, seconds, precisions(run), codes
        )
        print(f"report: {path}", flush=True)

    if collector.rank == 0:
        for outcome in outcomes.values():
            print(outcome.text)
    what = "the results of the evaluation"
    if problem := checkpoint.tried_again(collector, publish, recipe.checkpoint_failures, f"{what} cannot be written"):
        raise RecipeError(
            f"{what} cannot be written: {problem}; once that is mended, the same command makes them again"
        )
