"""Trains CoCa, or BLIP, on the synthetic world and keeps its time, retrieval and captions, and those of the plain way after the same time.

    python benchmarks/coca_quickstart.py [--recipe launch/recipes/coca_quickstart.yaml] [--plain_steps 1900] [--ranks 1] [--output FILE] [key=value ...]
    python benchmarks/coca_quickstart.py --recipe launch/recipes/blip_quickstart.yaml --plain_steps 0 --ranks 2

The plain way (CoCa's) is the same model without the recipe's first stage, on scenes of one to three things from the start, with CLIP's initial
positions; its steps are chosen so that it takes as long (0: it is left out). data/synthetic has to be there; runs go to runs/benchmark-*,
which must not exist yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import write_results

ROOT = Path(__file__).resolve().parents[1]
LAST = 40  # steps of the run whose losses are averaged


def trained(name: str, recipe: str, ranks: int, settings: list[str]) -> dict:
    run = ROOT / "runs" / f"benchmark-{name}"
    if run.exists():
        sys.exit(f"error: {run} exists; move it away, so that the whole run is measured")
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        str(ranks),
        "train_ds.py",
        "--recipe",
        recipe,
        "--output_dir",
        str(run),
    ]
    start = time.perf_counter()
    subprocess.run([*command, *settings], cwd=ROOT, check=True)
    seconds = time.perf_counter() - start
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-LAST:]
    losses = {
        name: round(statistics.mean(row[name] for row in rows), 4) for name in rows[-1] if name.startswith("loss/")
    }
    return {
        "run": name,
        "settings": settings,
        "seconds": round(seconds, 1),
        f"mean of the last {LAST} steps": losses,
        "retrieval": json.loads((run / "retrieval.json").read_text()),
        "captioning": json.loads((run / "captioning.json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="launch/recipes/coca_quickstart.yaml")
    parser.add_argument("--plain_steps", type=int, default=1900, help="0: without the plain way (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the cores (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe to change")
    args = parser.parse_intermixed_args()
    results = [trained("ours", args.recipe, args.ranks, args.overrides)]
    if args.plain_steps:
        plain = ["--stages", "both", "stages.both.init.weights=fresh", f"stages.both.steps={args.plain_steps}"]
        plain += ["model.position_std=null", *args.overrides]
        results.append(trained("plain", args.recipe, args.ranks, plain))
    print(json.dumps(results, indent=1))
    if args.output:
        write_results(args.output, results)


if __name__ == "__main__":
    main()
