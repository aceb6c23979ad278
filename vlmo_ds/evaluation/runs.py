"""What evaluations share: a run's weights in a plain module, and samples split over ranks.

Weights are whole on every rank, whatever ZeRO stage trained them, and no forward pass has a collective in it: the numbers
do not depend on how a run was or is spread.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import EvaluationConfig, HeldOutConfig, Recipe, RecipeError
from vlmo_ds.data.loader import Told, collate, raised
from vlmo_ds.data.shards import RawSample, Shard, list_shards
from vlmo_ds.data.storage import DataError
from vlmo_ds.data.tokenizer import load_tokenizer
from vlmo_ds.data.transforms import EncodedImage, pixels, square
from vlmo_ds.distributed import heartbeat
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.families.finished import find_stage, load_model
from vlmo_ds.families.step import FamilyModel
from vlmo_ds.progress import progress
from vlmo_ds.weights_file import RESULTS


def open_run(
    path: Path, call: str, weights: str | None = None
) -> tuple[Path, Recipe, FamilyModel, PreTrainedTokenizerBase]:
    """(run, recipe, model on this machine's device, tokenizer) of a run's folder, or of a stage's folder of weights in it.

    call: what is asked of the model, which a stage has to have trained; weights: as of find_stage.
    """
    run, recipe, folder = find_stage(path, call, weights)
    model = load_model(recipe, folder)
    if torch.cuda.is_available():
        model.cuda()
    return run, recipe, model, load_tokenizer(str(run / "tokenizer"), *recipe.family.tokenizer)


def square_pixels(data: bytes, size: int, name: str) -> Tensor:
    """[3, S, S] uint8, as in validation: the whole picture, resized to a square."""
    try:
        return torch.from_numpy(pixels(square(EncodedImage(data), size, np.random.default_rng(0))).copy())
    except ValueError as error:
        raise DataError(f"{name}: {error}") from None


class Texts(NamedTuple):
    """Tokenised texts: ids [T, L] int64, padded, and how many tokens each has, [T] int64."""

    ids: Tensor
    lengths: Tensor

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """text_ids and text_masks of these, trimmed to the longest."""
        lengths = self.lengths[rows]
        length = int(lengths.max())
        return {
            "text_ids": self.ids[rows][:, :length],
            "text_masks": (torch.arange(length)[None] < lengths[:, None]).long(),
        }

    def part(self, rows: Tensor | slice) -> Texts:
        return Texts(self.ids[rows], self.lengths[rows])


def word_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_text_len: int) -> list[list[int]]:
    return tokenizer(list(texts), truncation=True, max_length=max_text_len)["input_ids"]


def tokenised(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_text_len: int) -> Texts:
    return padded(word_ids(texts, tokenizer, max_text_len), tokenizer, max_text_len)


def padded(encoded: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, max_text_len: int) -> Texts:
    samples: list[dict[str, np.ndarray | int]] = [{"text_ids": np.asarray(ids, dtype=np.int64)} for ids in encoded]
    batch = collate(samples, max_text_len, tokenizer.pad_token_id or 0)
    return Texts(batch["text_ids"], batch["text_masks"].sum(1))


def share(total: int, batch: int, collector: Collector, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """compute(rows) for all rows 0 .. total-1, split over ranks and put together in order on every rank."""
    per_rank = -(-total // collector.world_size)
    mine = torch.arange(per_rank) + collector.rank * per_rank
    mine = mine.clamp(max=total - 1)  # every rank computes as many rows; those past the end are thrown away
    parts = []
    for rows in mine.split(batch):
        heartbeat.beat("evaluation")
        parts.append(compute(rows))
    local = torch.cat(parts)
    with heartbeat.waiting():
        return collector.gather(local)[:total]


Read = Callable[[RawSample], tuple[dict[str, bytes], list[dict]]]  # pictures by their names in a batch, and entries


Place = tuple[Shard, int]  # a shard and a row of it


def places_of(shards: Sequence[Shard]) -> list[Place]:
    """Where the samples of a set lie, in its order."""
    return [(shard, row) for shard in shards for row in range(shard.samples)]


def names_and_pictures(config: HeldOutConfig, read: Read) -> Iterator[tuple[str, list[bytes]]]:
    """Name and pictures of every sample of a set. DataError where one could not be used."""
    for shard, row in places_of(list_shards(config.shards)):
        raw = shard.read(row)
        pictures, _ = read(raw)
        yield raw.name, list(pictures.values())


class Samples(Dataset):
    """This rank's samples of some shards, every world_size-th, each made into a list of examples by a function; unread: what one that cannot be
    read is made into, None: it ends the evaluation."""

    def __init__(
        self,
        shards: Sequence[Shard],
        make: Callable[[RawSample], list[dict]],
        collector: Collector,
        unread: Callable[[DataError], list[dict]] | None = None,
    ):
        self.places, self.make, self.unread = places_of(shards)[collector.rank :: collector.world_size], make, unread
        self.silent = collector.rank > 0  # one rank shows how far it is

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> list[dict]:
        shard, row = self.places[number]
        try:
            return self.make(shard.read(row))
        except DataError as error:
            if self.unread is None:
                raise
            return self.unread(error)


def examples_in_batches(samples: Samples, size: int, workers: int, about: str) -> Iterator[list[dict]]:
    """The examples of all samples in order, `size` at a time."""
    loader = DataLoader(Told(samples), batch_size=None, num_workers=workers)
    waiting: list[dict] = []
    heartbeat.beat(f"evaluation: {about}")
    for examples in progress(raised(loader), about, len(samples), "samples", samples.silent):
        waiting += examples
        while len(waiting) >= size:
            heartbeat.beat(f"evaluation: {about}")
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting


@torch.no_grad()
def best_classes(
    model: FamilyModel,
    call: str,
    read: Read,
    text: str,
    config: EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase,
    collector: Collector,
    also: Mapping[str, Tensor | int] | None = None,
) -> Iterator[tuple[dict, int]]:
    """(entry, number of the class with the highest logit) of this rank's share of the questions or sentences.

    call: the model's call that gives logits; read: a sample's pictures by their names in its batch, and its entries;
    text: the field of an entry that holds its text; also: what the call is given beside a batch.
    """
    for entries, batch in batches_of_entries(model, call, read, text, config, tokenizer, collector):
        yield from zip(entries, model({**batch, **(also or {})}, call).argmax(1).tolist(), strict=True)


@torch.no_grad()
def batches_of_entries(
    model: FamilyModel,
    about: str,
    read: Read,
    text: str,
    config: EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase,
    collector: Collector,
) -> Iterator[tuple[list[dict], dict[str, Tensor]]]:
    """(entries, their texts and pictures on the model's device) of this rank's share, a batch at a time. Arguments as
    best_classes'; about: what is being done."""
    model.eval()
    device = next(model.parameters()).device
    size, length = model.config.image_size, model.config.max_text_len

    def make(raw: RawSample) -> list[dict]:
        pictures, entries = read(raw)
        images = {name: square_pixels(data, size, raw.name) for name, data in pictures.items()}
        ids = word_ids([entry[text] for entry in entries], tokenizer, length)
        return [{"images": images, "ids": row, "entry": entry} for row, entry in zip(ids, entries, strict=True)]

    samples = Samples(list_shards(config.shards), make, collector)
    for batch in examples_in_batches(samples, config.batch_size, config.workers, about):
        texts = padded([example["ids"] for example in batch], tokenizer, length)
        inputs = texts.batch(torch.arange(len(batch)))
        inputs |= {name: torch.stack([e["images"][name] for e in batch]) for name in batch[0]["images"]}
        yield [example["entry"] for example in batch], {name: value.to(device) for name, value in inputs.items()}


def parser(
    about: str,
    shards: str = "held-out shards (default: the recipe's)",
    output: str = "write the metrics to this JSON file",
) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run", type=Path, help="a run's directory, or checkpoints/<stage>/final inside it")
    choose_weights(made)
    made.add_argument("--shards", nargs="+", help=shards)
    made.add_argument("--output", type=Path, help=output)
    return made


def choose_weights(parser: argparse.ArgumentParser) -> None:
    """The option --weights."""
    about = "a stage's last weights, their moving average, or those of the best score (default: the last)"
    parser.add_argument("--weights", choices=RESULTS, help=about)


def check_outputs(**files: Path | None) -> None:
    """RecipeError where a file that is to be written cannot be, by its argument's name; folders above it are made."""
    for name, file in files.items():
        if file is None:
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"--{name}: {file} cannot be written ({error.strerror})") from None
        if file.is_dir() or not os.access(file.parent, os.W_OK):
            raise RecipeError(f"--{name}: {file} cannot be written: it is a folder, or the one above it is read-only")


def command(main: Callable[[], None]) -> int:
    """Exit status of an evaluation's command line; settings and files at fault are told in one line."""
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def as_json(metrics: Any) -> bytes:
    return json.dumps(metrics, indent=1, ensure_ascii=False).encode()
