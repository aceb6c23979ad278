"""Files of shards, wherever they are: local paths, http(s), S3, and every scheme or pipe that WebDataset opens.

A remote shard is copied once into a local cache that all processes of a machine share, and read from there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import importlib.metadata
import itertools
import math
import os
import re
import secrets
import shutil
import signal
import stat
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
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from braceexpand import braceexpand

T = TypeVar("T")
CHUNK = 1 << 20
LOCAL_TRIES, LOCAL_PAUSE = 3, 0.2
UNPACKED_BY = {
    **dict.fromkeys((".tar.gz", ".tgz"), "gunzip"),
    **dict.fromkeys((".tar.bz2", ".tbz2"), "bunzip2"),
    **dict.fromkeys((".tar.xz", ".txz"), "unxz"),
    **dict.fromkeys((".tar.zst", ".tzst"), "unzstd"),
    ".tar.lz4": "unlz4",
}
S3FS = (2024, 6)  # the oldest; setup.py names it too
NEEDS_S3FS = "s3fs 2024.6 or newer reads: pip install 'vlmo_ds[s3]'"
MOST_NAMES = 1_000_000  # that braces may stand for
SEARCHED_FOLDERS = 1000  # for tars below a folder that holds none, to say where they are
CACHED = re.compile(r"[0-9a-f]{16}-")  # how the cache's own files begin
CURL = ("curl", "--fail", "--silent", "--show-error", "--location", "--globoff", "--connect-timeout", "30")
COMMANDS = {  # what fetches a URL; its place is {}
    "s3": ("aws", "s3", "cp", "{}", "-"),
    "gs": ("gsutil", "cat", "{}"),
    "ais": ("ais", "get", "{}", "-"),
    **dict.fromkeys(("ftp", "ftps", "sftp", "scp"), (*CURL, "--url", "{}")),
}


class DataError(ValueError):
    """Data that cannot be used; the message names the file, what it holds and what is accepted."""


class NoAccess(DataError):
    """A store that does not let us in."""


UMASK = os.umask(0)
os.umask(UMASK)


def mode_of_umask(path: Path) -> None:
    """Gives a file the mode that the umask says, where a library has made it for its owner alone."""
    os.chmod(path, 0o666 & ~UMASK)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary name and renames: a reader sees the old file or the new one, never a half, even after a power
    cut. The mode is what the umask says."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def expand(patterns: Sequence[str]) -> list[str]:
    """Tar files from names, {000..009} ranges, *, ** and [] patterns, folders and URLs, in a fixed order.

    A name that exists is taken as it is, whatever signs it holds. DataError where nothing is found.
    """
    return [url for pattern in patterns for name in unbraced(pattern) for url in found_under(name)]


def unbraced(pattern: str) -> list[str]:
    if "\0" in pattern:
        raise DataError(f"shards: {pattern!r} is no file name")
    if not is_remote(pattern) and os.path.exists(pattern):
        return [pattern]
    ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", pattern)
    lists = re.findall(r"\{([^{}]*,[^{}]*)\}", pattern)
    counts = [*(1 + abs(int(last) - int(first)) for first, last in ranges), *(1 + names.count(",") for names in lists)]
    if math.prod(counts) > MOST_NAMES:  # said at once: to write that many names out takes a minute
        raise DataError(f"shards: {pattern} stands for more than {MOST_NAMES:,} names")
    try:
        names = list(itertools.islice(braceexpand(pattern), MOST_NAMES + 1))
    except ValueError as error:
        raise DataError(f"shards: the braces of {pattern} are not balanced ({error}); expected {{000..009}}") from None
    if len(names) > MOST_NAMES:
        raise DataError(f"shards: {pattern} stands for more than {MOST_NAMES:,} names")
    return names


def found_under(name: str) -> list[str]:
    """The tars of one name, folder or pattern."""
    if name.startswith("s3://") and ".tar" not in name.rpartition("/")[2]:
        return tars_in_s3(name.rstrip("/"))
    if is_remote(name) or os.path.isfile(name):
        refuse_compressed([name])
        return [name]
    if os.path.isdir(name):
        return tars_of(name)
    found = globbed(name)
    folders = [path for path in found if os.path.isdir(path)]
    tars = [path for path in found if path.endswith(".tar") and path not in folders]
    tars = tars or [tar for folder in folders for tar in globbed(f"{glob.escape(folder)}/*.tar")]
    tars = tars or [path for path in found if path not in folders]
    if not tars:
        raise DataError(f"shards: {name} {nothing_in(folders)}; expected WebDataset tars (see docs/data.md)")
    refuse_compressed(tars)
    return tars


def globbed(pattern: str) -> list[str]:
    """What a pattern finds; where that is nothing, brackets are taken as part of the name."""
    found = matches(pattern) or (matches(pattern.replace("[", "[[]")) if "[" in pattern else [])
    return sorted(str(Path(path)) for path in found)


def matches(pattern: str) -> list[str]:
    path = Path(pattern)
    if "**" not in path.parts:
        return glob.glob(pattern)
    # unlike glob's, pathlib's ** does not follow links to folders, which may lead round in circles
    below = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    return [str(found) for found in below if not found.name.startswith(".")]


def tars_of(folder: str) -> list[str]:
    inside = glob.escape(folder)
    leftovers = sorted(glob.glob(f"{inside}/*.tmp") + glob.glob(f"{inside}/*.part"))
    if leftovers and not os.path.exists(f"{folder}/index.json"):
        raise DataError(
            f"shards: {folder} is unfinished ({os.path.basename(leftovers[0])} is left in it and index.json is missing): "
            "run the prepare command that writes it again"
        )
    found = globbed(f"{inside}/*.tar")
    if not found:
        refuse_compressed(globbed(f"{inside}/*"))
        raise DataError(f"shards: {folder} {nothing_in([folder])}; expected WebDataset tars (see docs/data.md)")
    return found


def tars_in_s3(folder: str) -> list[str]:
    if not s3fs_is_there():
        raise DataError(
            f"shards: {folder} is a folder of an object store, which {NEEDS_S3FS}, or name its tars, as in "
            f"{folder}/{{000000..000009}}.tar"
        )
    try:
        with errors_of_s3(folder):
            found = s3().ls(folder, detail=False)
    except FileNotFoundError:
        raise DataError(f"shards: {folder} does not exist; expected WebDataset tars (see docs/data.md)") from None
    except OSError as error:
        raise DataError(f"shards: {folder} cannot be listed: {error}") from None
    refuse_compressed(found)
    tars = sorted(f"s3://{path}" for path in found if path.endswith(".tar"))
    if not tars:
        raise DataError(f"shards: {folder} {nothing_in([folder])}; expected WebDataset tars (see docs/data.md)")
    return tars


def s3fs_is_there() -> bool:
    """Of a version that takes credentials and endpoint as the AWS tools do; pip may choose one of 2020 where others hold botocore."""
    try:
        version = importlib.metadata.version("s3fs")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) >= S3FS


def s3() -> Any:
    """The object store, with credentials as the AWS tools take them."""
    import fsspec

    return fsspec.filesystem("s3")


@contextlib.contextmanager
def errors_of_s3(url: str) -> Iterator[None]:
    """NoAccess, in one line, where credentials are missing or refused; botocore's other errors as OSError."""
    try:
        yield
    except PermissionError as error:
        raise NoAccess(f"{url}: the store does not let us in: {error}") from None
    except (OSError, DataError):
        raise
    except Exception as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "redential" in told:
            raise NoAccess(f"{url}: {told}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE") from None
        raise OSError(told) from None


def nothing_in(folders: Sequence[str]) -> str:
    """Why folders give no shards, and where below them tars are."""
    if not folders:
        return "does not exist"
    below = (Path(at, name) for folder in folders for at, _, names in few_folders(folder) for name in sorted(names))
    first = next((path for path in below if path.suffix == ".tar"), None)
    if first is None:
        return "holds no .tar file"
    return f"holds no .tar file itself, but {first.parent} does: name '{folders[0]}/**/*.tar'"


def few_folders(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    for _, found in zip(range(SEARCHED_FOLDERS), os.walk(folder), strict=False):
        found[1].sort()
        yield found


def refuse_compressed(names: Sequence[str]) -> None:
    """A sample is read at its offset, which a compressed file does not have."""
    for name in names:
        path = (urlsplit(name).path if "://" in name else name).lower()
        command = next((UNPACKED_BY[ending] for ending in UNPACKED_BY if path.endswith(ending)), None)
        if command and not name.startswith("pipe:"):
            raise DataError(
                f"shards: {name} is compressed, which is not supported, since samples are read at their offsets: "
                f"unpack it with {command} (it grows by little, pictures are compressed themselves)"
            )


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
        if is_whole(path, size):
            with contextlib.suppress(FileNotFoundError):  # another process may remove it in this moment
                os.utime(path, follow_symlinks=False)  # its last use, for prune
                return path
        private_folder(self.cache)
        with opened_privately(path.with_name(f".{path.name}.lock"), os.O_RDWR) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_whole(path, size):
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
        temporary.unlink(missing_ok=True)  # of a process that was killed: the lock is held
        try:
            with (
                opened_privately(temporary, os.O_WRONLY | os.O_EXCL) as file,
                opened(url, self.stall_seconds) as stream,
            ):
                shutil.copyfileobj(stream, file, CHUNK)
            found = temporary.stat().st_size
            if size is not None and found != size:
                raise OSError(f"{found} bytes came, the index says {size}")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def prune(self, keep: Path) -> None:
        """Removes the shards that were not used for longest until the cache fits its limit; other files stay."""
        found = []
        with os.scandir(self.cache) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process prunes as well
                    if CACHED.match(entry.name):
                        about = entry.stat(follow_symlinks=False)
                        found.append((about.st_mtime, about.st_size, entry.path))
        excess = sum(size for _, size, _ in found) - self.cache_bytes
        for _, size, path in sorted(found):
            if excess > 0 and path != str(keep):
                Path(path).unlink(missing_ok=True)
                excess -= size


def private_folder(path: Path) -> None:
    """Makes a folder that nobody else can write to, or checks that it is one. DataError if it is not.

    In a folder that others can write to they could plant shards of their own, or links to files to be overwritten.
    """
    accepted = "accepted: a folder of your own, not writable by others (data.cache)"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = path.lstat()
    except OSError as error:
        raise DataError(f"the cache {path} cannot be made: {error.strerror}; {accepted}") from None
    if stat.S_ISLNK(about.st_mode):
        raise DataError(f"the cache {path} is a link to {os.path.realpath(path)}: name that folder itself; {accepted}")
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
        raise DataError(f"the cache {path} belongs to user {about.st_uid}, not to you; {accepted}")
    if about.st_mode & 0o022:
        raise DataError(f"the cache {path} can be written by others: 'chmod go-w {path}' once it is empty; {accepted}")


def is_whole(path: Path, size: int | None) -> bool:
    """Whether a cached file is there, with so many bytes where that is known; what was planted there does not count."""
    try:
        about = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    own = stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid()
    return own and (size is None or about.st_size == size)


def opened_privately(path: Path, flags: int) -> BinaryIO:
    """A new or existing file of the cache; a link is not followed. DataError where something else is in its place."""
    try:
        handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EEXIST, errno.EISDIR):
            raise DataError(f"{path} is no file of this cache: look who has put it there, and remove it") from None
        raise DataError(f"{path} cannot be written: {error.strerror}") from None
    return os.fdopen(handle, "rb+" if flags & os.O_RDWR else "wb")


def is_remote(url: str) -> bool:
    return url.startswith("pipe:") or "://" in url


@contextlib.contextmanager
def opened(url: str, stall_seconds: float) -> Iterator[Counted]:
    """A stream of a remote file's bytes; OSError where it cannot be opened or stalls."""
    if url.startswith(("http://", "https://", "hf://")):
        try:
            with urllib.request.urlopen(request_for(url), timeout=stall_seconds) as stream:
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
    if url.startswith("file://"):
        with open(urllib.request.url2pathname(urlsplit(url).path), "rb") as stream:
            yield Counted(stream)
        return
    if url.startswith("s3://") and s3fs_is_there():
        with errors_of_s3(url), s3().open(url, "rb") as stream:
            yield Counted(stream)
        return
    with ended_with_its_group(command_for(url)) as process:
        counted = Counted(process.stdout)  # type: ignore[arg-type]  # a pipe
        done = threading.Event()
        watcher = threading.Thread(target=end_stalled, args=(process, counted, stall_seconds, done), daemon=True)
        watcher.start()
        try:
            yield counted
        finally:
            done.set()
            watcher.join()
        if counted.stalled:
            raise OSError(f"no byte came for {stall_seconds:g} s after {counted.bytes}")
        try:
            status = process.wait(stall_seconds)
        except subprocess.TimeoutExpired:
            raise OSError(f"its command does not end after its {counted.bytes} bytes") from None
    if status != 0:
        raise OSError(f"its command ended with status {status} after {counted.bytes} bytes")


def request_for(url: str) -> urllib.request.Request:
    """An http request; hf://datasets/OWNER/NAME/FILE asks the Hugging Face hub, with the user's token if there is one."""
    if not url.startswith("hf://"):
        return urllib.request.Request(url)
    from huggingface_hub import HfFileSystem, get_token, hf_hub_url

    place = HfFileSystem().resolve_path(url)
    if not hasattr(place, "repo_id"):
        raise DataError(f"{url} is in a bucket; accepted are files of repositories, hf://datasets/OWNER/NAME/FILE")
    request = urllib.request.Request(
        hf_hub_url(place.repo_id, place.path_in_repo, repo_type=place.repo_type, revision=place.revision)
    )
    if token := get_token():
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # not for the server it is sent on to
    return request


def command_for(url: str) -> str | list[str]:
    """What writes a URL's content to its output: a line of shell, or a command with its arguments."""
    if url.startswith("pipe:"):
        return url[5:]
    scheme = url.partition("://")[0]  # in the table, so that no URL begins with - and is taken for an option
    if scheme not in COMMANDS:
        accepted = ", ".join(f"{name}://" for name in ("http", "https", "hf", "file", *COMMANDS))
        raise DataError(f"{url} cannot be opened: accepted are {accepted}, and pipe:COMMAND")
    return [url if word == "{}" else word for word in COMMANDS[scheme]]


@contextlib.contextmanager
def ended_with_its_group(command: str | list[str]) -> Iterator[subprocess.Popen]:
    """A running command in a process group of its own, of which nothing is left afterwards."""
    shell = isinstance(command, str)
    try:
        process = subprocess.Popen(
            command, shell=shell, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
    except FileNotFoundError:
        raise DataError(f"'{command[0]}' is not installed, which reads {command}") from None
    except ValueError as error:  # a NUL
        raise DataError(f"{command!r} cannot be started: {error}") from None
    try:
        yield process
    finally:
        end_group(process)
        process.stdout.close()  # type: ignore[union-attr]  # a pipe
        process.wait()


def end_group(process: subprocess.Popen) -> None:
    """Kills a command and all that it has started; its group's number is its own, from start_new_session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


class Counted:
    """Counts the bytes that are read."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.bytes = stream, 0
        self.stalled = False

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.bytes += len(data)
        return data


def end_stalled(process: subprocess.Popen, counted: Counted, stall_seconds: float, done: threading.Event) -> None:
    """Ends a command, and what it started, after so long without a byte."""
    seen = -1
    while not done.wait(stall_seconds):
        if counted.bytes == seen:
            counted.stalled = True
            end_group(process)
            return
        seen = counted.bytes


def retried(action: Callable[[], T], tries: int, what: str) -> T:
    """The action's result; after an OSError it is tried again. The last error becomes a DataError."""
    for attempt in range(1, tries + 1):
        try:
            return action()
        except OSError as error:
            gone = isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404, 410)
            if gone or attempt == tries or error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT):
                raise DataError(f"{what} cannot be read: {error} (try {attempt} of {tries})") from None
            time.sleep(min(30.0, 0.5 * 2 ** (attempt - 1)))
    raise AssertionError("unreachable")


def read_span(path: Path, offset: int, size: int) -> bytes:
    """Bytes of a local file; network file systems get a second and third try. DataError where they are not there."""
    for attempt in range(1, LOCAL_TRIES + 1):
        try:
            with open(path, "rb") as file:
                size_of_file = os.fstat(file.fileno()).st_size
                file.seek(offset)
                data = file.read(max(0, min(size, size_of_file - offset)))  # an index may claim any number of bytes
            break
        except OSError as error:
            if isinstance(error, FileNotFoundError) or attempt == LOCAL_TRIES:
                raise DataError(f"shard {path} cannot be read: {error.strerror or error}") from None
            time.sleep(LOCAL_PAUSE)
    if len(data) < size:
        raise DataError(f"shard {path} is truncated: {size} bytes expected at {offset}, {len(data)} found")
    return data
