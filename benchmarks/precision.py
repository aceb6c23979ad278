"""What a precision costs on this machine, and AdamW in one kernel against one tensor after the other.

    python benchmarks/precision.py [--output FILE]

One process on the quickstart's model: a joint step (forward and backward of itc + itm + mlm) in float32 and bfloat16, large
matrix products in both, and optimiser steps on float32 weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from baseline import batch_of
from common import matrix_rate, measured, write_results

from vlmo_ds.families.vlmo.model import VLMo
from vlmo_ds.families.vlmo.parity import JOINT
from vlmo_ds.recipe_file import load_recipe
from vlmo_ds.training.host import prepare_cpu
from vlmo_ds.training.precision import native


def step_seconds(dtype: torch.dtype, device: torch.device, pairs: int, repeats: int) -> float:
    config = load_recipe("quickstart").model.model_copy(update={"vocab_size": 500})
    model = VLMo(config, JOINT).to(device=device, dtype=dtype).train()
    batch = batch_of(config, [24] * pairs, device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(batch).loss.backward()

    return measured(step, repeats, 1)


def adamw_seconds(fused: bool, device: torch.device) -> float:
    config = load_recipe("quickstart").model.model_copy(update={"vocab_size": 500})
    model = VLMo(config, JOINT).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    return measured(optimizer.step, 20, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        prepare_cpu()
    found = native()
    results: list[dict] = [{"native": found.precision, "reason": found.reason}]
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        seconds = step_seconds(dtype, device, args.pairs, args.repeats)
        rate = matrix_rate(dtype, device, repeats=3, warmup=1)  # emulated, each takes seconds
        row = {"precision": name, "seconds_per_joint_step": round(seconds, 4), "pairs": args.pairs}
        results.append(row | {"matrix_product_gflop_per_second": round(rate / 1e9, 1)})
        print(results[-1], flush=True)
    for fused in (True, False):
        results.append({"adamw_fused": fused, "seconds_per_step": round(adamw_seconds(fused, device), 5)})
        print(results[-1], flush=True)
    if args.output:
        write_results(args.output, results)


if __name__ == "__main__":
    main()
