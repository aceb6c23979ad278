"""stages.json of a run: how long each stage has taken over all starts, and how many parameters it trains."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

from vlmo_ds.data.storage import write_atomically

FILE = "stages.json"


class Entry(NamedTuple):
    """One stage: seconds of training over all starts, and the numbers of all and of trained parameters."""

    seconds: float
    parameters: int
    trained: int


def read(run: Path) -> dict[str, Entry]:
    """What is noted of each stage; nothing of one whose note is not there or is none."""
    try:
        noted = json.loads((run / FILE).read_bytes())
        return {str(stage): entry for stage, fields in noted.items() if (entry := entry_of(fields))}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def entry_of(fields: Any) -> Entry | None:
    try:
        entry = Entry(float(fields["seconds"]), int(fields["parameters"]), int(fields["trained"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return entry if math.isfinite(entry.seconds) and min(entry) >= 0 else None


class StageClock:
    """Adds the time of this start to what earlier starts have noted of a stage.

    A start that is killed has noted its time up to its last checkpoint. A clock that cannot be written stops no training.
    """

    def __init__(self, run: Path, stage: str):
        self.run, self.stage = run, stage
        entry = read(run).get(stage)
        self.before = entry.seconds if entry else 0.0
        self.started = time.monotonic()

    def note(self, parameters: int, trained: int) -> None:
        seconds = round(self.before + time.monotonic() - self.started, 3)
        entries = read(self.run) | {self.stage: Entry(seconds, parameters, trained)}
        content = json.dumps({stage: entry._asdict() for stage, entry in entries.items()}, indent=1)
        with contextlib.suppress(OSError):
            write_atomically(self.run / FILE, content.encode())
