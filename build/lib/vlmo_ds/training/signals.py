"""Signals that ask a run to stop: SIGTERM (schedulers, launchers), SIGINT (Ctrl-C), SIGUSR1 (Slurm's warning before the time
limit)."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

import psutil

LAUNCHERS = ("deepspeed.launcher.launch", "deepspeed/launcher/launch.py")
AGAIN = 1.0  # seconds after a SIGINT from which on another one is a second Ctrl-C, and not a launcher that passes it on


class Stopped(Exception):
    """All ranks have agreed to stop, and a checkpoint is written."""


class StopRequest:
    """Whether this process was asked to stop. The ranks agree at the end of a step; a second Ctrl-C ends this one at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.launcher: tuple[int, int] | None = None
        self.interrupted_at: float | None = None
        self.at_once: str | None = None  # what to say on leaving, where nothing is lost by leaving in the middle

    def listen(self) -> None:
        # A rank that waits in a collective runs no Python, and so no handler: the signals reach a thread through a pipe.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self.read, args=(reader,), daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self.leave_at_once)
        # SIGTERM ends DeepSpeed's runner and nothing else: its launcher and the ranks would go on unseen.
        if any(part.endswith(LAUNCHERS) for part in psutil.Process(os.getppid()).cmdline()):
            self.launcher = self.ancestors()

    def read(self, pipe: int) -> None:
        while numbers := os.read(pipe, 16):
            for number in numbers:
                if number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                    self.remember(number)

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

    def remember(self, number: int) -> None:
        if number == signal.SIGINT:
            if self.interrupted_at is not None and time.monotonic() - self.interrupted_at > AGAIN:
                os._exit(128 + signal.SIGINT)
            if self.interrupted_at is None and os.environ.get("LOCAL_RANK", "0") == "0":
                print(
                    "stopping; a stage writes a checkpoint first; Ctrl-C again ends at once",
                    file=sys.stderr,
                    flush=True,
                )
            self.interrupted_at = self.interrupted_at or time.monotonic()
        self.received = signal.Signals(number).name

    def leave_at_once(self, number: int, frame: FrameType | None) -> None:
        """The handler, in the main thread. Several ranks leave together instead, through Watch."""
        self.received = signal.Signals(number).name
        if self.at_once and os.environ.get("WORLD_SIZE", "1") == "1":
            raise Stopped(self.at_once)
