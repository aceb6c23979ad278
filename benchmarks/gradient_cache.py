"""A contrastive step on one large batch and in chunks with cached gradients: seconds, peak memory, and the difference.

    python benchmarks/gradient_cache.py [--batch 512] [--chunk 32] [--output FILE]

One process, forward and backward of irtr on random pairs, each way in a process of its own; the gradients of both are
compared tensor by tensor.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import measured, write_results

from vlmo_ds.families.vlmo.config import VLMoSettings
from vlmo_ds.families.vlmo.model import VLMo
from vlmo_ds.training.gradient_cache import cached_contrast
from vlmo_ds.training.host import prepare_cpu


def one(batch: int, size: int, gradients: str) -> dict:
    """Parts of `size` samples, or all at once where size is the batch; writes the gradients to a file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        prepare_cpu()
    torch.manual_seed(0)
    settings = {"embed_dim": 256, "depth": 6, "num_heads": 4, "image_size": 96, "patch_size": 16, "max_text_len": 24}
    model = VLMo(VLMoSettings(**settings, vocab_size=1000), {"irtr": 1.0}).to(device).train()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1000, (batch, 24), generator=g)
    images = torch.randint(0, 256, (batch, 3, 96, 96), generator=g).to(torch.uint8)
    whole = {"image": images, "text_ids": ids, "text_masks": torch.ones_like(ids)}
    whole = {k: v.to(device) for k, v in whole.items()}
    parts = [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, batch, size)]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        if size == batch:
            model(whole).loss.backward()
        else:
            cached_contrast(
                model, len(parts), lambda i: model(parts[i], "contrast_features"), lambda part: part.backward()
            )

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = measured(step, 3, 1)
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.save({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}, gradients)
    return {
        "batch": batch,
        "samples_in_memory": size,
        "seconds_per_step": round(seconds, 3),
        "peak_memory_gb": round(peak / 1e9, 3),
        "memory_before_the_step_gb": 0.0 if on_gpu else round(before / 1e9, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument(
        "--chunk", type=int, default=32, help="samples that are in memory at a time (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.batch, args.one, args.gradients)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for size in (args.batch, args.chunk):
            command = [sys.executable, __file__, "--batch", str(args.batch), "--one", str(size)]
            command += ["--gradients", f"{folder}/{size}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
        direct, cached = (torch.load(f"{folder}/{size}", weights_only=True) for size in (args.batch, args.chunk))
    worst = max(float((cached[n] - v).norm() / v.norm().clamp(min=1e-12)) for n, v in direct.items() if v.norm() > 1e-9)
    results[1] |= {
        "largest_relative_difference_of_a_gradient": worst,
        "time_ratio": round(results[1]["seconds_per_step"] / results[0]["seconds_per_step"], 3),
    }
    for row in results:
        print(json.dumps(row))
    if args.output:
        write_results(args.output, results)


if __name__ == "__main__":
    main()
