"""Seconds, memory and parts of a step with all objectives, of every family.

    python benchmarks/step.py [--arch NAME ...] [--batch N ...] [--dtype NAME ...] [--recompute HOW ...] [--compile HOW ...] [--output FILE]

One process for each setting, forward and backward on random pairs (BLIP with its teacher), captions of COCO's lengths or full ones. The useful
work is counted from the shapes (families.*.cost); recomputation and padding do not count. Parts are shares of the time that operations took,
in a step under PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import baseline
import blip_step
import coca_step
import torch
from common import one_step, write_results

from vlmo_ds.families.blip.config import ARCHITECTURES as OF_BLIP
from vlmo_ds.families.coca.config import ARCHITECTURES as OF_COCA
from vlmo_ds.families.vlmo.config import ARCHITECTURES as OF_VLMO

STEPS = {
    **dict.fromkeys(OF_VLMO, baseline.step_of),
    **dict.fromkeys(OF_COCA, coca_step.step_of),
    **dict.fromkeys(OF_BLIP, blip_step.step_of),
}
MEMORY = "what the C library does with freed memory on a CPU: kept as in training, or returned as is its default"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=list(STEPS), default=["vlmo_base_patch16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8], help="pairs")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument(
        "--recompute", nargs="+", default=["cheap"], help="none, cheap, blocks or a number, as in a recipe"
    )
    parser.add_argument("--compile", nargs="+", choices=["none", "blocks"], default=["none"], help="as in a recipe")
    parser.add_argument("--captions", choices=["COCO", "full"], default="COCO")
    parser.add_argument("--image_size", type=int, help="default: the architecture's")
    parser.add_argument("--memory", nargs="+", choices=["kept", "returned"], default=["kept"], help=MEMORY)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        setting = json.loads(args.one)
        try:
            found = one_step(setting, "ours", setting["dtype"], args.captions, STEPS[setting["arch"]])
        except torch.OutOfMemoryError:
            found = {**setting, "failed": "it does not fit into the GPU's memory"}
        print(json.dumps(found))
        return
    results = []
    for arch, dtype, batch, recompute, compiled, memory in itertools.product(
        args.arch, args.dtype, args.batch, args.recompute, args.compile, args.memory
    ):
        how = int(recompute) if recompute.isdigit() else recompute
        setting = {
            "arch": arch,
            "dtype": dtype,
            "batch": batch,
            "recompute": how,
            "compile": compiled,
            "memory": memory,
            "repeats": args.repeats,
        }
        if args.image_size:
            setting["image_size"] = args.image_size
        command = [sys.executable, __file__, "--captions", args.captions, "--one", json.dumps(setting)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(results[-1]), flush=True)
    if args.output:
        write_results(args.output, results)


if __name__ == "__main__":
    main()
