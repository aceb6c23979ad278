"""What contrast over a large global batch costs: seconds, memory and bytes on the wire of one rank.

    python benchmarks/collector.py [--global_batch 65536] [--rows 256] [--width 768] [--ranks 1 2 4 8] [--output FILE]

First one rank of many, whose own rows are given and whose other columns stand in memory: forward and backward of contrast in both
directions, with and without drawing a hard negative for every row, beside a plain version (all logits at once, negatives by a pass of
their own). "products" is the time over that of one product of own rows and all columns, of which 8 are needed; memory is the peak beyond
the features. Then real ranks (gloo) on this machine, 64 rows each: seconds, and the bytes that cross ranks as counted in the collectives
themselves, beside what `vlmo plan` counts; the latter also for more ranks than there are here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import measured, memory, write_results
from torch import Tensor

from vlmo_ds.distributed.collector import Collector
from vlmo_ds.distributed.measuring import OneOfMany, count_collectives
from vlmo_ds.distributed.rows import Draw, contrast, gumbel_noise, sample_negatives
from vlmo_ds.families.cost import contrast_wire
from vlmo_ds.families.interface import Load
from vlmo_ds.objectives.itm import draws_of
from vlmo_ds.training.host import prepare_cpu

ROWS_OF_A_RANK = 64


def unit(rows: int, width: int, seed: int, device: str) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=g), dim=1).to(device)


def plain(image: Tensor, text: Tensor, scale: Tensor, others: Tensor, draws: tuple[Draw, Draw] | None) -> Tensor:
    """All logits at once."""
    both = torch.cat((torch.stack((image, text), 1), others))
    label = torch.arange(len(image), device=image.device)
    loss = F.cross_entropy(scale * image @ both[:, 1].t(), label, reduction="sum")
    loss = loss + F.cross_entropy(scale * text @ both[:, 0].t(), label, reduction="sum")
    if draws is not None:
        with torch.no_grad():
            sample_negatives(image, both[:, 1], scale, draws[0])
            sample_negatives(text, both[:, 0], scale, draws[1])
    return loss / 2


def seconds_of_product(rows: int, columns: int, width: int, device: str) -> float:
    a, b = torch.randn(rows, width, device=device), torch.randn(columns, width, device=device)
    return measured(lambda: a @ b.t(), 5, 2)


def one_of_many(rows: int, columns: int, width: int, version: str, drawn: bool) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        prepare_cpu()
    image, text = (unit(rows, width, seed, device).requires_grad_() for seed in (0, 1))
    others = torch.stack([unit(columns - rows, width, seed, device) for seed in (2, 3)], 1)
    scale = torch.tensor(14.0, device=device, requires_grad=True)
    ids = torch.arange(columns, device=device)
    draws = tuple(Draw(seed, ids[:rows], ids, ids[:rows], ids) for seed in (0, 1)) if drawn else None

    def step() -> None:
        if version == "plain":
            plain(image, text, scale, others, draws).backward()
        else:
            contrast(image, text, scale, OneOfMany(others), draws).loss.backward()

    product = seconds_of_product(rows, columns, width, device)
    noise = measured(lambda: gumbel_noise(0, ids[:rows], ids[:1024]), 5, 2) * columns / 1024
    contrast(image[:8], text[:8], scale, OneOfMany(others[:64])).loss.backward()  # kernels and threads are there
    before = memory(reset=True)
    step()
    peak = memory() - before - 2 * columns * width * 4  # the gathered features
    seconds = measured(step, 5, 1)
    return {
        "version": version,
        "rows": rows,
        "columns": columns,
        "width": width,
        "negatives": drawn,
        "seconds": round(seconds, 3),
        "seconds_of_one_product": round(product, 4),
        "products": round(seconds / product, 2),
        "seconds_of_noise_of_one_direction": round(noise, 3),
        "peak_beyond_features_mb": round(peak / 1e6, 1),
    }


def real_rank(width: int) -> None:
    """One of the ranks that a launcher has started; rank 0 prints."""
    dist.init_process_group("gloo")
    collector = Collector()
    prepare_cpu()
    crossed = count_collectives()
    image, text = (unit(ROWS_OF_A_RANK, width, 2 * collector.rank + of, "cpu").requires_grad_() for of in (0, 1))
    ids = collector.first_row(ROWS_OF_A_RANK) + torch.arange(ROWS_OF_A_RANK)
    scale = torch.tensor(14.0, requires_grad=True)

    def step() -> None:
        contrast(image, text, scale, collector, draws_of(ids, ids, 0, collector)).loss.backward()

    step()
    counted = dict(crossed)
    seconds = measured(step, 5, 1)
    if collector.rank == 0:
        features = {name: counted.get(name, 0.0) for name in ("all-gather", "reduce-scatter")}
        print(json.dumps({"ranks": collector.world_size, "seconds": round(seconds, 4), **features}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--global_batch", type=int, default=65536)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--one", nargs=2, metavar=("VERSION", "NEGATIVES"), help=argparse.SUPPRESS)
    parser.add_argument("--real", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.real:
        real_rank(args.width)
        return
    if args.one:
        print(json.dumps(one_of_many(args.rows, args.global_batch, args.width, args.one[0], args.one[1] == "True")))
        return
    results = []

    def run(command: list[str]) -> dict:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        return results[-1]

    sizes = [f"--{name}={getattr(args, name)}" for name in ("global_batch", "rows", "width")]
    for drawn in (False, True):
        for version in ("plain", "ours"):
            print(json.dumps(run([sys.executable, __file__, *sizes, "--one", version, str(drawn)])), flush=True)
    most = len(os.sched_getaffinity(0))
    for ranks in args.ranks:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        found = run([*launcher, __file__, "--real", f"--width={args.width}"])
        load = Load(ranks=ranks, micro=ROWS_OF_A_RANK, accumulation=1, bytes=4, offloaded=False)
        found["features counted by plan, each way"] = contrast_wire(2, args.width, load)
        found["more ranks than cores"] = ranks > most
        print(json.dumps(found), flush=True)
    for ranks in (64, 256, 1024):
        load = Load(ranks=ranks, micro=args.rows, accumulation=1, bytes=4, offloaded=False)
        counted = {
            "ranks": ranks,
            "rows": args.rows,
            "features counted by plan, each way": contrast_wire(2, args.width, load),
        }
        results.append(counted)
        print(json.dumps(counted), flush=True)
    if args.output:
        write_results(args.output, results)


if __name__ == "__main__":
    main()
