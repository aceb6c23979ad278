"""The data pipeline: images per second and core, loader workers, memory, time to the first batch after a resume.

    python benchmarks/data.py --shards data/coco/train [--output FILE]

The usual way to write it (Pillow, crop, resize, float tensor, normalise) runs in the same process on the same crops.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from common import measured, write_results
from PIL import Image

from vlmo_ds.config import DataConfig
from vlmo_ds.data.index import INDEX, ShardIndex, dump_index
from vlmo_ds.data.loader import BatchDataset, batches, spec_for
from vlmo_ds.data.order import generator
from vlmo_ds.data.shards import list_shards
from vlmo_ds.data.tokenizer import train_tokenizer
from vlmo_ds.data.transforms import BICUBIC, TRANSFORMS, EncodedImage, pixels

BATCH = 64


class Recorded(EncodedImage):
    """Keeps the box that a transform asks for."""

    def resized(self, width, height, box=None):
        self.box = box or (0, 0, self.width, self.height)
        return super().resized(width, height, box)


def usual(data: bytes, box: tuple, size: int) -> torch.Tensor:
    """As training code usually has it; the arithmetic of torchvision's RandomResizedCrop, ToTensor and Normalize."""
    image = Image.open(io.BytesIO(data)).convert("RGB").crop(box).resize((size, size), BICUBIC)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return tensor.sub_(0.5).div_(0.5)


def decoding(images: list[bytes], size: int, repeats: int) -> dict:
    """One process, one thread: encoded bytes to a batch."""
    torch.set_num_threads(1)
    boxes = []
    for i, data in enumerate(images):
        image = Recorded(data)
        TRANSFORMS["crop_flip"](image, size, generator(i))
        boxes.append(image.box)

    pairs = list(zip(images, boxes, strict=True))

    def the_usual_way(part: list) -> torch.Tensor:
        return torch.stack([usual(data, box, size) for data, box in part])

    def ours(part: list) -> torch.Tensor:
        return torch.from_numpy(np.stack([pixels(EncodedImage(data).resized(size, size, box)) for data, box in part]))

    def ours_normalised(part: list) -> torch.Tensor:
        return ours(part).to(torch.float32).div_(255).sub_(0.5).div_(0.5)

    def batchwise(way: Callable) -> Callable:
        return lambda: [way(pairs[i : i + BATCH]) for i in range(0, len(pairs), BATCH)]

    seconds = {way.__name__: measured(batchwise(way), repeats, 1) for way in (the_usual_way, ours, ours_normalised)}
    halved = [min((b[2] - b[0]), (b[3] - b[1])) >= 2 * size for b in boxes]
    result = {
        "what": f"decoding to batches of {BATCH} at {size} px, one thread",
        **{f"images_per_second_{name}": round(len(images) / s, 1) for name, s in seconds.items()},
        "ratio": round(seconds["the_usual_way"] / seconds["ours"], 2),
        "ratio_with_normalisation_on_the_cpu": round(seconds["the_usual_way"] / seconds["ours_normalised"], 2),
        "share_decoded_at_reduced_size": round(float(np.mean(halved)), 3),
    }
    for name, chosen in (("crops", boxes), ("whole_pictures", [None] * len(images))):
        difference = compared(images, chosen, size)
        result[f"mean_difference_of_{name}"] = round(float(np.abs(difference).mean()), 3)
        result[f"psnr_of_{name}_db"] = round(float(10 * np.log10(255**2 / np.square(difference).mean())), 1)
    return result


def compared(images: list[bytes], boxes: list[tuple | None], size: int) -> np.ndarray:
    """Differences of our pixels from those of a whole decode and Pillow's bicubic, in steps of 255."""
    differences = []
    for data, box in zip(images, boxes, strict=True):
        ours = EncodedImage(data)
        wanted = Image.open(io.BytesIO(data)).convert("RGB").crop(box or (0, 0, ours.width, ours.height))
        wanted = np.asarray(wanted.resize((size, size), BICUBIC), dtype=np.int64)
        differences.append(np.asarray(ours.resized(size, size, box)) - wanted)
    return np.stack(differences)


def texts(shards: list[str]) -> list[str]:
    return [text for shard in list_shards(shards) for row in range(shard.samples) for text in shard.read(row).captions]


def dataset(shards: list[str], size: int, tokenizer) -> BatchDataset:
    data = DataConfig(shards=shards, transform="crop_flip", lanes=16)
    spec = spec_for({"image", "text", "masked_text"}, size, 16, 40, 0)
    return BatchDataset(data, spec, tokenizer, rank=0, world_size=1, batch_size=BATCH)


def unique_megabytes(process: psutil.Process) -> float:
    return process.memory_full_info().uss / 1e6


def loading(shards: list[str], size: int, workers: int, count: int) -> dict:
    """Shards to batches of images and masked texts. Without workers: one core does it all."""
    torch.set_num_threads(1)
    stream = batches(dataset(shards, size, train_tokenizer(texts(shards), 2000)), 0, count, workers)
    next(stream)
    start = time.perf_counter()
    memory = []
    for number, _ in enumerate(itertools.islice(stream, count - 1)):
        if number in (count // 3, count - 3):
            memory.append(max((unique_megabytes(c) for c in psutil.Process().children()), default=0.0))
    seconds = time.perf_counter() - start
    return {
        "what": f"loading batches of {BATCH} at {size} px, {workers} workers",
        "images_per_second": round((count - 1) * BATCH / seconds, 1),
        "megabytes_of_its_own_per_worker": [round(m, 1) for m in memory],
    }


def in_a_process(*arguments: str | list[str]) -> dict:
    """What this script prints, called for a part of it."""
    *options, shards = arguments
    command = [sys.executable, __file__, *options, "--shards", *shards]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def resuming(shard: Path, samples: int) -> dict:
    """A fresh process: start to the first batch at a position of a simulated set, whose shards are links to one."""
    with tempfile.TemporaryDirectory() as folder:
        index = list_shards([str(shard)])[0].index
        count = samples // index.samples
        for number in range(count):
            os.symlink(shard.resolve(), Path(folder) / f"{number:06d}.tar")
        record = ShardIndex(index.samples, index.bytes, index.offsets, index.lengths)
        (Path(folder) / INDEX).write_bytes(dump_index({f"{n:06d}.tar": record for n in range(count)}))
        size = (Path(folder) / INDEX).stat().st_size
        seconds = {}
        for name, position in (("start", 0), ("middle", samples)):
            seconds[name] = in_a_process("--first_batch", str(position // BATCH), [folder])["seconds"]
    return {
        "what": f"first batch of a set of {count * index.samples:,} samples in {count:,} shards",
        "index_megabytes": round(size / 1e6, 1),
        "seconds_at_sample_0": round(seconds["start"], 2),
        f"seconds_at_sample_{samples:,}": round(seconds["middle"], 2),
    }


def first_batch(shards: list[str], number: int) -> None:
    tokenizer = train_tokenizer(["a picture of words"] * 10, 60)
    start = time.perf_counter()
    dataset(shards, 224, tokenizer)[number]
    print(json.dumps({"seconds": time.perf_counter() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", nargs="+", required=True, help="photographs with captions")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batches", type=int, default=60, help="batches to load with workers (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=10_000_000, help="position of the resume (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--first_batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_batch is not None:
        first_batch(args.shards, args.first_batch)
        return
    if args.workers is not None:
        print(json.dumps(loading(args.shards, 224, args.workers, args.batches)))
        return
    shards = list_shards(args.shards)
    images = [shards[0].read(row).image for row in range(min(256, shards[0].samples))]
    results = []
    for job in (
        lambda: decoding(images, 224, args.repeats),
        lambda: decoding(images, 96, args.repeats),
        *(partial(in_a_process, "--workers", str(n), "--batches", str(args.batches), args.shards) for n in (0, 1, 2)),
        lambda: resuming(Path(shards[0].url), args.samples),
    ):
        results.append(job())
        print(json.dumps(results[-1]), flush=True)
    if args.output:
        write_results(args.output, results)


if __name__ == "__main__":
    main()
