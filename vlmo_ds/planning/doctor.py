"""What is likely to go wrong with a run, before it: looks at its data and settings, and lets every stage learn one batch by heart.

    vlmo doctor --recipe FILE [--stages A,B] [--seconds 20] [key=value ...]

A task whose loss does not fall on a single batch will not fall on many: its labels, its pairing or its learning rate are wrong. Exit status:
0 nothing found, 1 something to look at, 2 a setting or file that cannot be used.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import Recipe, RecipeError, StageConfig, number
from vlmo_ds.data.loader import BatchDataset, Streams
from vlmo_ds.data.shards import RawSample
from vlmo_ds.data.storage import DataError
from vlmo_ds.data.transforms import EncodedImage
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.families.interface import IMAGES, TEXTS
from vlmo_ds.families.step import inputs_of
from vlmo_ds.recipe_file import QUICKSTART, load_recipe
from vlmo_ds.training.command import chosen_stages
from vlmo_ds.training.host import prepare_cpu
from vlmo_ds.training.loop import build_dataset, build_model
from vlmo_ds.training.optim import parameter_groups
from vlmo_ds.training.run import count_answers, make_tokenizer

LOOKED_AT = 256  # samples of a stage
BATCH = 8  # samples that are learnt by heart
STEPS, LEAST_STEPS = 200, 60  # of them, at most, and to judge by
FALLS = 0.7  # of the first loss: what is above it after all steps has not fallen
USUAL_LR = (1e-6, 3e-3)
REPEATED, CUT, UNKNOWN, ALIKE = 0.05, 0.1, 0.02, 0.2  # shares that are worth a word
PIECES_A_WORD = 3.0
CANDIDATES = 16  # of a contrastive row, at least
BLANK = 2.0  # standard deviation of pixels, of 255, below which a picture shows nothing


def samples_of(dataset: BatchDataset) -> Iterator[RawSample]:
    """Some of all sources, from all over their shards; those that cannot be read are left out."""
    for number_of, source in enumerate(dataset.sources):
        for stored in np.unique(np.linspace(0, source.total - 1, min(LOOKED_AT, source.total)).astype(np.int64)):
            shard, row = source.stored(int(stored))
            try:
                yield dataset.shards[number_of][shard].read(row)
            except DataError:
                continue


# ---- data ----


def about_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[str]:
    """What is odd about captions."""
    found: list[str] = []
    if not texts:
        return found
    text, times = Counter(texts).most_common(1)[0]
    if times > max(2, REPEATED * len(texts)):
        found.append(
            f"{times / len(texts):.0%} of the captions are '{text[:60]}': contrast takes its copies for wrong ones (model.positives: image, "
            "or leave them out)"
        )
    encoded = tokenizer(list(texts), add_special_tokens=True)["input_ids"]
    cut = sum(len(ids) > longest for ids in encoded) / len(texts)
    if cut > CUT:
        found.append(f"{cut:.0%} of the captions are longer than max_text_len {longest} and lose their ends")
    pieces = sum(len(ids) - 2 for ids in encoded)
    words = sum(len(text.split()) for text in texts)
    if pieces > PIECES_A_WORD * words:
        found.append(
            f"the tokenizer cuts a word into {pieces / max(words, 1):.1f} pieces: it does not know this language; take another (tokenizer.name)"
        )
    unknown = sum(ids.count(tokenizer.unk_token_id) for ids in encoded) / max(pieces, 1)
    if tokenizer.unk_token_id is not None and unknown > UNKNOWN:
        found.append(f"{unknown:.0%} of the word pieces are unknown to the tokenizer: it was made for other texts")
    return found


def about_images(pictures: Sequence[bytes], size: int) -> list[str]:
    """What is odd about pictures. size: pixels a side that the model takes."""
    small, blank = 0, 0
    thumbnails: list[np.ndarray] = []
    for data in pictures:
        try:
            picture = EncodedImage(data)
            pixels = np.asarray(picture.resized(8, 8).convert("L"), dtype=np.float64)
        except ValueError:
            continue
        small += min(picture.width, picture.height) < size / 2
        blank += float(pixels.std()) < BLANK
        thumbnails.append(pixels)
    found: list[str] = []
    if not thumbnails:
        return found
    total = len(thumbnails)
    repeated = 1 - len(set(pictures)) / len(pictures)
    if repeated > ALIKE:
        found.append(f"{repeated:.0%} of the pictures are copies of others, byte by byte")
    elif total > 1 and float(np.std(thumbnails, axis=0).mean()) < BLANK:
        found.append("the pictures all look alike: there is little to tell them apart by")
    if blank > REPEATED * total:
        found.append(f"{blank / total:.0%} of the pictures show one colour")
    if small > total / 2:
        found.append(f"{small / total:.0%} of the pictures have less than half of image_size {size} on a side")
    return found


# ---- settings ----


def about_settings(stage: StageConfig) -> list[str]:
    found, lr = [], stage.optimizer.lr
    low, high = USUAL_LR
    if not low <= lr <= high:
        found.append(f"optimizer.lr is {lr:g}; usual with AdamW are {low:g} to {high:g}")
    if stage.schedule.warmup_steps == 0 and stage.init.weights == "fresh":
        found.append("schedule.warmup_steps is 0: fresh weights want a warm-up")
    contrasts = any("encode_text" in task.gives for task in stage.chosen.values())
    alone = stage.micro_batch_size if stage.micro_batch_size and not stage.gradient_cache else stage.global_batch_size
    if contrasts and alone < CANDIDATES:
        found.append(
            f"contrast has {alone} candidates a rank in each forward pass, fewer than {CANDIDATES}: raise micro_batch_size, or set gradient_cache"
        )
    return found


# ---- learning by heart ----


class Learnt(NamedTuple):
    """A task's loss before the first and after the last of so many steps."""

    task: str
    first: float
    last: float
    steps: int

    @property
    def fault(self) -> str:
        if not math.isfinite(self.last):
            return f"{self.task}: the loss is no number after {self.steps} steps: the learning rate is too high, or labels are broken"
        if self.steps >= LEAST_STEPS and self.last > FALLS * self.first:
            return f"{self.task}: does not fall on one batch of {BATCH} samples, {self.first:.3f} to {self.last:.3f} in {self.steps} steps"
        return ""


def by_heart(recipe: Recipe, stage: StageConfig, dataset: Streams, seconds: float) -> list[Learnt]:
    """Trains a fresh model of the stage on its first batch."""
    model = build_model(recipe, stage, None, "a fresh initialisation", Collector()).train()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    model.open()
    batch = inputs_of(dataset[0], device, negative_seed=1, step_seed=1)
    optimizer = torch.optim.AdamW(parameter_groups(model, stage), betas=stage.optimizer.betas, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    first: dict[str, float] = {}
    started, steps = time.monotonic(), 0
    while True:
        torch.manual_seed(1)
        out = model(batch)
        last = {task: float(out.values[f"loss/{task}"]) for task in stage.tasks}
        first = first or last
        if steps == STEPS or time.monotonic() - started > seconds or not all(map(math.isfinite, last.values())):
            return [Learnt(task, first[task], last[task], steps) for task in stage.tasks]
        optimizer.zero_grad()
        out.loss.backward()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (steps + 1) / 10)
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.optimizer.gradient_clipping or 1.0)
        optimizer.step()
        model.settle([out.seen], taken=True)
        steps += 1


def about_data(
    recipe: Recipe, stage: StageConfig, dataset: BatchDataset, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    found, raw = [], list(samples_of(dataset))
    if stage.reads & TEXTS and "questions" not in stage.reads:
        texts = [
            text for sample in raw for text in (sample.asked if "image_pair" in stage.reads else captions_of(sample))
        ]
        found += about_texts(texts, tokenizer, recipe.model.max_text_len)
    if stage.reads & IMAGES and "image_pair" not in stage.reads:
        found += about_images(
            [picture for sample in raw if (picture := picture_of(sample))], recipe.model_of(stage).image_size
        )
    return found


def examine(
    recipe: Recipe, stage: StageConfig, tokenizer: PreTrainedTokenizerBase, seconds: float
) -> tuple[list[str], list[Learnt]]:
    """(what to look at, what was learnt) of a stage."""
    found = about_settings(stage)
    streams = {
        name: one.model_copy(update={"global_batch_size": min(BATCH, one.global_batch_size)})
        for name, one in stage.streams.items()
    }
    size = min(BATCH, stage.global_batch_size)
    alone = stage.model_copy(
        update={"global_batch_size": size, "micro_batch_size": None, "gradient_cache": False, "streams": streams}
    )
    dataset = build_dataset(recipe, alone, tokenizer, Collector())
    for stream, part in alone.parts.items():
        told = about_data(recipe, part, dataset.parts[stream], tokenizer)
        found += [f"streams.{stream}: {what}" if len(alone.parts) > 1 and stream else what for what in told]
    learnt = by_heart(recipe, alone, dataset, seconds)
    return found + [one.fault for one in learnt if one.fault], learnt


def captions_of(sample: RawSample) -> list[str]:
    try:
        return sample.captions[:1]
    except DataError:
        return []


def picture_of(sample: RawSample) -> bytes:
    try:
        return sample.image
    except DataError:
        return b""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vlmo doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default=QUICKSTART, metavar="FILE")
    parser.add_argument("--stages", metavar="A,B", help="only these stages (default: all)")
    parser.add_argument(
        "--seconds", type=number(float), default=20, help="of learning by heart, a stage (default: %(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe to change")
    args = parser.parse_intermixed_args(argv)
    faults = 0
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        stages = chosen_stages(recipe, args.stages)
        prepare_cpu()
        tokenizer = make_tokenizer(recipe)
        recipe.model.take_words(tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            recipe.model.vqav2_label_size = count_answers(recipe, Path(folder))
        for stage in stages:
            found, learnt = examine(recipe, stage, tokenizer, args.seconds)
            for one in learnt:
                print(
                    f"{stage.name}: {one.task}: {one.first:.3f} to {one.last:.3f} in {one.steps} steps of one batch",
                    flush=True,
                )
            if any(one.steps < LEAST_STEPS for one in learnt):
                print(
                    f"{stage.name}: too slow here to judge by {learnt[0].steps} steps: raise --seconds, or take a smaller model",
                    flush=True,
                )
            for words in found:
                print(f"{stage.name}: LOOK AT THIS: {words}", flush=True)
            faults += len(found)
    except (RecipeError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{faults} things to look at" if faults else "nothing found that is wrong")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
