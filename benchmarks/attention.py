"""The ways of computing attention with a trainable position bias, and without a bias, forward and backward, on this machine.

    python benchmarks/attention.py [--output FILE]

With a bias, vlmo_base shapes: a joint sequence of 40 text tokens and 197 image tokens, 12 heads of 64. Without one those of BLIP's step
with four pairs. The ratio says how much longer torch's kernel takes than the composition that is written out, or computed again in the
backward pass (below 1: the kernel is faster).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import measured, write_results

from vlmo_ds.blocks.attention import ATTENTION

HEADS, LENGTH, WIDTH = 12, 237, 64
PLAIN = {  # sequences, queries, keys
    "images": (4, 197, 197),
    "captions": (16, 13, 13),
    "captions that look at images": (4, 39, 197),
}


def seconds(name: str, batch: int, dtype: torch.dtype, device: str) -> float:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, HEADS, LENGTH, WIDTH, dtype=dtype, device=device, requires_grad=True) for _ in range(3)
    )
    bias = torch.randn(HEADS, LENGTH, LENGTH, dtype=dtype, device=device, requires_grad=True)
    mask = torch.ones(batch, LENGTH, dtype=torch.long, device=device)
    mask[:, 30:40] = 0
    grad = torch.randn(batch, HEADS, LENGTH, WIDTH, dtype=dtype, device=device)
    return measured(lambda: ATTENTION[name](q, k, v, bias, mask).backward(grad), 10, 3)


def without_bias(name: str, kind: str, dtype: torch.dtype, device: str) -> float:
    torch.manual_seed(0)
    batch, queries, keys = PLAIN[kind]
    q, k, v = (
        torch.randn(batch, length, HEADS, WIDTH, dtype=dtype, device=device, requires_grad=True).transpose(1, 2)
        for length in (queries, keys, keys)
    )
    grad = torch.randn(batch, HEADS, queries, WIDTH, dtype=dtype, device=device)
    return measured(lambda: ATTENTION[name](q, k, v, None, None).backward(grad), 10, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch in args.batch:
            row = {name: seconds(name, batch, dtype, device) for name in ATTENTION}
            result = {"dtype": str(dtype).removeprefix("torch."), "batch": batch}
            result |= {f"{name}_milliseconds": round(1e3 * t, 2) for name, t in row.items()}
            results.append({**result, "sdpa_over_explicit": round(row["sdpa"] / row["explicit"], 2)})
            print(json.dumps(results[-1]), flush=True)
        for kind in PLAIN:
            row = {name: without_bias(name, kind, dtype, device) for name in ("sdpa", "recomputing")}
            result = {"dtype": str(dtype).removeprefix("torch."), "without a bias": kind}
            result |= {f"{name}_milliseconds": round(1e3 * t, 2) for name, t in row.items()}
            results.append({**result, "sdpa_over_recomputing": round(row["sdpa"] / row["recomputing"], 2)})
            print(json.dumps(results[-1]), flush=True)
    if args.output:
        write_results(args.output, results)


if __name__ == "__main__":
    main()
