"""Signals that ask a run to stop: SIGTERM (schedulers, launchers) and SIGUSR1 (Slurm's warning before the time limit)."""

from __future__ import annotations

import os
import signal
from types import FrameType

import psutil

LAUNCHERS = ("deepspeed.launcher.launch", "deepspeed/launcher/launch.py")


class Stopped(Exception):
    """All ranks have agreed to stop, and a checkpoint is written."""


class StopRequest:
    """Whether this process was asked to stop. The ranks agree at the end of a step."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.launcher: tuple[int, int] | None = None

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.remember)
        # SIGTERM ends DeepSpeed's runner and nothing else: its launcher and the ranks would go on unseen.
        if any(part.endswith(LAUNCHERS) for part in psutil.Process(os.getppid()).cmdline()):
            self.launcher = self.ancestors()

    def asked(self) -> bool:
        if self.launcher and self.ancestors() != self.launcher:
            self.received = self.received or "the end of the launcher"
        return self.received is not None

    @staticmethod
    def ancestors() -> tuple[int, int]:
        parent = os.getppid()
        try:
            return parent, psutil.Process(parent).ppid()
        except psutil.Error:
            return parent, 0

    def remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
