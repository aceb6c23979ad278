"""What is left of a run that ended by a hang or a death: for each living rank the Python stacks of all threads, and what it did.

runs/<name>/post_mortem/
    cause.txt          who was first, in one sentence
    rank-00003.txt     what that rank did and since when, its loader processes, the stacks of its threads
    rank-00003.nccl.json   on GPUs: NCCL's flight recorder, its last collectives
"""

from __future__ import annotations

import contextlib
import faulthandler
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

FOLDER, CAUSE = "post_mortem", "cause.txt"
DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def prepare(folder: Path) -> None:
    """An empty folder (rank 0); what an earlier start has left is kept beside it."""
    with contextlib.suppress(OSError):
        if any(file.stat().st_size for file in folder.glob("*")):
            number = 1
            while (before := folder.with_name(f"{folder.name}.before-{number}")).exists():
                number += 1
            folder.rename(before)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)


class PostMortem:
    """A rank's file. It is open from the start: a process that holds the interpreter's lock can open none, but a thread of C still writes
    to it."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.path = folder, folder / f"rank-{rank:05d}.txt"
        self.file = None
        with contextlib.suppress(OSError):
            self.file = self.path.open("w")

    def arm(self, seconds: float) -> None:
        """Stacks are written unless this is called again in so many seconds."""
        if self.file is not None:
            faulthandler.dump_traceback_later(seconds, file=self.file)

    def write(self, cause: str, facts: Mapping[str, Any], failure: str = "") -> None:
        """failure: the traceback of a collective that has failed, whose stack is gone."""
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            (self.folder / CAUSE).write_text(cause + "\n")
        if self.file is None:
            return
        with contextlib.suppress(OSError, ValueError):
            lines = [f"{name}: {value}" for name, value in {"cause": cause, **facts, "processes": children()}.items()]
            self.file.write(
                "\n".join(lines)
                + (failure and f"\n\nfailed:\n{failure}")
                + "\n\nstacks of all threads, the innermost call first:\n"
            )
            self.file.flush()
            faulthandler.dump_traceback(self.file, all_threads=True)
            self.file.flush()
        if torch.cuda.is_available():
            with contextlib.suppress(Exception):  # of PyTorch's own, which not every build has
                recorded = torch._C._distributed_c10d._dump_nccl_trace_json()  # type: ignore[attr-defined]  # in builds with NCCL
                self.path.with_suffix(".nccl.json").write_bytes(recorded)

    def close(self) -> None:
        """A good end leaves nothing."""
        faulthandler.cancel_dump_traceback_later()
        if self.file is not None:
            self.file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            self.folder.rmdir()  # once all ranks have gone


def children() -> str:
    """The loader processes of this one, and what they do."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found.append(f"{child.pid} {child.name()} is {child.status()}")
    return "; ".join(found) or "none"


def process_state(pid: int) -> str:
    """What a process of this machine does, in words; nothing where it runs or sleeps as they all do."""
    try:
        state = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return f"its process {pid} is gone"
    except psutil.Error:
        return ""
    if state == psutil.STATUS_STOPPED:
        return f"its process {pid} is stopped (a signal, or a debugger)"
    return f"its process {pid} is gone" if state in DEAD else ""


def out_of_step(entries: Sequence[Mapping[str, Any]]) -> str:
    """Which ranks are at another collective than most, in words; nothing where all are at the same. entries: of each rank `host`,
    `collective`, the number and the name of its last, what it is `doing` and `for` how many seconds."""
    places = [tuple(entry["collective"]) for entry in entries]
    if len(set(places)) < 2:
        return ""
    usual = max(set(places), key=lambda place: (places.count(place), place))
    odd = [rank for rank, place in enumerate(places) if place != usual]
    first = odd[0]
    names = ", ".join(f"rank {rank} on {entries[rank]['host']}" for rank in odd)
    return (
        f"{names} {'is' if len(odd) == 1 else 'are'} at another collective than the others: {places[first][1]}, the {places[first][0]}th, in "
        f"place of {usual[1]}, the {usual[0]}th; rank {first} has been {entries[first]['for']:.0f} s in '{entries[first]['doing']}'"
    )
