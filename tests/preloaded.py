"""Python processes that need not import PyTorch, DeepSpeed and vlmo_ds first: forked from a process that has.

They are processes like any other, with an environment, signals and an exit status of their own; only the three seconds of
imports are saved, hundreds of times. Tests of launchers and of start-up itself start fresh interpreters instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PRELOADED = ["vlmo_ds.training.run", "torch.utils.tensorboard", "tensorboard.compat.proto.event_pb2", "webdataset"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def run(arguments: list[str], folder: str, environment: dict[str, str], output: str, errors: str) -> None:
    """In the new process: what `python *arguments` does."""
    for path, number in ((output, 1), (errors, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    multiprocessing.set_start_method(
        multiprocessing.get_all_start_methods()[0], force=True
    )  # as a new interpreter has it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # libgomp has read its number of threads when the server imported PyTorch: the bits of sums depend on it
    threads = environment.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))
    sys.modules["torch"].set_num_threads(int(threads))
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(":") if path and path not in sys.path]
    first, *rest = arguments
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # as in a new interpreter, where runpy does not warn of it
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


class Process:
    """A process as subprocess.Popen shows it, as far as the tests need it."""

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str], together: bool = True):
        """arguments: of the Python interpreter; together: whether stderr goes to where stdout goes."""
        self.args = arguments
        self.files = [Path(tempfile.mkstemp(prefix="preloaded-")[1]) for _ in range(1 if together else 2)]
        paths = str(self.files[0]), str(self.files[-1])
        self.process = _context.Process(target=run, args=(arguments, str(folder), environment, *paths))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout, self.output(0))
        return self.process.exitcode

    def output(self, number: int) -> str:
        return self.files[number].read_text(errors="replace") if self.files[number].exists() else ""

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        found = self.output(0), self.output(-1)
        for file in self.files:
            file.unlink(missing_ok=True)
        self.output = lambda number: found[number]  # asked again
        return found

    def send_signal(self, number: int) -> None:
        if self.process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)
