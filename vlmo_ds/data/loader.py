"""From shards to batches: what a stage's tasks need, as tensors, in the order that order.py says."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import DataConfig
from vlmo_ds.data.masking import mask_blocks, mask_tokens
from vlmo_ds.data.order import SampleOrder, generator
from vlmo_ds.data.shards import DataError, RawSample, list_shards, read_members, read_sample
from vlmo_ds.data.transforms import TRANSFORMS, decode, pixels

REPLACEMENTS = 8  # tries to replace a sample that cannot be read, before giving up
CHECKED_AT_START = 256


@dataclass(frozen=True)
class SampleSpec:
    """What is made of a sample."""

    image: bool
    text: bool
    mask_text: bool
    mask_image: bool
    image_size: int
    window: int
    max_text_len: int
    seed: int


def spec_for(tasks: Mapping[str, float], image_size: int, patch_size: int, max_text_len: int, seed: int) -> SampleSpec:
    return SampleSpec(
        image=not tasks.keys() <= {"textmlm"},
        text=not tasks.keys() <= {"mim"},
        mask_text=bool({"mlm", "textmlm"} & tasks.keys()),
        mask_image="mim" in tasks,
        image_size=image_size,
        window=image_size // patch_size,
        max_text_len=max_text_len,
        seed=seed,
    )


class BatchDataset(Dataset):
    """Item i is this rank's part of global micro-batch i. Whatever is random is a function of (seed, epoch, sample id).

    A sample that cannot be decoded is replaced by the next one of its shard; `replaced` counts them.
    """

    def __init__(
        self,
        data: DataConfig,
        spec: SampleSpec,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
    ):
        self.data, self.spec, self.tokenizer = data, spec, tokenizer
        self.shards = list_shards(data.shards)
        self.order = SampleOrder(
            [s.samples for s in self.shards], lanes=data.lanes, window=data.shuffle, seed=spec.seed
        )
        self.batch_size, self.global_size = batch_size, batch_size * world_size
        self.first = rank * batch_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        places = self.order.batch(index, self.global_size)[self.first : self.first + self.batch_size]
        samples, replaced = [], 0
        for epoch, shard, row in places:
            sample, skipped = self.load(epoch, shard, row)
            samples.append(sample)
            replaced += skipped
        return collate(samples, self.spec.max_text_len) | {"replaced": torch.tensor(replaced)}

    def load(self, epoch: int, shard: int, row: int) -> tuple[dict[str, np.ndarray | int], int]:
        errors = []
        for step in range(REPLACEMENTS):
            place = self.shards[shard]
            try:
                return self.make(read_sample(place.path, (row + step) % place.samples), epoch), step
            except (DataError, ValueError) as error:
                errors.append(str(error))
                warnings.warn(f"replaced a sample: {error}", stacklevel=2)
        raise DataError(f"{REPLACEMENTS} samples in a row cannot be read; the first: {errors[0]}")

    def make(self, raw: RawSample, epoch: int) -> dict[str, np.ndarray | int]:
        spec, sample_id = self.spec, raw.sample_id
        rng = generator(spec.seed, 3, epoch, sample_id)
        out: dict[str, np.ndarray | int] = {"sample_id": sample_id, "image_id": raw.image_id}
        if spec.image:
            try:
                image = decode(raw.image)
            except DataError:
                raise
            except ValueError as error:
                raise DataError(f"{raw.name}: {error}") from None
            out["image"] = pixels(TRANSFORMS[self.data.transform](image, spec.image_size, rng))
        if spec.mask_image:
            out["image_mask"] = mask_blocks(spec.window, self.data.mim_ratio, rng)
        if spec.text:
            captions = raw.captions
            encoding = self.tokenizer(
                captions[int(rng.integers(len(captions)))], truncation=True, max_length=spec.max_text_len
            )
            ids = np.asarray(encoding["input_ids"], dtype=np.int64)
            if len(ids) < 3:
                raise DataError(f"{raw.name} has an empty caption after tokenisation")
            out["text_ids"] = ids
            if spec.mask_text:
                out["text_ids_mlm"], out["text_labels_mlm"] = mask_tokens(
                    ids,
                    encoding.word_ids(),
                    probability=self.data.mlm_probability,
                    whole_word=self.data.whole_word_masking,
                    mask_id=self.tokenizer.mask_token_id,
                    vocab_size=len(self.tokenizer),
                    rng=rng,
                )
        return out


def collate(samples: list[dict[str, np.ndarray | int]], max_text_len: int) -> dict[str, Tensor]:
    """Stacks samples; texts are padded to the longest, rounded up to a multiple of 8 (at most max_text_len)."""
    batch: dict[str, Tensor] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if key.startswith("text_"):
            fill = -100 if key == "text_labels_mlm" else 0
            length = min(-(-max(len(v) for v in values) // 8) * 8, max_text_len)
            stacked = np.full((len(values), length), fill, dtype=np.int64)
            for row, value in zip(stacked, values, strict=True):
                row[: len(value)] = value
            batch[key] = torch.from_numpy(stacked)
        elif isinstance(values[0], int):
            batch[key] = torch.tensor(values, dtype=torch.int64)
        else:
            batch[key] = torch.from_numpy(np.stack(values))
    if "text_ids" in batch:
        batch["text_masks"] = (batch["text_ids"] != 0).long()
    return batch


def batches(dataset: BatchDataset, start: int, stop: int, workers: int) -> Iterator[dict[str, Tensor]]:
    """Batches start .. stop-1 in order, whatever the number of workers."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
    )
    return iter(loader)


def check_samples(dataset: BatchDataset) -> int:
    """Reads samples from all over the shards before training; returns how many were read.

    Raises DataError naming the first bad sample when more than max_bad_fraction of them are bad.
    """
    counts = [s.samples for s in dataset.shards]
    starts = np.concatenate(([0], np.cumsum(counts)))
    chosen = np.unique(np.linspace(0, starts[-1] - 1, min(CHECKED_AT_START, starts[-1])).astype(np.int64))
    bad = []
    for place in chosen:
        shard = int(np.searchsorted(starts, place, side="right")) - 1
        try:
            path, row = dataset.shards[shard].path, int(place - starts[shard])
            if row >= len(read_members(path)):
                raise DataError(f"shard {path} holds fewer samples than its index says: prepare it again")
            dataset.make(read_sample(path, row), 0)
        except (DataError, ValueError) as error:
            bad.append(str(error))
    if len(bad) > dataset.data.max_bad_fraction * len(chosen):
        raise DataError(
            f"{len(bad)} of {len(chosen)} samples looked at cannot be used (max_bad_fraction is "
            f"{dataset.data.max_bad_fraction}); the first: {bad[0]}"
        )
    return len(chosen)
