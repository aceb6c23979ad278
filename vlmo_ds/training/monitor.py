"""What a person sees of a run: metrics.jsonl, TensorBoard, the progress line."""

from __future__ import annotations

import contextlib
import io
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmo_ds import metrics
from vlmo_ds.config import StageConfig
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.families.step import StepOutput, added
from vlmo_ds.metrics import AppendedFile
from vlmo_ds.training.mlflow_log import MLflow
from vlmo_ds.training.pace import Pace, Rank, advice, spreads, summary

Event = tuple[str, float, int]  # name, value, step of the run

SHOWN_EVERY, SHOWN_EVERY_IN_A_LOG = 2.0, 30.0  # seconds between two lines, on a terminal and elsewhere
SUMMED_UP_EVERY = 60.0  # seconds between two lines about all ranks
TOLD_EVERY = 60.0  # seconds between two words about a full disk


def global_metrics(
    outputs: list[StepOutput], counts: Mapping[str, float], collector: Collector
) -> tuple[dict[str, float], dict[str, float]]:
    """One optimiser step's metrics over all ranks and micro-batches, and the sums of `counts`, in one all-reduce."""
    tasks = list(outputs[0].losses)
    ratio_names, value_names = list(outputs[0].ratios), list(outputs[0].values)
    share = 1.0 / (len(outputs) * collector.world_size)
    local = [added(o.losses[t].detach().double() for o in outputs) * share for t in tasks]
    for name in ratio_names:
        local += [added(o.ratios[name][i].detach().double() for o in outputs) for i in (0, 1)]
    local += [added(o.values[name].double() for o in outputs) * share for name in value_names]
    device = local[0].device
    local += [torch.tensor(count, dtype=torch.float64) for count in counts.values()]
    total = collector.sum(torch.stack([x.to(device) for x in local]))
    values = iter(total.tolist())
    found = {"loss": sum(next(values) for _ in tasks)}
    for name in ratio_names:
        numerator, denominator = next(values), next(values)
        found[name] = numerator / max(denominator, 1.0)
    found |= {name: next(values) for name in value_names}
    return found, {name: next(values) for name in counts}


class Monitor:
    """Writes on rank 0; silent elsewhere. What cannot be written (a full disk) waits, and training goes on."""

    def __init__(self, run: Path, rank: int, mlflow: MLflow | None = None):
        self.active = rank == 0
        self.mlflow = mlflow
        self.run = run
        self.metrics: AppendedFile | None = None
        self.scores: AppendedFile | None = None
        self.paces: AppendedFile | None = None
        self.curves: Curves | None = None
        self.shown_at = self.told_at = self.summed_up_at = -math.inf
        self.show_every = SHOWN_EVERY if sys.stdout.isatty() else SHOWN_EVERY_IN_A_LOG

    def begin(
        self, stage: str, step: int, offset: int, samples_ahead: int, also: Callable[[list[Event]], None] | None = None
    ) -> None:
        """Opens the files at a stage's step; lines of this stage past it (of a run that died later) are cut off.

        offset: steps of the stages before; samples_ahead: of the stages after; also: gets the scalars as TensorBoard does (DeepSpeed's
        monitors: Weights & Biases, csv).
        """
        self.also = also
        self.stage, self.offset, self.samples_ahead = stage, offset, samples_ahead
        self.told_kinds: set[str] = set()
        if not self.active:
            return
        self.close()
        last, self.metrics = begun(self.run / metrics.FILE, stage, step)
        _, self.scores = begun(self.run / metrics.SCORES, stage, step)
        _, self.paces = begun(self.run / metrics.PACE, stage, step)
        later = last > offset + step  # a stage after this one has been trained before it
        self.curves = Curves(self.run / "tensorboard", None if later else offset + step + 1)

    def opened(self) -> tuple[AppendedFile, Curves]:
        """The files that rank 0 writes between begin and close."""
        if self.metrics is None or self.curves is None:
            raise ValueError(f"{self.run}: no stage has begun to write its metrics")
        return self.metrics, self.curves

    def log(self, step: int, steps: int, values: Mapping[str, float], samples: int, pace: Pace) -> None:
        """step: optimiser steps done in this stage; samples: of this step, over all ranks."""
        if not self.active:
            return
        number = self.offset + step
        record = {"stage": self.stage, "step": step, "step_of_run": number, **values}
        lines, curves = self.opened()
        lines.append(metrics.dump(finite(record)))
        speed = pace.scalars(samples)
        self.draw(curves, {**values, **speed}, number, "steps")
        self.tell_of_problems()
        if step == steps or time.monotonic() - self.shown_at > self.show_every:
            self.shown_at = time.monotonic()
            parts = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
            left = steps - step + self.samples_ahead / samples
            print(
                f"{self.stage:>8} {step:>6}/{steps}  loss {values['loss']:.4f} ({parts})  lr {values['lr']:.2e}  {pace.line(speed, left)}",
                flush=True,
            )

    def paced(self, step: int, stage: StageConfig, ranks: Sequence[Rank], folder: Path) -> None:
        """What the ranks have told of their last steps: into pace.jsonl, at times a line, and what to do about it once."""
        if not self.active:
            return
        found = spreads(ranks)
        record: dict[str, Any] = {
            "stage": self.stage,
            "step": step,
            "step_of_run": self.offset + step,
            "world_size": len(ranks),
        }
        for name, spread in found.items():
            record[name] = {**spread._asdict(), "who": spread.who.name}
        if self.paces is not None:
            self.paces.append(metrics.dump(record))
        if time.monotonic() - self.summed_up_at > SUMMED_UP_EVERY:
            self.summed_up_at = time.monotonic()
            print(f"{self.stage:>8} {step:>6}: {summary(found, len(ranks))}", flush=True)
        for kind, words in advice(ranks, stage, folder).items():
            if kind not in self.told_kinds:
                self.told_kinds.add(kind)
                print(f"{self.stage:>8} {step:>6}: {words}", file=sys.stderr, flush=True)

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """What an evaluation has measured after so many steps of the stage; a file of its own has it, so that metrics.jsonl is the same
        without evaluations."""
        if not self.active:
            return
        number = self.offset + step
        if self.scores is not None:
            self.scores.append(
                metrics.dump(finite({"stage": self.stage, "step": step, "step_of_run": number, **values}))
            )
        _, curves = self.opened()
        self.draw(curves, values, number, "evaluations")

    def draw(self, curves: Curves, values: Mapping[str, float], number: int, kind: str) -> None:
        """number: step of the run; kind: what has at most one set of values a step."""
        scalars = {f"{self.stage}/{name}": value for name, value in values.items()}
        curves.add(scalars, number)
        if self.also is not None:
            self.also([(name, value, number) for name, value in scalars.items()])
        if self.mlflow is not None:
            self.mlflow.log(kind, scalars, number)

    def earlier_scores(self) -> Iterator[dict[str, Any]]:
        """What has been measured of this stage so far."""
        path = self.run / metrics.SCORES
        return (
            (record for record in metrics.records(path) if record["stage"] == self.stage) if path.exists() else iter(())
        )

    def tell_of_problems(self) -> None:
        problems = [file.problem for file in self.opened() if file.problem]
        if problems and time.monotonic() - self.told_at > TOLD_EVERY:
            self.told_at = time.monotonic()
            print(
                f"warning: {self.run}: metrics cannot be written: {problems[0]}; they wait, and training goes on",
                file=sys.stderr,
                flush=True,
            )

    def images(self, step: int, batch: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> None:
        if self.active and ("image" in batch or "image_0" in batch):
            _, curves = self.opened()
            curves.add_image(f"{self.stage}/samples", contact_sheet(batch, tokenizer), self.offset + step)

    def close(self) -> None:
        """Closes the files; lines that still cannot be written are told of."""
        for file in (self.metrics, self.scores, self.paces, self.curves):
            try:
                if file is not None:
                    file.close()
            except OSError as error:
                print(f"warning: {error}", file=sys.stderr, flush=True)
        self.metrics = self.scores = self.paces = self.curves = None


def begun(path: Path, stage: str, step: int) -> tuple[int, AppendedFile]:
    """(last step of the run that is left, a file of records) from a stage's step on."""
    last, notes = metrics.begin_stage(path, stage, step)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr, flush=True)
    return last, AppendedFile(path)


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """null, as JSON has it, for what is no finite number."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


class Curves:
    """TensorBoard's file of this start. Every step is written at once: a run that is killed has each step in its curves.

    purge: the first step that this start writes, from which on what an earlier one has written does not count.
    """

    def __init__(self, folder: Path, purge: int | None):
        from tensorboard.compat.proto.event_pb2 import SessionLog  # a second, on rank 0 alone

        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self.folder, self.file = folder, AppendedFile(folder / name)
        self.file.waiting.append(event(file_version="brain.Event:2"))
        if purge is not None:
            self.file.waiting.append(event(step=purge, session_log=SessionLog(status=SessionLog.START)))

    @property
    def problem(self) -> str:
        return self.file.problem

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        self.write([event(step=step, summary=scalar(name, value)) for name, value in scalars.items()])

    def add_image(self, name: str, sheet_HW3: np.ndarray, step: int) -> None:
        """A picture is not kept in memory: it is left out while the file cannot be written."""
        from torch.utils.tensorboard.summary import image

        if not self.problem:
            self.write([event(step=step, summary=image(name, sheet_HW3, dataformats="HWC"))])

    def write(self, events: list[bytes]) -> None:
        with contextlib.suppress(OSError):  # opening the file tells why it cannot be
            self.folder.mkdir(parents=True, exist_ok=True)
        self.file.append(b"".join(events))

    def close(self) -> None:
        self.file.close()


def event(**fields: Any) -> bytes:
    """One record of TensorBoard's file."""
    from tensorboard.compat.proto.event_pb2 import Event as Record
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(Record(wall_time=time.time(), **fields).SerializeToString())
    return buffer.getvalue()


def contact_sheet(
    batch: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, count: int = 8, cell: int = 224
) -> np.ndarray:
    """[H, W, 3] uint8: inputs as the model sees them, masked patches grey, masked words as [MASK]."""
    images = batch["image" if "image" in batch else "image_0"][:count].cpu()
    rows = -(-len(images) // 4)
    text_height = 74 if "text_ids" in batch else 4
    sheet = Image.new("RGB", (4 * cell, rows * (cell + text_height)), "white")
    draw = ImageDraw.Draw(sheet)
    ids = batch.get("text_ids_mlm", batch.get("text_ids"))
    for i, image in enumerate(images):
        array = image.permute(1, 2, 0).numpy().copy()
        if "image_mask" in batch:
            side = int(batch["image_mask"].shape[1] ** 0.5)
            patch = array.shape[0] // side
            mask = batch["image_mask"][i].cpu().view(side, side).numpy()
            array[mask.repeat(patch, 0).repeat(patch, 1)] = 128
        x, y = i % 4 * cell, i // 4 * (cell + text_height)
        sheet.paste(Image.fromarray(array).resize((cell - 4, cell - 4), Image.Resampling.NEAREST), (x + 2, y + 2))
        if ids is not None:
            length = int(batch["text_masks"][i].sum())
            words = tokenizer.decode(ids[i, 1 : length - 1].tolist()).split()
            lines = [""]
            for word in words:
                if draw.textlength(f"{lines[-1]} {word}") > cell - 10:
                    lines.append("")
                lines[-1] = f"{lines[-1]} {word}".strip()
            draw.multiline_text((x + 4, y + cell), "\n".join(lines[:5]), fill="black")
    return np.asarray(sheet)
