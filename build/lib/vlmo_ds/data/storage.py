"""Files of shards, wherever they are: local paths, http(s), and every scheme or pipe that WebDataset opens.

A remote shard is copied once into a local cache that all processes of a machine share, and read from there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, TypeVar

from braceexpand import braceexpand
from webdataset import gopen

T = TypeVar("T")
CHUNK = 1 << 20
LOCAL_TRIES, LOCAL_PAUSE = 3, 0.2


class DataError(ValueError):
    """Data that cannot be used; the message names the file, what it holds and what is accepted."""


UMASK = os.umask(0)
os.umask(UMASK)


def mode_of_umask(path: Path) -> None:
    """Gives a file the mode that the umask says, where a library has made it for its owner alone."""
    os.chmod(path, 0o666 & ~UMASK)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary name and renames: a reader sees the old file or the new one, never a half, even after a power
    cut. The mode is what the umask says."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def expand(patterns: Sequence[str]) -> list[str]:
    """Tar files from names, {000..009} ranges, * patterns, folders and URLs, in a fixed order."""
    urls: list[str] = []
    for pattern in patterns:
        for name in braceexpand(pattern):
            path = Path(name)
            if is_remote(name):
                found = [name]
            elif path.is_dir():
                leftovers = sorted([*path.glob("*.tmp"), *path.glob("*.part")])
                if leftovers and not (path / "index.json").exists():
                    raise DataError(
                        f"shards: {path} is unfinished ({leftovers[0].name} is left in it and index.json is missing): "
                        "run the prepare command that writes it again"
                    )
                found = sorted(map(str, path.glob("*.tar")))
            elif any(c in path.name for c in "*?["):
                found = sorted(map(str, path.parent.glob(path.name)))
            else:
                found = [name] if path.is_file() else []
            if not found:
                kind = "holds no .tar file" if path.is_dir() else "does not exist"
                raise DataError(f"shards: {name} {kind}; expected WebDataset tars (see docs/data.md)")
            urls += found
    return urls


@dataclass(frozen=True)
class Storage:
    """How remote files are fetched. Pauses between tries double, from half a second to half a minute."""

    cache: Path = Path(tempfile.gettempdir()) / f"vlmo_ds_cache_{os.getuid()}"
    cache_bytes: int = 100 * 10**9
    tries: int = 6
    stall_seconds: float = 60.0

    def local(self, url: str, size: int | None = None) -> Path:
        """A local path with the content of `url`. size: bytes it must have, where known.

        Raises DataError when the last try has failed.
        """
        if not is_remote(url):
            return Path(url)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", url.rstrip("/").rsplit("/", 1)[-1])[-80:]
        path = self.cache / f"{hashlib.blake2b(url.encode(), digest_size=8).hexdigest()}-{name}"
        with contextlib.suppress(FileNotFoundError):
            if size is None or path.stat().st_size == size:
                os.utime(path)  # its last use, for prune
                return path
        self.cache.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists() or (size is not None and path.stat().st_size != size):
                retried(lambda: self.fetch(url, path, size), self.tries, url)
                self.prune(keep=path)
        return path

    def read(self, url: str) -> bytes:
        """A small remote file, not cached. Raises DataError when the last try has failed."""

        def content() -> bytes:
            with opened(url, self.stall_seconds) as stream:
                return b"".join(iter(lambda: stream.read(CHUNK), b""))

        return retried(content, self.tries, url)

    def fetch(self, url: str, path: Path, size: int | None) -> None:
        temporary = path.with_name(f".{path.name}.part")
        try:
            with open(temporary, "wb") as file, opened(url, self.stall_seconds) as stream:
                shutil.copyfileobj(stream, file, CHUNK)
            found = temporary.stat().st_size
            if size is not None and found != size:
                raise OSError(f"{found} bytes came, the index says {size}")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def prune(self, keep: Path) -> None:
        """Removes the files that were not used for longest until the cache fits its limit."""
        with os.scandir(self.cache) as entries:
            found = sorted((e.stat().st_mtime, e.stat().st_size, e.path) for e in entries if not e.name.startswith("."))
        excess = sum(size for _, size, _ in found) - self.cache_bytes
        for _, size, path in found:
            if excess > 0 and path != str(keep):
                Path(path).unlink(missing_ok=True)
                excess -= size


def is_remote(url: str) -> bool:
    return url.startswith("pipe:") or "://" in url


@contextlib.contextmanager
def opened(url: str, stall_seconds: float) -> Iterator[BinaryIO]:
    """A stream of a remote file's bytes; OSError where it cannot be opened or stalls."""
    if url.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(url, timeout=stall_seconds) as stream:
                expected = stream.headers.get("Content-Length")
                counted = Counted(stream)
                yield counted
                if expected is not None and counted.bytes != int(expected):
                    raise OSError(f"the connection ended after {counted.bytes} of {expected} bytes")
        except DataError:
            raise
        except (HTTPException, ValueError) as error:
            raise OSError(str(error)) from None
        return
    if url.startswith("s3://"):
        url = f"pipe:aws s3 cp {shlex.quote(url)} -"
    if url.startswith("pipe:"):
        process = subprocess.Popen(url[5:], shell=True, stdout=subprocess.PIPE, start_new_session=True)
        stream = process.stdout
    else:
        try:
            stream = gopen(url)
        except (ValueError, AttributeError) as error:
            raise DataError(f"{url} cannot be opened: {error}") from None
        process = getattr(stream, "proc", None)
    counted = Counted(stream)
    done = threading.Event()
    if process is not None:
        threading.Thread(target=end_stalled, args=(process, counted, stall_seconds, done), daemon=True).start()
    try:
        yield counted
    finally:
        done.set()
        stream.close()
    if process is not None and process.wait() != 0:
        raise OSError(f"its command ended with status {process.returncode} after {counted.bytes} bytes")


class Counted:
    """Counts the bytes that are read."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.bytes = stream, 0

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.bytes += len(data)
        return data


def end_stalled(process: subprocess.Popen, counted: Counted, stall_seconds: float, done: threading.Event) -> None:
    """Ends a command, and what it started, after so long without a byte."""
    seen = -1
    while not done.wait(stall_seconds):
        if counted.bytes == seen:
            with contextlib.suppress(ProcessLookupError):
                own_group = os.getpgid(process.pid) == process.pid
                (os.killpg if own_group else os.kill)(process.pid, signal.SIGKILL)
            return
        seen = counted.bytes


def retried(action: Callable[[], T], tries: int, what: str) -> T:
    """The action's result; after an OSError it is tried again. The last error becomes a DataError."""
    for attempt in range(1, tries + 1):
        try:
            return action()
        except OSError as error:
            gone = isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404, 410)
            if gone or attempt == tries or error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
                raise DataError(f"{what} cannot be read: {error} (try {attempt} of {tries})") from None
            time.sleep(min(30.0, 0.5 * 2 ** (attempt - 1)))
    raise AssertionError("unreachable")


def read_span(path: Path, offset: int, size: int) -> bytes:
    """Bytes of a local file; network file systems get a second and third try. DataError where they are not there."""
    for attempt in range(1, LOCAL_TRIES + 1):
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
            break
        except OSError as error:
            if isinstance(error, FileNotFoundError) or attempt == LOCAL_TRIES:
                raise DataError(f"shard {path} cannot be read: {error.strerror or error}") from None
            time.sleep(LOCAL_PAUSE)
    if len(data) < size:
        raise DataError(f"shard {path} is truncated: {size} bytes expected at {offset}, {len(data)} found")
    return data
