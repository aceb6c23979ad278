"""One stage: from initial weights to the stage's final weights."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmo_ds.blocks.branch import compile_branches
from vlmo_ds.blocks.kernels import use_kernels
from vlmo_ds.config import ClassSettings, Recipe, RecipeError, StageConfig
from vlmo_ds.data.loader import BatchDataset, Streams, batches, in_stream, spec_for, stable_seed
from vlmo_ds.data.shards import stable_id
from vlmo_ds.data.tokenizer import vocabulary_digest
from vlmo_ds.distributed import heartbeat
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.families.handing_over import hand_over
from vlmo_ds.families.interface import Clamp, matches
from vlmo_ds.families.step import FamilyModel, StepOutput, inputs_of
from vlmo_ds.ledger import StageClock
from vlmo_ds.training import checkpoint
from vlmo_ds.training.averages import Averages
from vlmo_ds.training.bits import Bits
from vlmo_ds.training.checkpoint_copy import Copies
from vlmo_ds.training.ds_config import is_half, merge, micro_batch
from vlmo_ds.training.engine import build_engine, device, release
from vlmo_ds.training.gradient_cache import cached_contrast
from vlmo_ds.training.guard import Guessing, ReplacedSamples, Rollback, SkippedSteps, SpikeGuard, check_ranks, roll_back
from vlmo_ds.training.host import freed_memory_returned
from vlmo_ds.training.monitor import Monitor, global_metrics
from vlmo_ds.training.moving_average import MovingAverage
from vlmo_ds.training.optim import optimizer_step, set_trainable
from vlmo_ds.training.pace import DATA, WINDOW, WRITING, Pace, flops_of, tokens_of
from vlmo_ds.training.scores import SEED, Scores, held_out_of
from vlmo_ds.training.signals import Stopped, StopRequest
from vlmo_ds.training.state import full_state, layout_of, refuse_moved, set_weights
from vlmo_ds.training.watch import BUILDING, GATHERING
from vlmo_ds.training.weights import frozen_state, write_result
from vlmo_ds.weights_file import BEST, EMA, FINAL, read_weights, vocabulary_of

ASKED, BUSY = "asked to stop", "writing a checkpoint"  # counts among those that a step sums over ranks


class Run(NamedTuple):
    """What the stages of a run share."""

    recipe: Recipe
    ds_config: dict
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    collector: Collector
    monitor: Monitor
    stop: StopRequest
    known_shards: dict[str, dict[str, list[list[str]]]]  # resume.check_shards
    copies: Copies | None = None  # rank 0's, of a run whose checkpoints have a second place

    def folder_of(self, stage: StageConfig) -> Path:
        """Where a stage's checkpoints and its result are."""
        return self.folder / "checkpoints" / stage.name

    def initial_weights(self, stage: StageConfig) -> tuple[dict[str, Tensor] | None, list[Path]]:
        """(state dict, the files it is from) for a stage; nothing for a fresh model. RecipeError where two files have a tensor."""
        before = self.recipe.stages[: self.recipe.stages.index(stage)]
        files = [Path(file) for file in stage.init.files]
        if stage.init.weights == "previous" and before:
            files = [self.folder_of(before[-1]) / FINAL]
        found: dict[str, Tensor] = {}
        for file in files:
            weights = read_weights(file)
            if twice := next((name for name in weights if name in found), None):
                raise RecipeError(
                    f"stages.{stage.name}.init.weights: {file} has {twice}, as a file before it in the list"
                )
            found |= weights
        return (found, files) if files else (None, [])


def refuse_other_words(ours: str, theirs: str | None, stage: StageConfig, origin: str) -> None:
    """RecipeError if weights were trained with other word pieces under the same numbers: the shapes would not tell."""
    if theirs in (None, ours) or not stage.family.words:
        return
    table, *others = stage.family.words
    if matches(table, stage.init.fresh):
        return
    raise RecipeError(
        f"stages.{stage.name}: weights from {origin} were trained with another vocabulary, whose numbers mean other word "
        f"pieces: set tokenizer.name to the tokenizer folder of the run that trained them, or name {table} and "
        f"{', '.join(others)} in init.fresh"
    )


def makers_of_tokens(dataset: Streams) -> dict[str, str]:
    """The checksum of the tokenizer that made the visual tokens of each stream, where they were made before."""
    found = {in_stream(stream, "data.visual_tokens"): part.made_by() for stream, part in dataset.parts.items()}
    return {name: tokenizer for name, tokenizer in found.items() if tokenizer}


def refuse_other_origins(ours: Mapping[str, str], theirs: Mapping[str, str], origin: str) -> None:
    """RecipeError where a checkpoint was trained on what another teacher or tokenizer says, under the same name."""
    for name, checksum in ours.items():
        if theirs.get(name, checksum) != checksum:
            raise RecipeError(
                f"{name}: what {origin} was trained with had the checksum {theirs[name]}, and what is there now {checksum}: put the former back, or "
                "choose another --output_dir"
            )


def stage_seed(recipe: Recipe, stage: StageConfig) -> int:
    """Every stage has its own stream of randomness."""
    return recipe.seed * 1_000_003 + next(i for i, s in enumerate(recipe.stages) if s.name == stage.name)


def build_dataset(
    recipe: Recipe,
    stage: StageConfig,
    tokenizer: PreTrainedTokenizerBase,
    collector: Collector,
    known_shards: Mapping[str, list[list[str]]] | None = None,
    seed: int | None = None,
) -> Streams:
    """The data of a stage, for this rank. known_shards: of each stream, as BatchDataset's; seed: of all that is drawn, None: the stage's own."""
    model = recipe.model_of(stage)
    seed = stage_seed(recipe, stage) if seed is None else seed
    found = {}
    for stream, part in stage.parts.items():
        micro, _ = micro_batch(part, collector.world_size)
        own = stable_seed(seed, stable_id(stream)) if len(stage.parts) > 1 and stream else seed
        classes = model.num_classes if isinstance(model, ClassSettings) else 0
        sizes = (model.image_size, model.patch_size, model.max_text_len)
        spec = spec_for(part.reads, *sizes, own, model.vqav2_label_size, classes)
        found[stream] = BatchDataset(
            part.data,
            spec,
            tokenizer,
            rank=collector.rank,
            world_size=collector.world_size,
            batch_size=micro,
            known_shards=(known_shards or {}).get(stream),
        )
    return Streams(found)


def build_model(
    recipe: Recipe,
    stage: StageConfig,
    source: dict[str, Tensor] | None,
    origin: str,
    collector: Collector,
    resumed: bool = False,
) -> FamilyModel:
    """The stage's model with its initial weights, the same on every rank; what it does not train is frozen.

    source: weights from elsewhere, handed over as the stage's `init` says; resumed: from a checkpoint of the stage itself.
    """
    torch.manual_seed(stage_seed(recipe, stage))
    model = recipe.family.build(recipe.model_of(stage), stage.weights, collector)
    if source is not None:
        report = hand_over(model, source, recipe.family.init() if resumed else stage.init, origin)
        if collector.rank == 0:
            counts = ", ".join(f"{len(names)} {what}" for what, names in report.items() if what != "converted")
            print(f"{stage.name}: weights from {origin}: {counts}", flush=True)
            for change in report["converted"]:
                print(f"{stage.name}:   {change}", flush=True)
    try:
        use_kernels(model, recipe.model.kernels)
        if recipe.model.compile == "blocks":
            compile_branches(model)
    except ValueError as error:
        raise RecipeError(f"model.{error}") from None
    trained = set_trainable(model, stage)
    if collector.rank == 0:
        total, learnt = parameter_counts(model)
        print(
            f"{stage.name}: trains {learnt / 1e6:.2f}M of {total / 1e6:.2f}M parameters ({len(trained)} tensors)",
            flush=True,
        )
        reached = [name for name, _ in model.named_parameters() if matches(name, stage.trainable_patterns)]
        if idle := sum(not matches(name, model.family.averaged) for name in reached) - len(trained):
            print(
                f"{stage.name}: {', '.join(stage.tasks)} reaches none of {', '.join(model.idle())}: {idle} tensors stay as they are",
                flush=True,
            )
    return model


def parameter_counts(model: FamilyModel) -> tuple[int, int]:
    """(all, trained), of a model that no engine has taken yet."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)


class Pass(NamedTuple):
    """A micro-batch on its device; the seed of its forward pass, dropout and stochastic depth."""

    batch: dict[str, Tensor]
    seed: int

    def beside(self, also: Mapping[str, Tensor | int]) -> Pass:
        """The same with more in the batch; numbers as 0-d int64."""
        more = {name: torch.tensor(value) if isinstance(value, int) else value for name, value in also.items()}
        return self._replace(batch={**self.batch, **more})


def train_stage(run: Run, stage: StageConfig, resume_from: Path | None, skip: int | None = None) -> Rollback | None:
    """Trains a stage to its end and writes its final weights; where to go on if the loss has jumped.

    resume_from: a checkpoint of the stage; skip: steps whose data is left out, None: as the checkpoint says. Raises
    Stopped, with a checkpoint written, at the end of the step in which any rank was asked to stop; Diverged when too many
    steps in a row are not finite.
    """
    with freed_memory_returned():
        training = StageTraining(run, stage, resume_from, skip)
    try:
        rollback = training.train()
        if not rollback:
            training.write_final()
    finally:
        training.note_time()
    release(training.engine)
    del training
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rollback


class StageTraining:
    """A stage that is being trained: its engine, its data, and what looks after both. Arguments as train_stage's."""

    def __init__(self, run: Run, stage: StageConfig, resume_from: Path | None, skip: int | None):
        self.run, self.stage = run, stage
        self.clock = StageClock(run.folder, stage.name)
        heartbeat.beat(f"{BUILDING} {stage.name}")
        recipe, collector = run.recipe, run.collector
        self.seed = stage_seed(recipe, stage)
        _, self.accumulation = micro_batch(stage, collector.world_size)
        known_shards = run.known_shards.get(stage.name)
        self.dataset = build_dataset(recipe, stage, run.tokenizer, collector, known_shards)
        self.samples = stage.samples  # of a step
        reader = checkpoint.Reader(resume_from) if resume_from else None
        vocabulary = vocabulary_digest(run.tokenizer)
        source: dict[str, Tensor] | None
        if reader:
            source, origin = reader.weights(), str(resume_from)
            refuse_other_words(vocabulary, reader.state.get("vocabulary"), stage, origin)
        else:
            source, files = run.initial_weights(stage)
            origin = ", ".join(map(str, files)) or "a fresh initialisation"
            for file in files:
                refuse_other_words(vocabulary, vocabulary_of(file), stage, str(file))
        model = build_model(recipe, stage, source, origin, collector, resumed=reader is not None)
        del source
        model.open()
        outside = model.outside() | makers_of_tokens(self.dataset)
        if reader:
            refuse_other_origins(outside, reader.state.get("outside", {}), str(resume_from))
        self.frozen, self.averages = frozen_state(model), Averages(model)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.counts = parameter_counts(model)
        buffer_shapes = {name: buffer.shape for name, buffer in model.named_buffers()}
        merged = merge(run.ds_config, stage, collector.world_size)
        self.engine = build_engine(model, stage, merged)
        self.averages.attach(self.engine)
        self.first = checkpoint.restore(self.engine, reader) if reader else 0
        self.moving_average = MovingAverage(self.engine, stage.ema, reader) if stage.ema else None
        if self.moving_average and self.moving_average.begun_anew and collector.rank == 0:
            print(f"{stage.name}: {resume_from} has no moving average: it begins with the weights there", flush=True)
        saved = reader.state if reader else {}
        self.skip = saved.get("skip", 0) if skip is None else skip
        if reader and collector.rank == 0:
            print(f"{stage.name}: resumed at step {self.first} from {resume_from}", flush=True)
        if reader:
            self.follow_schedule(reader.state["recipe"])
        self.compare = self.engine.zero_optimization_stage() == 3 if recipe.check_ranks is None else recipe.check_ranks
        self.bits = Bits(run, stage, self.engine) if recipe.check_bits else None
        self.guard = SpikeGuard(recipe.loss_spike, saved.get("guard")) if recipe.loss_spike else None
        self.guessing = Guessing(stage, saved.get("guessing"))
        self.followed = bool(saved.get("followed", False))  # the teacher has, and the student has not moved since
        self.nonfinite = SkippedSteps(recipe, stage.name, run.folder, collector)
        self.replaced = ReplacedSamples(self.dataset, stage, self.first + self.skip)
        folder = run.folder_of(stage)
        self.writer = checkpoint.CheckpointWriter(
            folder, recipe.keep_checkpoints, recipe.background_checkpoints, collector
        )
        self.pace = Pace(flops_of(recipe.model_of(stage), stage), is_half(merged), collector.world_size, collector.rank)
        self.scores = None
        if stage.evaluate_every:
            held_out = None
            if stage.evaluate.held_out:
                held_out = build_dataset(recipe, held_out_of(stage), run.tokenizer, collector, seed=SEED)
            self.scores = Scores(run, stage, held_out, model)
        self.failures = checkpoint.FailedCheckpoints(recipe.checkpoint_failures, folder, collector.rank == 0)
        shapes = {**self.shapes, **buffer_shapes}
        self.about = checkpoint.about_run(stage.name, recipe.model_dump(mode="json"), shapes, self.engine)
        self.about |= {"vocabulary": vocabulary, "outside": outside}

    def follow_schedule(self, recipe: dict) -> None:
        """Of a stage that has been made longer the learning rate goes on along the new schedule. recipe: the checkpoint's."""
        before = next((s["steps"] for s in recipe["stages"] if s["name"] == self.stage.name), self.stage.steps)
        if before == self.stage.steps:
            return
        scheduler, groups = self.engine.lr_scheduler, self.engine.optimizer.param_groups
        old = groups[0]["lr"]
        for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(scheduler.last_epoch)
        if self.run.collector.rank == 0:
            print(
                f"{self.stage.name}: {self.stage.steps} steps instead of {before}: the learning rate goes on at "
                f"{groups[0]['lr']:.2e}, where the schedule of {before} steps had {old:.2e}",
                flush=True,
            )

    def train(self) -> Rollback | None:
        stage, collector = self.stage, self.run.collector
        number = self.run.recipe.stages.index(stage)
        before, after = self.run.recipe.stages[:number], self.run.recipe.stages[number + 1 :]
        samples_ahead = sum(s.steps * s.samples for s in after)
        beside = self.engine.monitor.write_events if self.engine.monitor.enabled else None
        self.run.monitor.begin(stage.name, self.first, sum(s.steps for s in before), samples_ahead, beside)
        if self.scores:
            self.scores.remember(self.run.monitor.earlier_scores())
            self.evaluate(self.first)
            if self.scores.exhausted:
                return None
        begin, end = ((step + self.skip) * self.accumulation for step in (self.first, stage.steps))
        stream = batches(self.dataset, begin, end, stage.data.workers, stage.data.prefetch)
        self.engine.train()
        rollback = None
        self.pace.begin()
        for step in range(self.first, stage.steps):
            metrics, asked = self.step(step, stream)
            spike = self.guard.look(step + 1, metrics["loss"]) if self.guard else None
            if spike:
                self.published(self.writer.finish())
                rollback = roll_back(spike, self.skip, self.writer.folder, collector)
                break
            with self.pace.left_out():
                self.evaluate(step + 1)
            ends = self.scores is not None and self.scores.exhausted
            last = ends or step + 1 == stage.steps  # a stage can be made longer from there
            due = stage.checkpoint_every and ((step + 1) % stage.checkpoint_every == 0 or last)
            if due or asked:
                self.checkpoint(step + 1, wait=asked)
            if asked and not last:
                if self.run.copies:
                    self.run.copies.finish()
                raise Stopped(
                    f"stopped in stage '{stage.name}' at step {step + 1}; the same command goes on from there"
                )
            if ends:
                break
        self.published(self.writer.finish())
        return rollback

    def step(self, step: int, stream: Iterator[dict]) -> tuple[dict[str, float], bool]:
        """One optimiser step: (its metrics, whether a rank was asked to stop)."""
        stage, engine, run = self.stage, self.engine, self.run
        skipped_before = engine.skipped_steps
        lr = engine.get_lr()[0]  # this step's; afterwards it is the next one's
        taken: list[dict[str, Tensor]] = []
        passes: Iterable[Pass] = (self.next_pass(step, part, stream, taken) for part in range(self.accumulation))
        keys: dict[str, Tensor] = {}
        if engine.module.looks_ahead:
            passes = list(passes)
            keys = self.keys(passes)
            passes = [one.beside({**keys, "part": part, "step": step}) for part, one in enumerate(passes)]
        if bits_due := self.bits is not None and self.bits.is_due(step + 1):
            passes = list(passes)
        if stage.gradient_cache:
            outputs = [self.gradient_cached(list(passes))]
        else:
            outputs = [self.forward_backward(one) for one in passes]
        skipped = engine.skipped_steps > skipped_before
        self.followed = skipped
        if keys and not skipped:
            engine.module.push(keys)
        settled = engine.module.settle([out.seen for out in outputs], not skipped)
        if self.moving_average and not skipped:
            self.moving_average.follow(step + 1)
        flags = {ASKED: float(run.stop.asked()), BUSY: float(self.writer.busy)}
        told = self.pace.told()
        metrics, counts = global_metrics(outputs, {**self.replaced.of_step(), **flags, **told}, run.collector)
        self.pace.step({name: counts.pop(name) for name in told})
        asked = bool(counts.pop(ASKED))
        with self.pace.part(WRITING):
            self.published(self.writer.settle(counts.pop(BUSY)))
        metrics |= {**settled, "lr": lr}
        norm = engine.get_global_grad_norm()
        if norm is not None:
            metrics["grad_norm"] = math.nan if skipped else float(norm)
        metrics["skipped_steps"] = engine.skipped_steps
        near = [
            clamp
            for clamp in stage.family.clamped
            if clamp.metric in metrics and not clamp.near[0] <= metrics[clamp.metric] <= clamp.near[1]
        ]
        if near:
            clamp_scales(engine, near)
        metrics |= self.replaced.look(counts, step + 1 + self.skip)
        run.monitor.log(step + 1, stage.steps, metrics, self.samples, self.pace)
        if (step + 1) % WINDOW == 0 or step + 1 == stage.steps:
            run.monitor.paced(step + 1, stage, run.collector.each_rank(self.pace.of_window()), self.writer.folder)
        for warning in self.guessing.look(step + 1, metrics):
            if run.collector.rank == 0:
                print(warning, file=sys.stderr, flush=True)
        self.nonfinite.look(step + 1, skipped, engine, outputs, taken)
        if self.bits and bits_due:
            with self.pace.left_out():
                self.bits.compare(step + 1)
                self.bits.repeat(step + 1, next(iter(passes)))
        return metrics, asked

    def next_pass(self, step: int, part: int, stream: Iterator[dict], taken: list[dict[str, Tensor]]) -> Pass:
        """Reads a micro-batch, notes its samples in `taken`, and moves it to its device."""
        stage, run = self.stage, self.run
        number = (step + self.skip) * self.accumulation + part
        heartbeat.beat(f"reading the data of step {step + 1} of {stage.name}")
        with self.pace.part(DATA):
            raw = next(stream)
        batch = self.replaced.take(raw)
        self.pace.tokens += tokens_of(batch, self.engine.module.config.patches)
        taken.append({key: batch[key] for key in ("sample_id", "image_id")})
        if stage.log_images_every and part == 0 and step % stage.log_images_every == 0:
            run.monitor.images(step + 1, batch, run.tokenizer)
        heartbeat.beat(f"step {step + 1} of {stage.name}")
        if self.compare:
            check_ranks(run.collector, number, stage, batch)
        seed = self.seed * 1_000_003 + number
        step_seed = (self.seed * 1_000_003 + step + self.skip) % 2**63
        batch = inputs_of(batch, device(), seed % 2**63, step_seed)
        # Dropout and stochastic depth need no saved state: they restart from a function of the step.
        return Pass(batch, (seed * 65_537 + run.collector.rank) % 2**64)

    def keys(self, passes: Sequence[Pass]) -> dict[str, Tensor]:
        """What the model sees of all micro-batches before the step. A teacher follows, once for every step that is taken."""
        if self.averages and not self.followed:
            self.averages.follow(self.engine.module.momentum)
        found = []
        with torch.no_grad():
            for one in passes:
                torch.manual_seed(one.seed)
                found.append(self.engine(one.batch, "keys"))
        return self.engine.module.keys_of_step(found)

    def forward_backward(self, one: Pass) -> StepOutput:
        torch.manual_seed(one.seed)
        out = self.engine(one.batch)
        self.engine.backward(out.loss)
        optimizer_step(self.engine)
        return out

    def gradient_cached(self, passes: list[Pass]) -> StepOutput:
        """One step on all micro-batches together."""

        def call(number: int, name: str, also: dict[str, Tensor]) -> Any:
            torch.manual_seed(passes[number].seed)
            return self.engine({**passes[number].batch, **also}, name)

        def backward(part: Tensor) -> None:
            self.engine.backward(part * len(passes))  # DeepSpeed divides by the number of micro-batches
            optimizer_step(self.engine)

        return cached_contrast(self.engine.module, len(passes), call, backward)

    def checkpoint(self, step: int, wait: bool) -> None:
        """Begins to write a checkpoint of so many steps; wait: until it is there."""
        with self.pace.part(WRITING):
            self.write_checkpoint(step, wait)

    def write_checkpoint(self, step: int, wait: bool) -> None:
        self.published(self.writer.finish())
        if self.bits:
            self.bits.compare(step)
        if step == self.stage.steps:  # beside those that are kept to go back to
            self.writer.keep = self.run.recipe.keep_checkpoints + 1
        memory = {"skip": self.skip, "guard": self.guard.memory if self.guard else None}
        memory |= {"guessing": self.guessing.memory, "followed": self.followed}
        moving = self.moving_average.held if self.moving_average else {}
        problem = self.writer.start(
            self.engine, step, self.frozen, {**self.about, **memory}, self.averages.held, moving
        )
        self.failures.count((step, problem) if problem else None)
        if wait or not self.run.recipe.background_checkpoints:
            self.published(self.writer.finish())
        self.note_time()

    def evaluate(self, step: int) -> None:
        """Measures the weights after so many steps, if that is due."""
        if self.scores is None or not self.scores.is_due(step):
            return
        state = self.state()
        if self.stage.evaluate.weights == "ema" and self.moving_average:
            state = self.moving_average.into(state, self.run.collector)
        found, best = self.scores.take(state, step)
        if best:
            self.publish(
                BEST, state, step=step, score={self.stage.evaluate.best: found[self.stage.evaluate.best or ""]}
            )
        self.run.monitor.evaluated(step, found)

    def state(self) -> dict[str, Tensor]:
        """The model's float32 state dict (rank 0's; every rank has to call)."""
        heartbeat.beat(f"{GATHERING} {self.stage.name}")
        refuse_moved(self.engine, self.frozen, self.run.collector)
        return full_state(self.engine, self.frozen, self.shapes, self.averages.held)

    def published(self, outcome: tuple[int, str] | None) -> None:
        """Counts a checkpoint that the writer is done with, and begins to copy it to its second place."""
        self.failures.count(outcome)
        if outcome and not outcome[1] and self.run.copies:
            self.run.copies.begin(self.writer.folder / f"step-{outcome[0]:08d}")

    def note_time(self) -> None:
        if self.run.collector.rank == 0:
            self.clock.note(*self.counts)

    def write_final(self) -> None:
        """Writes the stage's result; where that fails (a full disk) it is tried again, as often as a checkpoint is."""
        if self.bits:
            self.bits.compare(self.stage.steps)
        state = self.state()
        if self.moving_average:
            self.publish(EMA, self.moving_average.into(state, self.run.collector))
        self.publish(FINAL, state)  # last: a stage that has it is finished

    def publish(self, name: str, state: Mapping[str, Tensor], **about: Any) -> None:
        """Weights (rank 0's) as a folder of the stage, with what its stage.json tells beside. RecipeError where it cannot be written."""
        run = self.run
        meta = {
            "stage": self.stage.name,
            "steps": self.stage.steps,
            "tasks": self.stage.weights,
            "weights": name,
            **about,
        }
        meta["vocabulary"] = self.about["vocabulary"]
        folder = self.writer.folder / name
        what = f"the result of stage '{self.stage.name}' cannot be written to {folder}"
        problem = checkpoint.tried_again(
            run.collector, lambda: write_result(folder, state, meta), run.recipe.checkpoint_failures, what
        )
        if problem:
            raise RecipeError(
                f"{what}: {problem}; once that is mended, the same command goes on from the stage's last checkpoint"
            )
        if run.copies:
            run.copies.publish(folder)


@torch.no_grad()
def clamp_scales(engine: deepspeed.DeepSpeedEngine, clamps: Iterable[Clamp]) -> None:
    """Keeps scales within their bounds, in the float32 values that the optimiser holds (every rank has to call)."""
    layout = layout_of(engine)
    for clamp in clamps:  # those that are there and trained
        value = layout.full(layout.parameters[clamp.name]) if clamp.name in layout.parameters else None
        if value is not None:
            bounded = value.clamp(clamp.low, clamp.high)
            if not torch.equal(bounded, value):
                set_weights(engine, {clamp.name: bounded})
