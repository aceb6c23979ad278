"""What a run was made with: hardware, versions, and the commit of the code."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch
import transformers

import vlmo_ds

GIT_SECONDS = 5.0


class Hardware(NamedTuple):
    """What one rank runs on."""

    machine: str
    device: str
    cores: int  # of the machine, that this process may use


def hardware() -> Hardware:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return Hardware(socket.gethostname(), device, len(os.sched_getaffinity(0)))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, "") or f"{platform.machine()} CPU"


def hardware_table(ranks: Sequence[Hardware]) -> dict[str, str]:
    """ranks: of every rank, in their order."""
    devices = Counter(rank.device for rank in ranks)
    machines = {rank.machine: rank.cores for rank in ranks}
    cores = sorted(set(machines.values()))
    return {
        "devices": ", ".join(f"{device} ({count} rank{'s' * (count > 1)})" for device, count in devices.items()),
        "machines": str(len(machines)),
        "cores of a machine": " to ".join(map(str, cores[:1] + cores[-1:] if len(cores) > 1 else cores)),
        "ranks": str(len(ranks)),
    }


def versions() -> dict[str, str]:
    found = {
        "vlmo_ds": vlmo_ds.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
    }
    return found | ({"commit": commit} if (commit := commit_of(Path(vlmo_ds.__file__))) else {})


def commit_of(file: Path) -> str:
    """The commit of the clone that keeps this file, as "1a2b3c4 + changes"; "" where there is no clone, or no git.

    A file that the clone does not keep (an environment inside somebody's repository) is not of its commit.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.resolve().parent), *arguments]
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=GIT_SECONDS, check=True
        )
        return done.stdout.decode(errors="replace").strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--exclude=*", "--dirty= + changes")
    except (OSError, subprocess.SubprocessError):
        return ""
