"""CPU time until a command line is answered: help, mistakes, checks; and until PyTorch and DeepSpeed are imported. Seconds until a run's first step.

    python benchmarks/startup.py [--output FILE]

Each command is a process of its own; the figure is user and system time, the least of several runs. The first step is that of the quickstart,
with data and tokenizer there, seconds on the clock.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
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
DEEPSPEED = ["-m", "deepspeed.launcher.runner", "--num_gpus"]
FIRST_STEPS = {
    "vlmo quickstart": ["-m", "vlmo_ds", "quickstart"],
    "deepspeed train_ds.py, 1 rank": [*DEEPSPEED, "1", str(ROOT / "train_ds.py")],
    "deepspeed train_ds.py, 2 ranks": [*DEEPSPEED, "2", str(ROOT / "train_ds.py")],
}


def cpu_seconds(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seconds_to_first_step(folder: Path, launcher: list[str], tokenizer: str) -> float:
    """From the command to the first line of metrics.jsonl."""
    run = folder / "runs" / f"of_{time.monotonic_ns()}"
    launcher = [*launcher, "--recipe", str(ROOT / "launch/recipes/quickstart.yaml")]
    launcher += [f"name={run.name}", f"tokenizer.name={tokenizer}"]
    start = time.perf_counter()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *launcher], cwd=folder, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
        )
        while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size):
            if process.poll() is not None:
                sys.exit(f"error: training ended before its first step: {(folder / 'log').read_text()}")
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return seconds


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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare = ["-m", "vlmo_ds.data.prepare", "synthetic", "--output", "data/synthetic"]
        subprocess.run([sys.executable, *prepare], cwd=folder, check=True, capture_output=True)
        seconds_to_first_step(folder, FIRST_STEPS["vlmo quickstart"], "train")
        (tokenizer,) = folder.glob("runs/*/tokenizer")
        for what, launcher in FIRST_STEPS.items():
            seconds = min(seconds_to_first_step(folder, launcher, str(tokenizer)) for _ in range(args.repeats))
            results.append({"what": "first step", "command": what, "seconds": round(seconds, 2)})
            print(f"{f'first step, {what}':40} {seconds:.2f} s", flush=True)
    if args.output:
        write_results(args.output, results)


if __name__ == "__main__":
    main()
