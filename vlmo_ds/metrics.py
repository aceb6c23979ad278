"""metrics.jsonl: one JSON object for each optimiser step of a run, written line by line, never shortened below what is finished.

A record has at least "stage", "step" (of the stage, from 1) and "step_of_run".
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmo_ds.data.storage import write_atomically

FILE = "metrics.jsonl"
PACE = "pace.jsonl"  # and for how fast they train
SCORES = "evaluations.jsonl"  # the same for what is measured while stages train
# How `dump` begins a line. Parsing 400,000 lines of JSON takes seconds, looking at their two ends does not.
BEGINNING = re.compile(rb'\{"stage": "([A-Za-z0-9_-]+)", "step": (\d{1,18}), "step_of_run": (\d{1,18})[,}]')
Place = tuple[str, int, int]  # stage, step, step of the run


def dump(record: Mapping[str, Any]) -> bytes:
    """One line. "stage", "step" and "step_of_run" come first."""
    return (json.dumps(record) + "\n").encode()


def place_of(line: bytes) -> Place | None:
    """Which step a line is about; None for what is no whole record."""
    found = BEGINNING.match(line)
    if found and line.endswith(b"}\n") and line.isascii() and b"\0" not in line:
        return found[1].decode(), int(found[2]), int(found[3])
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
        place = record["stage"], record["step"], record["step_of_run"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    whole = isinstance(place[0], str) and all(type(number) is int and number >= 0 for number in place[1:])
    return place if whole else None


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, without what is none in it (a half line of a run that was killed)."""
    with path.open("rb") as file:
        for line in file:
            if place_of(line):
                try:
                    yield json.loads(line)
                except ValueError:
                    continue


class AppendedFile:
    """A file that grows by whole records. Those that cannot be written (a full disk) wait in memory and are tried again with
    the next one; half a record is never left behind."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[bytes] = []
        self.problem = ""  # why the last record could not be written
        self.handle: int | None = None

    def append(self, record: bytes) -> None:
        self.waiting.append(record)
        self.flush()

    def flush(self) -> None:
        """Tries to write what waits; `problem` says why that is not possible, "" if it is."""
        try:
            if self.handle is None:
                self.handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self.size = os.fstat(self.handle).st_size
            while self.waiting:
                record = b"".join(self.waiting)
                written = os.write(self.handle, record)
                if written < len(record):
                    os.ftruncate(self.handle, self.size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.size += written
                self.waiting = []
            self.problem = ""
        except OSError as error:
            self.problem = error.strerror or str(error)

    def close(self) -> None:
        """Onto the disk itself. OSError if records are left that cannot be written."""
        if self.waiting:
            self.flush()
        if self.handle is not None:
            with contextlib.suppress(OSError):
                os.fsync(self.handle)
            os.close(self.handle)
            self.handle = None
        if self.waiting:
            raise OSError(f"{self.path}: {len(self.waiting)} records could not be written: {self.problem}")


def begin_stage(path: Path, stage: str, step: int) -> tuple[int, list[str]]:
    """Cuts lines of a stage past a step, of a run that died later, off metrics.jsonl; nothing of other stages is touched.

    What is no record (zeros or half lines after a power cut) is taken out too, and the file as it was kept beside it.
    Returns (the last step_of_run that is left, 0 if none; what to tell the user).
    """
    last, damaged, cut = 0, 0, 0
    kept: list[tuple[int, int]] = []  # stretches of bytes
    start = 0
    with path.open("rb") if path.exists() else contextlib.nullcontext(()) as lines:
        for line in lines:
            place, end = place_of(line), start + len(line)
            if place is None:
                damaged += 1
            elif place[0] == stage and place[1] > step:
                cut += 1
            else:
                last = max(last, place[2])
                if kept and kept[-1][1] == start:
                    kept[-1] = (kept[-1][0], end)
                else:
                    kept.append((start, end))
            start = end
    if not damaged and not cut:
        return last, []
    notes = []
    only_the_last = damaged == 1 and place is None  # a run that was killed has left half a line
    if damaged and not only_the_last:
        copy = set_aside(path)
        notes.append(f"{path}: {damaged} lines are no records and are taken out; the file as it was is {copy}")
    if len(kept) <= 1 and (not kept or kept[0][0] == 0):
        os.truncate(path, kept[0][1] if kept else 0)
    else:
        content = path.read_bytes()
        write_atomically(path, b"".join(content[a:b] for a, b in kept))
    return last, notes


def set_aside(path: Path) -> Path:
    """A copy of a file beside it."""
    number = 1
    while (copy := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    shutil.copyfile(path, copy)
    return copy
