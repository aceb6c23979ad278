"""From nothing to a pretrained small VLMo with its retrieval scores: makes data, pretrains in stages.

    vlmo quickstart [key=value ...] [options of vlmo train]

Data goes to data/synthetic and the run to runs/quickstart in the current folder; the same command goes on with a run that
was interrupted.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

DATA = Path("data/synthetic")


def ranks() -> int:
    """Processes to train with: one for each GPU, else one or two for the cores of this machine."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return torch.cuda.device_count() or min(cores, 2)


def port() -> str:
    """Where the ranks meet: $MASTER_PORT, else a port that is free. DeepSpeed takes 29500, where another run may be."""
    if "MASTER_PORT" in os.environ:
        return os.environ["MASTER_PORT"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    from vlmo_ds.training.command import check, parse_arguments

    try:
        check(parse_arguments(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not (DATA / "text" / "index.json").exists():
        prepare = [sys.executable, "-m", "vlmo_ds.data.prepare", "synthetic", "--output", str(DATA), "--overwrite"]
        if status := subprocess.call(prepare):
            return status
    train = ["--num_gpus", str(ranks()), "--master_port", port(), "--module", "vlmo_ds.training.command", *arguments]
    print(f"deepspeed {' '.join(train)}", flush=True)
    sys.stdout.flush()
    # DeepSpeed's launcher takes this process's place: signals reach it directly.
    os.execv(sys.executable, [sys.executable, "-m", "deepspeed.launcher.runner", *train])


if __name__ == "__main__":
    sys.exit(main())
