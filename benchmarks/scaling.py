"""How a joint step scales: real ranks on this machine, and what `vlmo plan` expects of many GPUs beside it.

    python benchmarks/scaling.py [--ranks 1 2] [--batch 32] [--steps 40] [--gpus 8 64 1024] [--output FILE]

Weak: each rank has `batch` pairs. Strong: all ranks together have as many. A rank has one thread, or one GPU; the small model of the
quickstart is trained under ZeRO-2 on its data, and the median time between the ends of two steps counts, data included. Efficiency: pairs
per second and rank, over those of the first number of ranks. The prediction is that of launch/recipes/vlmo_base.yaml with 8 GPUs on a
node, at the plan's default rates of GPU and network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from common import write_results
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
SETTLED = 10  # steps before the clock counts


def seconds_a_step(folder: Path, ranks: int, batch: int, steps: int) -> float:
    recipe = yaml.safe_load((ROOT / "launch/recipes/quickstart.yaml").read_text())
    joint = recipe["stages"][-1] | {"global_batch_size": batch, "steps": steps, "init": {"weights": "fresh"}}
    joint |= {
        "checkpoint_every": 0,
        "log_images_every": 0,
        "data": joint["data"] | {"shards": [str(folder / "data/train")]},
    }
    recipe |= {"name": f"{ranks}_{batch}", "stages": [joint]}
    del recipe["retrieval"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train = [str(ROOT / "train_ds.py"), "--recipe", "recipe.yaml"]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), *train]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    curves = EventAccumulator(str(folder / "runs" / recipe["name"] / "tensorboard"), size_guidance={"scalars": 0})
    curves.Reload()
    ends = [event.wall_time for event in curves.Scalars("joint/loss")][SETTLED:]
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def predicted(gpus: int, folder: Path) -> dict:
    """The joint stage of vlmo_base on so many GPUs."""
    plan = ["-m", "vlmo_ds.planning.plan", "--recipe", str(ROOT / "launch/recipes/vlmo_base.yaml")]
    where = [
        "--nodes",
        str(max(1, gpus // 8)),
        "--gpus_per_node",
        str(min(gpus, 8)),
        "--json",
        str(folder / "plan.json"),
    ]
    done = subprocess.run([sys.executable, *plan, *where], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: no plan for {gpus} GPUs: {done.stdout}{done.stderr}")
    stage = json.loads((folder / "plan.json").read_text())[-1]
    return {"seconds": round(stage["seconds"], 4), "received_gb": round(sum(stage["wire"].values()) / 1e9, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=32, help="pairs of one rank")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--gpus", type=int, nargs="*", default=[8, 16, 64, 256, 1024], help="that a plan is made for")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args()
    if args.steps < SETTLED + 2:
        parser.error(f"--steps is {args.steps}; accepted: at least {SETTLED + 2}")
    if odd := [gpus for gpus in args.gpus if gpus > 8 and gpus % 8]:
        parser.error(f"--gpus has {odd[0]}; accepted: up to 8, and multiples of 8")
    results: list[dict] = []
    rates: dict[tuple[int, int], float] = {}  # by ranks and pairs: pairs per second and rank
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plans = [{"kind": "predicted, vlmo_base", "gpus": gpus, **predicted(gpus, folder)} for gpus in args.gpus]
        prepare = [sys.executable, "-m", "vlmo_ds.data.prepare", "synthetic", "--output", str(folder / "data")]
        subprocess.run(prepare, check=True, capture_output=True)
        for kind in ("weak", "strong"):
            settings = [(ranks, args.batch * ranks if kind == "weak" else args.batch) for ranks in args.ranks]
            for ranks, pairs in settings:
                if (ranks, pairs) not in rates:
                    rates[ranks, pairs] = pairs / ranks / seconds_a_step(folder, ranks, pairs, args.steps)
                rate = rates[ranks, pairs]
                found = {"kind": kind, "ranks": ranks, "pairs": pairs, "seconds": round(pairs / ranks / rate, 4)}
                results.append(found | {"efficiency": round(rate / rates[settings[0]], 3)})
                print(json.dumps(results[-1]), flush=True)
    results += plans
    if args.output:
        write_results(args.output, results)


if __name__ == "__main__":
    main()
