"""From nothing to a pretrained small VLMo with its retrieval scores: makes data, pretrains in stages.

    vlmo quickstart [key=value ...] [options of vlmo train]

Data goes to data/synthetic and the run to runs/quickstart in the current folder; the same command goes on with a run that
was interrupted.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

DATA = Path("data/synthetic")
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, that of Windows' Linux


def gpus() -> int:
    """How many PyTorch can compute on, which takes a second or two to import: asked only where there is a driver of one."""
    if sys.platform == "linux" and not any(Path(driver).exists() for driver in DRIVERS):
        return 0
    import torch

    return torch.cuda.device_count()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    on_gpus = gpus()
    ranks = on_gpus or min(cores(), 2)
    where, what = port(), ["--module", "vlmo_ds.training.command", *arguments]
    print(f"deepspeed --num_gpus {ranks} --master_port {where} {' '.join(what)}", flush=True)
    if on_gpus:
        launcher = ["deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", where]
    else:  # what that one starts on a single machine, after an import of PyTorch and DeepSpeed of its own
        world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
        launcher = ["deepspeed.launcher.launch", f"--world_info={world}"]
        launcher += ["--master_addr=127.0.0.1", f"--master_port={where}"]
    # DeepSpeed's launcher takes this process's place: signals reach it directly.
    os.execv(sys.executable, [sys.executable, "-m", *launcher, *what])


if __name__ == "__main__":
    sys.exit(main())
