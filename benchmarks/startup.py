"""CPU time until a command line is answered: help, mistakes, checks; and until PyTorch and DeepSpeed are imported.

    python benchmarks/startup.py [--output FILE]

Each command is a process of its own; the figure is user and system time, the least of several runs.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from common import write_results

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "--help": ["train_ds.py", "--help"],
    "vlmo train --help": ["-m", "vlmo_ds", "train", "--help"],
    "a typo in a setting": ["train_ds.py", "stages.joint.stepz=100"],
    "a wrong value": ["train_ds.py", "stages.joint.steps=many"],
    "a recipe that is missing": ["train_ds.py", "--recipe", "missing.yaml"],
    "a typo in a DeepSpeed config": ["train_ds.py", "--deepspeed_config", "{typo}"],
    "vlmo recipe --explain": ["-m", "vlmo_ds", "recipe", "--explain"],
    "import of torch and deepspeed alone": ["-c", "import torch, deepspeed"],
}


def cpu_seconds(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as typo:
        typo.write('{"zero_optimization": {"stgae": 2}}')
        typo.flush()
        results = []
        for name, command in COMMANDS.items():
            arguments = [word.format(typo=typo.name) for word in command]
            seconds = min(cpu_seconds(arguments) for _ in range(args.repeats))
            results.append({"what": name, "cpu_seconds": round(seconds, 3)})
            print(f"{name:40} {seconds:.2f} s", flush=True)
    if args.output:
        write_results(args.output, results)


if __name__ == "__main__":
    main()
