"""Folders of pictures as people have them."""

import json

import pytest
from data.files import jpeg, png, prepare_here, samples


def write(root, **files: bytes):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def test_pictures_with_texts_beside_them(tmp_path, capsys):
    root = tmp_path / "pictures"
    described = json.dumps(
        {"captions": ["a green one", "green"], "image_id": 42, "url": "http://x/1", "more": 1}
    ).encode()
    files = {
        "red.jpg": jpeg(colour=(200, 0, 0)),
        "red.txt": b"a red one\nthe red one\n",
        "deep/er/red.JPG": jpeg(colour=(100, 0, 0)),  # the same name in another folder
        "deep/er/red.txt": b"a dark one",
        "deep/green.png": png(colour=(0, 200, 0)),
        "deep/green.json": described,
        "v1.2/a.b.jpg": jpeg(colour=(0, 0, 200)),  # dots in names
        "v1.2/a.b.txt": "ein blaues, gr\u00fcnes\u2028".encode(),
        "kohya.png": png(colour=(9, 9, 9)),
        "kohya.caption": b"a black one",
        "alone.jpg": jpeg(colour=(1, 1, 1)),
        "broken.jpg": b"no picture",
        "broken.txt": b"nothing",
        "odd.jpg": jpeg(colour=(2, 2, 2)),
        "odd.json": b"{not json",
        "empty.jpg": jpeg(colour=(3, 3, 3)),
        "empty.txt": b" \n",
        "._red.jpg": b"what a Mac leaves",
        ".cache/red.jpg": jpeg(),
        "readme.md": b"no picture",
    }
    write(root, **files)
    (root / "deep/round").symlink_to(root)
    out = prepare_here(capsys, "folder", "--root", root, "--output", tmp_path / "out")
    found = {s.meta["file"]: s for s in samples(tmp_path / "out")}
    assert {name: s.captions for name, s in found.items()} == {
        "red.jpg": ["a red one", "the red one"],
        "deep/er/red.JPG": ["a dark one"],
        "deep/green.png": ["a green one", "green"],
        "v1.2/a.b.jpg": ["ein blaues, gr\u00fcnes"],
        "kohya.png": ["a black one"],
    }
    assert found["deep/green.png"].image_id == 42 and found["red.jpg"].image == files["red.jpg"]
    assert len({s.image_id for s in found.values()}) == 5
    for reason in (
        "no .txt or .json beside it",
        "image: not a readable",
        "its .json is not JSON",
        "has an empty caption",
    ):
        assert f"rejected 1: {reason}" in out, out


def test_pictures_alone(tmp_path, capsys):
    write(tmp_path / "p", **{f"{i}/{i}.jpg": jpeg(colour=(i * 90, 0, 0)) for i in range(3)})
    out = prepare_here(capsys, "folder", "--root", tmp_path / "p", "--output", tmp_path / "out")
    assert "3 samples, 0 captions" in out
    assert [(s.meta["file"], sorted(s.fields)) for s in samples(tmp_path / "out")] == [
        (f"{i}/{i}.jpg", ["jpg", "json"]) for i in range(3)
    ]


@pytest.mark.parametrize("files, message", [({"a.txt": b"x"}, "holds no pictures"), ({}, "does not exist")])
def test_folders_without_pictures(tmp_path, capsys, files, message):
    write(tmp_path / "p", **files)
    assert message in prepare_here(capsys, "folder", "--root", tmp_path / "p", "--output", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()
