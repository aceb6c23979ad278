"""Runs launch/quickstart.sh after installation and keeps its wall time and retrieval scores.

    python benchmarks/quickstart.py [--output FILE] [key=value ...]

Installation is done before the clock starts; generating the data is inside. runs/quickstart must not exist yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from common import write_results

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "runs" / "quickstart"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe to change")
    args = parser.parse_args()
    if RUN.exists():
        sys.exit(f"error: {RUN} exists; move it away, so that the whole run is measured")
    made = not (ROOT / "data" / "synthetic" / "text" / "index.json").exists()
    subprocess.run(["bash", "launch/install.sh"], cwd=ROOT, check=True)
    start = time.perf_counter()
    subprocess.run(["bash", "launch/quickstart.sh", *args.overrides], cwd=ROOT, check=True)
    seconds = time.perf_counter() - start
    result = {
        "seconds": round(seconds, 1),
        "data_generated": made,
        "retrieval": json.loads((RUN / "retrieval.json").read_text()),
    }
    print(json.dumps(result, indent=1))
    if args.output:
        write_results(args.output, [result])


if __name__ == "__main__":
    main()
