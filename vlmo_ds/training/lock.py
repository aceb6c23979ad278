"""One start at a time in a run's directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from vlmo_ds.config import RecipeError

FILE = ".lock"
RENEWED, EXPIRES = 10.0, 60.0  # seconds


class RunLock:
    """Held from `take` to `release`; the kernel releases it when the process dies, however it dies.

    On a file system without locks the file itself is a lease: host, process and time, renewed every 10 s, which counts for
    a minute, and on its own host for as long as its process lives.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self.handle: int | None = None
        self.leased = False
        self.ended = threading.Event()

    def take(self) -> None:
        """RecipeError, which names who holds it, if another start is at work in the directory."""
        handle = self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # A lock of the process, not of the open file: loader processes, which inherit the file, do not hold it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN) or self.lease_counts(self.holder(handle)):
                raise self.refusal(handle) from None
            self.leased = True  # ENOLCK, ENOSYS, ...: a file system without locks
        self.sign()
        if self.leased:
            threading.Thread(target=self.renew, daemon=True).start()

    def release(self) -> None:
        if self.handle is None:
            return
        self.ended.set()
        with contextlib.suppress(OSError):
            os.ftruncate(self.handle, 0)
        os.close(self.handle)
        self.handle = None

    def sign(self) -> None:
        handle = self.handle
        if handle is None:  # released meanwhile
            return
        entry = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "renewed": time.time(),
            "command": " ".join(sys.argv),
        }
        with contextlib.suppress(OSError):  # a full disk: who holds it cannot be said, but it is held
            data = json.dumps(entry).encode()
            os.pwrite(handle, data, 0)
            os.ftruncate(handle, len(data))

    def renew(self) -> None:
        while not self.ended.wait(RENEWED):
            self.sign()

    def holder(self, handle: int) -> dict[str, Any]:
        """What the holder has written of itself; {} if that cannot be read."""
        try:
            found = json.loads(os.pread(handle, 1 << 16, 0))
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            return {}

    @staticmethod
    def lease_counts(holder: dict[str, Any]) -> bool:
        if holder.get("host") == socket.gethostname():
            try:
                return abs(psutil.Process(int(holder["pid"])).create_time() - float(holder["started"])) < 2
            except (psutil.Error, KeyError, TypeError, ValueError):
                return False
        renewed = holder.get("renewed")
        return isinstance(renewed, (int, float)) and time.time() - renewed < EXPIRES

    def refusal(self, handle: int) -> RecipeError:
        found = self.holder(handle)
        os.close(handle)
        self.handle = None
        who = f"process {found.get('pid', '?')} on {found.get('host', '?')}"
        started = found.get("started")
        since = time.strftime(" since %Y-%m-%d %H:%M:%S", time.localtime(started)) if isinstance(started, float) else ""
        return RecipeError(
            f"{self.path.parent} is in use: {who} has been at work in it{since} ({found.get('command', 'unknown command')}): "
            "wait for it, stop it, or choose another --output_dir"
        )
