"""What a person sees of a run: metrics.jsonl, TensorBoard, the progress line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmo_ds.data.storage import write_atomically
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.models.vlmo import StepOutput

METRICS = "metrics.jsonl"


def global_metrics(
    outputs: list[StepOutput], counts: Mapping[str, float], collector: Collector
) -> tuple[dict[str, float], dict[str, float]]:
    """One optimiser step's metrics over all ranks and micro-batches, and the sums of `counts`, in one all-reduce."""
    names = [f"loss/{task}" for task in outputs[0].losses]
    ratio_names, value_names = list(outputs[0].ratios), list(outputs[0].values)
    share = 1.0 / (len(outputs) * collector.world_size)
    local = [sum(o.losses[t].detach().double() for o in outputs) * share for t in outputs[0].losses]
    for name in ratio_names:
        local += [sum(o.ratios[name][i].detach().double() for o in outputs) for i in (0, 1)]
    local += [sum(o.values[name].double() for o in outputs) * share for name in value_names]
    device = local[0].device
    local += [torch.tensor(count, dtype=torch.float64) for count in counts.values()]
    total = collector.sum(torch.stack([x.to(device) for x in local]))
    values = iter(total.tolist())
    metrics = {name: next(values) for name in names}
    metrics["loss"] = sum(metrics.values())
    for name in ratio_names:
        numerator, denominator = next(values), next(values)
        metrics[name] = numerator / max(denominator, 1.0)
    metrics |= {name: next(values) for name in value_names}
    return metrics, {name: next(values) for name in counts}


class Monitor:
    """Writes on rank 0; silent elsewhere."""

    def __init__(self, run: Path, rank: int, total_steps: int):
        self.active = rank == 0
        self.run, self.total_steps = run, total_steps
        self.file = self.tensorboard = None
        self.shown_at = 0.0

    def begin(self, stage: str, step: int, offset: int) -> None:
        """Opens the files at a stage's step; lines past it (of a run that died later) are cut off."""
        self.stage, self.offset = stage, offset
        self.started, self.samples = time.monotonic(), 0
        if not self.active:
            return
        self.close()
        path = self.run / METRICS
        if path.exists():
            kept = []
            for line in path.read_text().splitlines():
                record = json.loads(line) if line.endswith("}") else {"step_of_run": self.total_steps + 1}
                if record["step_of_run"] <= offset + step:
                    kept.append(line + "\n")
            write_atomically(path, "".join(kept).encode())
        from torch.utils.tensorboard import SummaryWriter  # a second, on rank 0 alone

        self.file = path.open("a")
        self.tensorboard = SummaryWriter(self.run / "tensorboard", purge_step=offset + step + 1)

    def log(self, step: int, steps: int, metrics: Mapping[str, float], samples: int) -> None:
        """step: optimiser steps done in this stage; samples: of this step, over all ranks."""
        self.samples += samples
        if not self.active:
            return
        number = self.offset + step
        record = {"stage": self.stage, "step": step, "step_of_run": number, **metrics}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()
        rate = self.samples / max(time.monotonic() - self.started, 1e-9)
        for name, value in {**metrics, "throughput/samples_per_second": rate}.items():
            self.tensorboard.add_scalar(f"{self.stage}/{name}", value, number)
        if step == steps or time.monotonic() - self.shown_at > 2:
            self.shown_at = time.monotonic()
            parts = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in metrics.items() if k.startswith("loss/"))
            left = (steps - step) * samples / rate
            print(
                f"{self.stage:>8} {step:>6}/{steps}  loss {metrics['loss']:.4f} ({parts})  lr {metrics['lr']:.2e}  "
                f"{rate:.1f} samples/s  {int(left) // 60}:{int(left) % 60:02d} left",
                flush=True,
            )

    def images(self, step: int, batch: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase | None) -> None:
        if self.active and ("image" in batch or "image_0" in batch):
            sheet = contact_sheet(batch, tokenizer)
            self.tensorboard.add_image(f"{self.stage}/samples", sheet, self.offset + step, dataformats="HWC")

    def close(self) -> None:
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.tensorboard.close()
            self.file = self.tensorboard = None


def contact_sheet(
    batch: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase | None, count: int = 8, cell: int = 224
) -> np.ndarray:
    """[H, W, 3] uint8: inputs as the model sees them, masked patches grey, masked words as [MASK]."""
    images = batch.get("image", batch.get("image_0"))[:count].cpu()
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
            words = tokenizer.decode([t for t in ids[i].tolist() if t != 0][1:-1]).split()
            lines = [""]
            for word in words:
                if draw.textlength(f"{lines[-1]} {word}") > cell - 10:
                    lines.append("")
                lines[-1] = f"{lines[-1]} {word}".strip()
            draw.multiline_text((x + 4, y + cell), "\n".join(lines[:5]), fill="black")
    return np.asarray(sheet)
