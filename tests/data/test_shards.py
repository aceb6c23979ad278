"""Shards, their index, remote storage, and everything that can be wrong with them."""

import contextlib
import http.server
import io
import json
import os
import re
import struct
import tarfile
import threading
import time
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import call, reads
from data.files import jpeg, png, write_pairs, write_tar
from data.test_stream import TOKENIZER

from vlmo_ds.config import DataConfig
from vlmo_ds.data.index import INDEX, ShardIndex, dump_index, pack, scan_shard
from vlmo_ds.data.loader import BatchDataset, batches, check_samples, source_shards, spec_for
from vlmo_ds.data.shards import list_shards, read_index
from vlmo_ds.data.storage import DataError, Storage, expand

FAST = {"tries": 5, "stall_seconds": 5.0}

index = partial(call, "vlmo_ds.data.index")


def dataset(where, batch=16, tasks=("mlm", "itc"), **changes) -> BatchDataset:
    data = DataConfig(**{"shards": [str(where)], "lanes": 4, "transform": "square_transform", **FAST, **changes})
    spec = spec_for(reads(*tasks), 32, 8, 20, 3)
    return BatchDataset(data, spec, TOKENIZER, rank=0, world_size=1, batch_size=batch)


def whole_epoch(data: BatchDataset, samples: int) -> tuple[set[int], list[tuple[str, str]]]:
    """(ids, replaced) of the first epoch."""
    found, replaced = set(), []
    for i in range(-(-samples // data.global_size)):
        batch = data[i]
        found |= set(batch["sample_id"].tolist())
        replaced += batch["replaced"]
    return found, replaced


# ---- names and index ----


def test_expand_and_count(tmp_path):
    for i in range(3):
        write_pairs(tmp_path / f"a-{i:03d}.tar", 2)
    names = [Path(p).name for p in expand([f"{tmp_path}/a-{{000..001}}.tar", f"{tmp_path}/a-00[2].tar"])]
    assert names == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert [s.samples for s in list_shards([str(tmp_path)])] == [2, 2, 2]


@pytest.mark.parametrize(
    "name, message", [("missing.tar", "missing.tar does not exist"), ("empty", "holds no .tar file")]
)
def test_missing_shards(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        expand([str(tmp_path / name)])


def test_unfinished_folder_is_refused(tmp_path):
    write_tar(tmp_path / "a-000000.tar", {"x.txt": b"one"})
    (tmp_path / "shard.tar.tmp").touch()
    with pytest.raises(DataError, match="is unfinished"):
        expand([str(tmp_path)])


def test_captions_and_ids(tmp_path):
    meta = json.dumps({"captions": ["a dog", "  ", "two\0 dogs \U0001f415"], "image_id": 42}).encode()
    path = write_tar(tmp_path / "a.tar", {"k.jpg": jpeg(), "k.json": meta, "e.jpg": jpeg(), "e.txt": b" \n "})
    (shard,) = list_shards([str(path)])
    sample, empty = shard.read(0), shard.read(1)
    assert sample.captions == ["a dog", "two dogs \U0001f415"] and sample.image_id == 42
    assert sample.sample_id == shard.read(0).sample_id != empty.sample_id == empty.image_id
    with pytest.raises(DataError, match="e has an empty caption"):
        _ = empty.captions


def test_index_command_makes_an_index_that_is_used(tmp_path):
    """Names longer than a tar header, folders, files that are no samples, and two dots in a name."""
    long = "folder/" + "x" * 150
    members = {f"{long}.jpg": jpeg(), f"{long}.txt": b"long", "README": b"no sample", "b.seg.png": png(), "b.txt": b"b"}
    write_tar(tmp_path / "a.tar", members)
    write_pairs(tmp_path / "b.tar", 30)
    before = list_shards([str(tmp_path)])
    assert "2 shards, 32 samples" in index(tmp_path).stdout
    read_index.cache_clear()
    after = list_shards([str(tmp_path)])
    assert [s.samples for s in after] == [2, 30] == [s.samples for s in before]
    assert all(s.index.offsets for s in after)
    for one, other in zip(before, after, strict=True):
        assert [one.read(i).fields for i in range(one.samples)] == [other.read(i).fields for i in range(other.samples)]
    assert after[0].read(0).key == long and after[0].read(1).fields.keys() == {"seg.png", "txt"}
    assert after[1].text_lengths[3] == len("picture 3 of ")


def test_index_of_another_file_is_refused(tmp_path):
    write_pairs(tmp_path / "a.tar", 5)
    index(tmp_path)
    write_pairs(tmp_path / "a.tar", 50)
    read_index.cache_clear()
    with pytest.raises(DataError, match=r"a.tar has \d+ bytes, its index says \d+: build the index again"):
        list_shards([str(tmp_path)])
    (tmp_path / INDEX).write_text("{}")
    read_index.cache_clear()
    with pytest.raises(DataError, match="index.json is not an index"):
        list_shards([str(tmp_path)])


def test_a_large_index_is_small():
    blocks = np.random.default_rng(0).integers(100, 400, 1000).astype(np.uint32)
    assert len(pack(blocks)) < 2500  # less than three bytes for each sample
    assert np.array_equal(ShardIndex(999, offsets=pack(blocks)).spans(), blocks.astype(np.int64).cumsum() * 512)


# ---- faults ----


def bomb() -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"s007_jpg": b""}, "007: not a readable image"),
        ({"s007_jpg": bomb()}, "007: .*(at most|exceeds limit)"),
        ({"s007_jpg": b"I am a text file.\n" * 40}, "007: not a readable image"),
        ({"s007_jpg": jpeg((300, 300))[:2000]}, "007: not a readable image"),
        ({"s007_txt": b"\0\0 "}, "007 has an empty caption"),
    ],
)
def test_a_sample_that_cannot_be_used_is_replaced_named_and_counted(tmp_path, changed, reason):
    write_pairs(tmp_path / "a.tar", 40, **changed)
    data = dataset(tmp_path)
    seen, replaced = whole_epoch(data, 40)
    assert len(replaced) == 1 and replaced[0][0] == "data"
    assert re.search(f"a.tar:{reason}", replaced[0][1]), replaced
    again, _ = whole_epoch(dataset(tmp_path), 40)
    assert seen == again and len(seen) >= 39
    check_samples(dataset(tmp_path, max_bad_fraction=0.1))
    with pytest.raises(DataError, match=r"1 of 40 samples .*source 'data'.*max_bad_fraction is 0.01.*a.tar:007"):
        check_samples(data)


def test_a_member_is_missing(tmp_path):
    members = {f"{i:03d}.{e}": d for i in range(20) for e, d in (("jpg", jpeg()), ("txt", b"a picture"))}
    del members["004.jpg"], members["011.txt"]
    write_tar(tmp_path / "a.tar", members)
    _, replaced = whole_epoch(dataset(tmp_path), 20)
    reasons = "\n".join(sorted(reason for _, reason in replaced))
    assert "004 has no image; found .txt" in reasons and "011 has an empty caption" in reasons


def test_two_members_of_one_name(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(20):
            for extension, content in [("jpg", jpeg()), ("txt", b"a picture")] + [("jpg", jpeg())] * (i == 6):
                info = tarfile.TarInfo(f"{i:03d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    _, replaced = whole_epoch(dataset(tmp_path, batch=20), 20)
    assert len(replaced) == 1 and "a.tar:006 has two members .jpg" in replaced[0][1]


def test_a_caption_with_nuls_and_emoji_is_used(tmp_path):
    write_pairs(tmp_path / "a.tar", 20, s003_txt="a\0 picture \U0001f415\U0001f3fd of words".encode())
    assert whole_epoch(dataset(tmp_path), 20)[1] == []


def test_a_truncated_tar_gives_what_is_whole(tmp_path):
    for i in range(4):
        write_pairs(tmp_path / f"{i}.tar", 40, "abcd"[i])
    index(tmp_path)
    os.truncate(tmp_path / "2.tar", 50_000)
    read_index.cache_clear()
    with pytest.warns(UserWarning, match="2.tar is truncated"):
        data = dataset(tmp_path)
    _, replaced = whole_epoch(data, 160)
    assert 5 < len(replaced) < 40 and all("2.tar is truncated" in reason for _, reason in replaced)
    with pytest.raises(DataError, match="max_bad_fraction"):
        check_samples(data)
    (tmp_path / INDEX).unlink()
    read_index.cache_clear()
    without = list_shards([str(tmp_path)])  # counted anew: the whole samples are left
    assert 0 < without[2].samples < 40
    assert index(tmp_path).stderr.count("warning: ") == 1


def test_a_shard_that_disappears_while_reading(tmp_path):
    for i in range(4):
        write_pairs(tmp_path / f"{i}.tar", 40, "abcd"[i])
    data = dataset(tmp_path, max_bad_fraction=0.5)
    assert data[0]["replaced"] == []
    (tmp_path / "1.tar").unlink()
    stream = batches(data, 1, 10, 2)
    replaced = [r for batch in stream for r in batch["replaced"]]
    assert len(replaced) >= 30 and all("1.tar cannot be read: No such file" in reason for _, reason in replaced)
    for i in (0, 2, 3):
        (tmp_path / f"{i}.tar").unlink()
    with pytest.raises(DataError, match="8 samples in a row cannot be used"):
        data[11]


def test_an_index_that_promises_too_much(tmp_path):
    path = write_pairs(tmp_path / "a.tar", 20)
    (tmp_path / INDEX).write_bytes(dump_index({"a.tar": ShardIndex(40)}))
    read_index.cache_clear()
    _, replaced = whole_epoch(dataset(tmp_path, batch=40), 40)
    assert len(replaced) >= 20 and f"shard {path} holds 20 samples, its index says 40" in replaced[0][1]


# ---- remote shards ----


@contextlib.contextmanager
def server(folder: Path, fails):
    """An http server; fails(n) is what it does with request n: None, an error code, 'cut' or 'hang'."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def do_GET(self):
            requests.append(self.path)
            fault = fails(len(requests))
            if fault == "hang":
                time.sleep(20)
            elif fault == "cut":
                data = (folder / self.path.lstrip("/")).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
            elif fault:
                self.send_error(fault)
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", requests
    finally:
        httpd.shutdown()


@pytest.fixture
def remote(tmp_path):
    """Four shards with an index, and the names to ask for."""
    folder = tmp_path / "served"
    folder.mkdir()
    for i in range(4):
        write_pairs(folder / f"{i}.tar", 10, "abcd"[i])
    index(folder)
    return folder


@pytest.mark.parametrize("fault", [503, "cut"])
def test_a_source_that_fails_every_third_request(remote, tmp_path, fault):
    with server(remote, lambda n: fault if n % 3 == 0 else None) as (url, requests):
        data = dataset(f"{url}/{{0..3}}.tar", cache=str(tmp_path / "cache"))
        far, replaced = whole_epoch(data, 40)
        assert len(far) == 40 and replaced == []
        assert 6 <= len(requests) <= 8  # every file once, and what failed again
        asked = len(requests)
        stream = batches(dataset(f"{url}/{{0..3}}.tar", cache=str(tmp_path / "cache")), 0, 4, 2)
        assert sum(len(b["sample_id"]) for b in stream) == 64
        assert len(requests) == asked  # all from the cache
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.endswith(".part")]
    local = {s.read(0).sample_id for s in list_shards([str(remote)])}
    assert len(local) == 4


def test_a_source_that_hangs_or_is_gone(remote, tmp_path):
    with server(remote, lambda n: "hang" if n == 2 else None) as (url, _):
        start = time.monotonic()
        data = dataset(f"{url}/{{0..3}}.tar", cache=str(tmp_path / "cache"), stall_seconds=1.0)
        assert whole_epoch(data, 40)[1] == [] and time.monotonic() - start < 15
    for code, tries in ((404, 1), (503, 2)):  # what is not there is not asked for again
        with server(remote, lambda n, code=code: code if n > 1 else None) as (url, _):
            data = dataset(f"{url}/{{0..3}}.tar", cache=str(tmp_path / "other"), tries=2)
            with pytest.raises(DataError, match=rf"8 samples in a row .*http://.*{code}.*\(try {tries} of 2\)"):
                data[0]


def test_remote_shards_need_an_index(remote, tmp_path):
    (remote / INDEX).unlink()
    with server(remote, lambda n: None) as (url, _):
        with pytest.raises(DataError, match=r"there is no index for http.*vlmo_ds.data.index.*--output FILE"):
            dataset(f"{url}/{{0..3}}.tar", cache=str(tmp_path / "cache"), tries=1)
        done = index(f"{url}/{{0..3}}.tar", "--output", tmp_path / "remote.json")
        assert "4 shards, 40 samples" in done.stdout
        data = dataset(f"{url}/{{0..3}}.tar", cache=str(tmp_path / "cache"), index=str(tmp_path / "remote.json"))
        assert len(whole_epoch(data, 40)[0]) == 40
        with pytest.raises(DataError, match=r"data.index: .*no.json does not exist"):
            dataset(f"{url}/{{0..3}}.tar", index=str(tmp_path / "no.json"))
    assert "--output is needed" in index(f"{url}/0.tar", code=2).stderr


def test_an_index_has_one_entry_for_a_name(tmp_path):
    for folder, count in (("a", 3), ("b", 4)):
        (tmp_path / folder).mkdir()
        write_pairs(tmp_path / folder / "0.tar", count)
        write_pairs(tmp_path / folder / f"{folder}.tar", 2)
    named = tmp_path / "named.json"
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert "a/0.tar and " in index(*both, "--output", named, code=2).stderr
    index(both[0], "--output", named)
    message = rf"data.index: {named} has one entry 0.tar for {both[0]}/0.tar and {both[1]}/0.tar: give each folder"
    with pytest.raises(DataError, match=message):
        list_shards(both, index=str(named))
    sources = {name: {"shards": [str(tmp_path / name)], "index": str(named)} for name in ("a", "b")}
    with pytest.raises(DataError, match=message):
        source_shards(DataConfig(sources=sources))
    again = [
        both[0],
        f"{both[0]}/../a/0.tar",
        f"{both[1]}/b.tar",
    ]  # one shard under two names, one that is not in the index
    assert [s.samples for s in list_shards(again, index=str(named))] == [3, 2, 3, 2]
    assert [s.samples for s in list_shards(both)] == [3, 2, 4, 2]


def test_a_pipe_command_is_read_and_its_failure_noticed(remote, tmp_path):
    settings = {"cache": str(tmp_path / "cache"), "index": str(remote / INDEX), "tries": 1}
    data = dataset(f"pipe:cat {remote}/{{0..3}}.tar", **settings)
    assert len(whole_epoch(data, 40)[0]) == 40
    broken = dataset(f"pipe:head -c 9000 {remote}/0.tar; false #/0.tar", **settings)
    with pytest.raises(DataError, match="status 1"):
        broken[0]
    stalled = dataset(f"pipe:sleep 30; cat {remote}/0.tar", **{**settings, "stall_seconds": 0.5})
    start = time.monotonic()
    with pytest.raises(DataError, match="8 samples in a row"):
        stalled[0]
    assert time.monotonic() - start < 20


def test_the_cache_stays_within_its_size(remote, tmp_path):
    size = (remote / "0.tar").stat().st_size
    with server(remote, lambda n: None) as (url, requests):
        storage = Storage(cache=tmp_path / "cache", cache_bytes=int(2.5 * size), tries=1)
        for i in (0, 1, 0, 2, 0, 3):
            storage.local(f"{url}/{i}.tar")
            time.sleep(0.02)
        assert len([p for p in requests if p == "/0.tar"]) == 1  # the one that is used stays
        names = sorted(p.name[-5:] for p in (tmp_path / "cache").iterdir() if not p.name.startswith("."))
        assert names == ["0.tar", "3.tar"]


def test_scanning_names_what_is_wrong(tmp_path):
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_text("I am no tar\n" * 100)
    for name in ("empty.tar", "text.tar"):
        found, problem = scan_shard(str(tmp_path / name), Storage())
        assert found.samples == 0 and problem
        with pytest.raises(DataError, match=f"{name}: .*expected members such as"):
            list_shards([str(tmp_path / name)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scan_shard(str(write_pairs(tmp_path / "a.tar", 3)), Storage())[1] == ""
