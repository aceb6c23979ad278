"""Small images, tars and shard sets for the data tests."""

import io
import json
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


def red_or_green(root: Path) -> Path:
    """A folder with shards of red or green pictures: asked about (vqa), and pairs of them (nlvr2)."""
    (root / "vqa").mkdir()
    (root / "nlvr2").mkdir()
    questions, pairs = {}, {}
    for i in range(48):
        red = i % 2
        picture = jpeg((40, 40), (230, 20, 20) if red else (20, 230, 20))
        other = jpeg((40, 40), (230, 20, 20) if i % 3 else (20, 230, 20))
        entry = {
            "question": "is it red ?",
            "question_id": i,
            "answers": [("no", "yes")[red]] * 10,
            "labels": [red],
            "scores": [1.0],
        }
        questions |= {f"{i:02d}.jpg": picture, f"{i:02d}.json": json.dumps({"questions": [entry]}).encode()}
        judged = {"sentence": "both are red", "label": str(bool(red and i % 3)), "identifier": f"dev-{i}-0-0"}
        pairs |= {f"{i:02d}.0.jpg": picture, f"{i:02d}.1.jpg": other}
        pairs[f"{i:02d}.json"] = json.dumps({"sentences": [judged]}).encode()
    write_tar(root / "vqa/0.tar", questions)
    write_tar(root / "nlvr2/0.tar", pairs)
    (root / "vqa/answers.json").write_text('["no", "yes"]')
    return root
