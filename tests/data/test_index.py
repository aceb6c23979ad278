"""What an index says, what it may say, and what scanning says of odd tars."""

import base64
import contextlib
import io
import json
import struct
import tarfile
import tracemalloc
import zlib
from functools import partial

import numpy as np
import pytest
from conftest import call
from data.files import jpeg, write_pairs, write_tar

from vlmo_ds.data.index import INDEX, ShardIndex, dump_index, pack, parse_index, scan_shard
from vlmo_ds.data.shards import Shard, list_shards
from vlmo_ds.data.storage import DataError, Storage

index = partial(call, "vlmo_ds.data.index")


def problem_of(path) -> tuple[int, str]:
    found, problem = scan_shard(str(path), Storage())
    return found.samples, problem


def record(**changes) -> bytes:
    good = ShardIndex(2, 8192, pack(np.array([0, 8, 8], dtype=np.uint32)), pack(np.array([5, 6], dtype=np.uint16)))
    return json.dumps({"shards": {"a.tar": {**good.record(), **changes}}}).encode()


BOMB = base64.b64encode(zlib.compress(b"\0" * 200_000_000, 9)).decode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"shards": 3}',
        b'{"shards": {"a.tar": []}}',
        b'{"shards": [[1, 2, 3]]}',
        b"[" * 50_000,
        record(samples=True),
        record(samples=2.0),
        record(samples=-1),
        record(samples=17),  # of 512 bytes each in 8192
        record(samples=10**15, bytes=-1),
        record(samples="2"),
        record(bytes=float("inf")),
        record(bytes=None),
        record(bytes=-2),
        record(offsets=3),
        record(offsets="AAAA"),
        record(offsets="ä"),
        record(offsets=pack(np.zeros(2, dtype=np.uint32))),
        record(offsets=pack(np.zeros(4, dtype=np.uint32))),
        record(offsets=pack(np.zeros(3, dtype=np.uint32))[:-8]),
        record(lengths=pack(np.zeros(3, dtype=np.uint16))),
        record(offsets=BOMB),
        record(lengths=BOMB),
    ],
)
def test_what_is_no_index_is_refused_with_little_memory(content):
    tracemalloc.start()
    with pytest.raises(DataError, match=r"^x/index.json.* is not an index"):
        parse_index(content, "x/index.json")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_bomb_is_refused_with_little_memory_where_many_samples_are_claimed():
    assert len(BOMB) < 300_000
    tracemalloc.start()
    for samples, size in ((49_999_999, -1), (49_999_999, 1 << 40), (5_000_000, 1 << 40)):
        with pytest.raises(DataError, match="is not an index"):
            parse_index(record(samples=samples, bytes=size, offsets=BOMB), "index.json")
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_an_index_is_read_as_it_was_written():
    found = parse_index(record(), "index.json")
    assert parse_index(dump_index(found), "index.json") == found
    assert found["a.tar"].spans().tolist() == [0, 4096, 8192] and found["a.tar"].text_lengths().tolist() == [5, 6]
    assert parse_index(b'{"shards": {"b.tar": {"samples": 3}}}', "index.json") == {"b.tar": ShardIndex(3)}


def test_pairs_that_are_not_side_by_side(tmp_path):
    pictures = {f"{i}.jpg": jpeg() for i in range(5)}
    write_tar(tmp_path / "a.tar", pictures | {f"{i}.txt": b"a dog" for i in range(5)})
    assert problem_of(tmp_path / "a.tar") == (10, "members of one sample do not lie side by side (0.txt and 4 more come "
                                              "after other samples): write the tar again in the order of names, as with "
                                              "`tar --sort=name`")  # fmt: skip
    assert "side by side" in index(tmp_path).stderr


def test_dots_in_names(tmp_path):
    """WebDataset's rule is the first dot; only samples of which nothing would be left are worth a word."""
    write_tar(
        tmp_path / "a.tar", {"cat.v2.jpg": jpeg(), "cat.v2.txt": b"a cat", "2021.01.jpg": jpeg(), "b.jpg": jpeg()}
    )
    samples, problem = problem_of(tmp_path / "a.tar")
    assert samples == 3 and problem.startswith("2 samples have dots in their names (cat.v2.txt): what follows")
    write_tar(tmp_path / "b.tar", {"a.0.png": b"", "a.1.png": b"", "a.json": b"", "b.seg.png": b"", "b.txt": b"b"})
    assert problem_of(tmp_path / "b.tar") == (2, "")


def test_a_compressed_tar_under_the_name_of_one_that_is_not(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.txt"))
    assert "compressed with gzip" in index(tmp_path, code=2).stderr and not (tmp_path / INDEX).exists()
    with pytest.raises(DataError, match="compressed with gzip"):
        list_shards([str(tmp_path)])


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157] = size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


NEGATIVE = b"\xff" * 10 + struct.pack(">h", -1024)  # base 256


@pytest.mark.parametrize(
    "content",
    [
        header("b.txt", NEGATIVE),
        header("x", b"%011o\0" % 20, b"x") + b"16 size=-102400\n".ljust(512, b"\0") + header("b.txt", b"%011o\0" % 5),
        header("b.txt", b"%011o\0" % (8**11 - 1)),
        header("b.txt", b"77777777777\0", b"L"),
        header("x", b"%011o\0" % 0, b"L") * 2000,
        b"\xff" * 1024,
    ],
)
def test_headers_made_to_harm_end_the_shard_there(tmp_path, content):
    good = io.BytesIO()
    with tarfile.open(fileobj=good, mode="w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"a dog"))
    (tmp_path / "a.tar").write_bytes(good.getvalue()[:1024] + content)
    samples, problem = problem_of(tmp_path / "a.tar")
    assert samples <= 2 and problem


def test_a_sparse_member_does_not_unpack(tmp_path):
    """A terabyte of nothing in a kilobyte."""
    path = write_pairs(tmp_path / "a.tar", 2)
    data = bytearray(path.read_bytes())
    data[:512] = header("000.jpg", b"%011o\0" % 0, b"S")
    data[386:398] = data[386 + 12 : 398 + 12] = b"%011o\0" % 0
    data[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")  # its real size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    assert "is sparse" in problem_of(path)[1]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, cut, doubled or moved, a few times."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        place, other = (int(rng.integers(max(1, len(data)))) for _ in range(2))
        size = int(rng.integers(1, 600))
        kind = rng.integers(5)
        if kind == 0:
            data[place : place + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            del data[place : place + size]
        elif kind == 2:
            data[place:place] = data[other : other + size]
        elif kind == 3:
            data[place : place + 4] = [b"\xff\xff\xff\xff", b"null", b"-1e9", b"\0\0\0\0", b"[[[["][rng.integers(5)]
        else:
            data[place : place + size] = rng.bytes(size)
    return bytes(data)


def test_whatever_an_index_or_a_tar_holds_is_read_or_refused(tmp_path):
    rng = np.random.default_rng(7)
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": b"x" * 700, "a.txt": b"a", "x" * 200 + ".jpg": b"y", "b.json": b"{}"})
    whole = tar.read_bytes()
    good = dump_index({"a.tar": scan_shard(str(tar), Storage())[0], "b.tar": ShardIndex(3)})
    for _ in range(2000):
        with contextlib.suppress(DataError):
            parse_index(mutated(good, rng), "index.json")
        tar.write_bytes(mutated(whole, rng))
        index, _ = scan_shard(str(tar), Storage())
        shard = Shard(str(tar), index, Storage())
        for row in range(index.samples):
            with contextlib.suppress(DataError):
                shard.read(row)
