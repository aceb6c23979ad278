"""Small images, tars and shard sets for the data tests."""

import io
import tarfile
from functools import partial
from pathlib import Path

from conftest import call
from PIL import Image

from vlmo_ds.data.prepare.__main__ import main
from vlmo_ds.data.shards import RawSample, list_shards, read_index

prepare = partial(call, "vlmo_ds.data.prepare")


def prepare_here(capsys, *arguments, code: int = 0) -> str:
    """The command in this process, of one process; what it prints, or with code=2 its one line about an error."""
    capsys.readouterr()
    found = main([*map(str, arguments), "--processes", "1"])
    said = capsys.readouterr()
    assert found == code, said.out + said.err
    if code:
        assert said.err.splitlines()[-1].startswith("error: ") and "Traceback" not in said.err
    read_index.cache_clear()
    return said.err if code else said.out


def jpeg(size=(20, 10), colour=(200, 30, 30)) -> bytes:
    return encoded("JPEG", size, colour)


def png(size=(20, 10), colour=(200, 30, 30)) -> bytes:
    return encoded("PNG", size, colour)


def encoded(kind: str, size, colour) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_pairs(path: Path, count: int, name: str = "", **changed: bytes) -> Path:
    """A shard of pictures that differ, each with a caption. changed: other bytes for members, as s003_jpg=b""."""
    members = {}
    for i in range(count):
        members[f"{name}{i:03d}.jpg"] = jpeg((24, 24), (i * 37 % 256, i * 11 % 256, len(name) * 40 % 256))
        members[f"{name}{i:03d}.txt"] = f"picture {i} of {name}".encode()
    for member, data in changed.items():
        members[name + member[1:].replace("_", ".")] = data
    return write_tar(path, members)


def samples(folder: Path) -> list[RawSample]:
    return [s.read(row) for s in list_shards([str(folder)]) for row in range(s.samples)]
