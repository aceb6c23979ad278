"""Seconds per joint step, peak memory, and useful FLOP/s as a share of this machine's own matrix-product rate.

    python benchmarks/step.py [--arch vlmo_base_patch16] [--batch 4 8] [--dtype float32 bfloat16] [--output FILE]

One process, forward and backward of itc + itm + mlm on random pairs, each setting in a process of its own. The useful
work is counted from the shapes (families.vlmo.cost); recomputation and padding do not count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from common import matrix_rate, measured, write_results

from vlmo_ds.config import DataConfig
from vlmo_ds.families.vlmo import FAMILY
from vlmo_ds.families.vlmo.config import VLMoSettings
from vlmo_ds.families.vlmo.cost import forward_flops
from vlmo_ds.families.vlmo.model import VLMo
from vlmo_ds.training.host import prepare_cpu

TASKS = {"itc": 1.0, "itm": 1.0, "mlm": 0.25}
MEMORY = "what the C library does with freed memory on a CPU: kept as in training, or returned as is its default"


def batch_of(config: VLMoSettings, pairs: int, text_len: int, device: torch.device) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, config.vocab_size, (pairs, text_len), generator=g)
    labels = torch.full_like(ids, -100)
    labels[:, 1 : 1 + round(0.15 * text_len)] = ids[:, 1 : 1 + round(0.15 * text_len)]
    batch = {
        "image": torch.randint(0, 256, (pairs, 3, config.image_size, config.image_size), generator=g).to(torch.uint8),
        "text_ids": ids,
        "text_masks": torch.ones_like(ids),
        "text_ids_mlm": ids,
        "text_labels_mlm": labels,
        "image_id": torch.arange(pairs),
        "sample_id": torch.arange(pairs),
    }
    return {k: v.to(device) for k, v in batch.items()} | {"negative_seed": torch.tensor(0)}


def one(arch: str, pairs: int, dtype_name: str, memory: str, repeats: int, text_len: int) -> dict:
    """One setting, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and memory == "kept":
        prepare_cpu()
    dtype = getattr(torch, dtype_name)
    config = VLMoSettings(arch=arch, vocab_size=30522, max_text_len=text_len)
    model = VLMo(config, TASKS).to(device=device, dtype=dtype).train()
    batch = batch_of(config, pairs, text_len, device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(batch).loss.backward()

    seconds = measured(step, repeats, 2 if device.type == "cpu" else 5)
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    masked = int((batch["text_labels_mlm"] != -100).sum())
    data = DataConfig(shards=["-"], mlm_probability=masked / pairs / text_len)
    stage = FAMILY.stage(name="joint", tasks=TASKS, data=data, global_batch_size=pairs, steps=1)
    useful = 3 * forward_flops(config, stage, pairs)
    rate = matrix_rate(dtype, device)
    return {
        "arch": arch,
        "image_size": config.image_size,
        "text_len": text_len,
        "batch": pairs,
        "dtype": dtype_name,
        "freed_memory": memory,
        "seconds_per_step": round(seconds, 4),
        "pairs_per_second": round(pairs / seconds, 3),
        "peak_memory_gb": round(peak / 1e9, 2),
        "useful_tflop_per_step": round(useful / 1e12, 3),
        "useful_gflop_per_second": round(useful / seconds / 1e9, 1),
        "matrix_product_gflop_per_second": round(rate / 1e9, 1),
        "share_of_matrix_product_rate": round(useful / seconds / rate, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vlmo_base_patch16")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--text_len", type=int, default=40, help="tokens, none of them padding (default: %(default)s)")
    parser.add_argument("--memory", nargs="+", choices=["kept", "returned"], default=["kept"], help=MEMORY)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.arch, args.batch[0], args.dtype[0], args.memory[0], args.repeats, args.text_len)))
        return
    results = []
    for dtype, pairs, memory in itertools.product(args.dtype, args.batch, args.memory):
        command = [sys.executable, __file__, "--one", "--arch", args.arch, "--batch", str(pairs), "--dtype", dtype]
        command += ["--memory", memory, "--repeats", str(args.repeats), "--text_len", str(args.text_len)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(results[-1]), flush=True)
    if args.output:
        write_results(args.output, results)


if __name__ == "__main__":
    main()
