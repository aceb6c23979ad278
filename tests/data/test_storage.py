"""Names of shards, the cache, and the commands that fetch them."""

import os
import time
from pathlib import Path

import psutil
import pytest
from data.files import write_tar

from vlmo_ds.data import storage
from vlmo_ds.data.storage import DataError, Storage, command_for, expand, opened, read_span, write_atomically

# ---- names ----


@pytest.fixture
def tree(tmp_path):
    for name in ("cc/0/000.tar", "cc/1/000.tar", "cc/deep/er/a.tar", "set/coco[1].tar", "set/a{1}.tar", "b[2]/x.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / name, {"0.txt": b"a dog"})
    for name in ("cc/0/index.json", "cc/0/.hidden.tar", "gz/000.tar.gz", "gz/sub/b.tgz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "cc/0/round").symlink_to(tmp_path / "cc")
    return tmp_path


@pytest.mark.parametrize(
    "pattern, found",
    [
        ("cc/0", ["cc/0/000.tar"]),
        ("cc/*/*.tar", ["cc/0/000.tar", "cc/1/000.tar"]),
        ("cc/*/000.tar", ["cc/0/000.tar", "cc/1/000.tar"]),
        ("cc/[01]/*.tar", ["cc/0/000.tar", "cc/1/000.tar"]),
        ("cc/?/*", ["cc/0/000.tar", "cc/1/000.tar"]),
        ("cc/[0-1]", ["cc/0/000.tar", "cc/1/000.tar"]),
        ("cc/**/*.tar", ["cc/0/000.tar", "cc/1/000.tar", "cc/deep/er/a.tar"]),
        ("cc/{0..1}/000.tar", ["cc/0/000.tar", "cc/1/000.tar"]),
        ("cc/{0..1}", ["cc/0/000.tar", "cc/1/000.tar"]),
        ("set/coco[1].tar", ["set/coco[1].tar"]),
        ("set/coco[1]*", ["set/coco[1].tar"]),
        ("set/a{1}.tar", ["set/a{1}.tar"]),
        ("b[2]", ["b[2]/x.tar"]),
        ("b[2]/*.tar", ["b[2]/x.tar"]),
    ],
)
def test_patterns(tree, pattern, found):
    assert [str(Path(p).relative_to(tree)) for p in expand([f"{tree}/{pattern}"])] == found


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("cc", r"cc holds no .tar file itself, but .*cc/0 does: name '.*cc/\*\*/\*.tar'"),
        ("cc/dee*", "does: name"),
        ("cc/{0..1/000.tar", "braces of .* are not balanced"),
        ("cc/0..1}/000.tar", "braces of .* are not balanced"),
        ("{0..99999999999}.tar", "more than 1,000,000 names"),
        ("{0..9999}/{0..9999}.tar", "more than 1,000,000 names"),
        ("{a,b}" * 25, "more than 1,000,000 names"),
        ("gz/000.tar.gz", "is compressed, which is not supported, .* unpack it with gunzip"),
        ("gz", "is compressed"),
        ("gz/*", "is compressed"),
        ("gz/sub/*.tgz", "is compressed"),
        ("no/*/x.tar", "does not exist"),
        ("a\0b", "is no file name"),
    ],
)
def test_patterns_that_find_nothing(tree, pattern, message):
    with pytest.raises(DataError, match=message):
        expand([f"{tree}/{pattern}"])


def test_remote_names():
    assert expand(["https://host/[1]/{0..1}.tar", "pipe:zcat x.tar.gz"]) == [
        "https://host/[1]/0.tar",
        "https://host/[1]/1.tar",
        "pipe:zcat x.tar.gz",
    ]
    with pytest.raises(DataError, match="is compressed"):
        expand(["s3://bucket/{0..1}.tar.gz?version=3"])


def test_files_have_the_modes_that_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640 and len(list(tmp_path.iterdir())) == 1


def test_a_span_beyond_the_file_takes_no_memory(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=f"is truncated: {1 << 45} bytes expected at 10, 90 found"):
        read_span(tmp_path / "a.tar", 10, 1 << 45)


# ---- the cache ----


@pytest.fixture
def served(tmp_path):
    """A 'remote' file and the storage that fetches it."""
    source = write_tar(tmp_path / "a.tar", {"x.txt": b"one"})
    return f"file://{source}", Storage(cache=tmp_path / "cache", tries=1), source.read_bytes()


def test_the_cache_is_private(served):
    url, there, content = served
    assert there.local(url).read_bytes() == content == there.read(url)
    assert there.cache.stat().st_mode & 0o777 == 0o700
    assert all(p.stat().st_mode & 0o077 == 0 for p in there.cache.iterdir())


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_cache_that_others_can_write_to_is_refused(served, mode):
    url, there, _ = served
    there.cache.mkdir()
    there.cache.chmod(mode)
    with pytest.raises(DataError, match="can be written by others"):
        there.local(url)
    assert not any(there.cache.iterdir())


def test_a_cache_that_is_a_link_a_file_or_of_another_user_is_refused(served, tmp_path, monkeypatch):
    url, there, _ = served
    (tmp_path / "victim").mkdir()
    there.cache.symlink_to(tmp_path / "victim")
    with pytest.raises(DataError, match="is a link to .*victim"):
        there.local(url)
    there.cache.unlink()
    there.cache.touch()
    with pytest.raises(DataError, match="cannot be made: File exists"):
        there.local(url)
    there.cache.unlink()
    monkeypatch.setattr(storage.os, "getuid", lambda: 12345)
    with pytest.raises(DataError, match="belongs to user"):
        there.local(url)
    assert not any((tmp_path / "victim").iterdir())


@pytest.mark.parametrize("kind", [".{}.lock", ".{}.part", "{}"])
def test_planted_links_are_not_followed(served, tmp_path, kind):
    url, there, content = served
    name = there.local(url).name
    for path in there.cache.iterdir():
        path.unlink()
    victim = tmp_path / "thesis"
    victim.write_bytes(b"do not lose")
    (there.cache / kind.format(name)).symlink_to(victim)
    try:
        found = there.local(url)
        assert found.read_bytes() == content and not found.is_symlink()
    except DataError as error:
        assert "is no file of this cache" in str(error)
    assert victim.read_bytes() == b"do not lose"


def test_pruning_leaves_other_files(served):
    url, there, _ = served
    there.cache.mkdir(mode=0o700)
    (there.cache / "thesis.txt").write_bytes(b"x" * 1000)
    Storage(cache=there.cache, cache_bytes=1, tries=1).local(url)
    assert (there.cache / "thesis.txt").exists()


# ---- commands ----


def none_is_left_of(word: str) -> bool:
    """Within 10 seconds: a process that is killed may be listed until it has run once more."""
    end = time.monotonic() + 10
    while any(word in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    "line",
    [
        "sleep {0} & sleep {0}; cat /dev/null",  # never a byte, with a child in the background
        "echo some; (trap '' TERM; sleep {0})",
        "echo some; exec >&-; sleep {0}",  # its output ends, it does not
        "sleep {0} & echo all",  # its child holds the output open
    ],
)
def test_a_command_that_stalls_is_ended_with_all_that_it_started(line):
    seconds = f"3600.{os.getpid()}"
    start = time.monotonic()
    with pytest.raises(DataError, match="cannot be read"):
        Storage(tries=1, stall_seconds=0.3).read(f"pipe:{line.format(seconds)}")
    assert time.monotonic() - start < 10
    assert none_is_left_of(seconds)


def test_nothing_is_left_of_a_command_whose_reader_fails():
    seconds = f"3600.1{os.getpid()}"
    with pytest.raises(ZeroDivisionError), opened(f"pipe:echo some; sleep {seconds}", 60):
        raise ZeroDivisionError
    assert none_is_left_of(seconds)


def test_urls_are_arguments_and_not_shell(tmp_path, monkeypatch):
    for tool in ("aws", "gsutil", "curl", "ais"):
        (tmp_path / tool).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "s3fs_is_there", lambda: False)
    for scheme in ("s3", "gs", "ais", "sftp"):
        url = f"{scheme}://bucket/a'; touch pwned; '$(touch pwned).tar"
        assert url.encode() in Storage(tries=1).read(url).split(b"\n")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("url", ["-o/tmp/x://a", "--config=/x://y", "S 3://x", "nfs://x", "://x"])
def test_urls_of_no_known_kind_start_nothing(url):
    with pytest.raises(DataError, match=r"cannot be opened: accepted are http://"):
        command_for(url)


def test_a_tool_that_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    start = time.monotonic()
    with pytest.raises(DataError, match="'gsutil' is not installed"):
        Storage(tries=6).read("gs://bucket/a.tar")
    assert time.monotonic() - start < 1


def test_a_file_in_a_bucket_of_the_hub_is_refused_by_name(monkeypatch):
    class InABucket:
        bucket_id, path = "owner/name", "0.tar"

    monkeypatch.setattr("huggingface_hub.HfFileSystem.resolve_path", lambda *_: InABucket())
    with pytest.raises(DataError, match=r"hf://buckets/owner/name/0\.tar is in a bucket"):
        storage.request_for("hf://buckets/owner/name/0.tar")
