"""Runs launch/quickstart.sh after installation and keeps its wall time and retrieval scores.

    python benchmarks/quickstart.py [--output FILE] [--also RUN ...] [key=value ...]

Installation is done before the clock starts; generating the data is inside. runs/quickstart must not exist yet.
--also: finished runs of other seeds, whose scores stand beside this one's and go into the mean (not their times).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml
from common import write_results

from vlmo_ds.training.ds_config import precision_of

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "runs" / "quickstart"
RERANKED = ("text_to_image", "itc+itm", "R@1")


def scores(run: Path) -> dict:
    """A finished run's seed, precision and retrieval scores."""
    configs = json.loads((run / "ds_config.json").read_text()).values()
    return {
        "seed": yaml.safe_load((run / "recipe.yaml").read_text())["seed"],
        "precision": " ".join(sorted({precision_of(config) for config in configs})),
        "retrieval": json.loads((run / "retrieval.json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--also", type=Path, nargs="+", default=[], metavar="RUN", help="runs of other seeds")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe to change")
    args = parser.parse_intermixed_args()
    others = [scores(run) for run in args.also]
    if RUN.exists():
        sys.exit(f"error: {RUN} exists; move it away, so that the whole run is measured")
    made = not (ROOT / "data" / "synthetic" / "text" / "index.json").exists()
    subprocess.run(["bash", "launch/install.sh"], cwd=ROOT, check=True)
    start = time.perf_counter()
    subprocess.run(["bash", "launch/quickstart.sh", *args.overrides], cwd=ROOT, check=True)
    seconds = time.perf_counter() - start
    results = [{"seconds": round(seconds, 1), "data_generated": made, **scores(RUN)}, *others]
    task, kind, recall = RERANKED
    mean = statistics.mean(result["retrieval"][task][kind][recall] for result in results)
    results.append({"seeds": len(results), f"mean of {task} {kind} {recall}": round(mean, 2)})
    print(json.dumps(results, indent=1))
    if args.output:
        write_results(args.output, results)


if __name__ == "__main__":
    main()
