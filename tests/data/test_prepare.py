"""The prepare commands, on small trees in the datasets' own layout and on the real samples where they are."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile

from conftest import ROOT
from data.test_data import jpeg
from PIL import Image

from vlmo_ds.data.shards import list_shards, read_sample


def prepare(*arguments, code=0):
    command = [sys.executable, "-m", "vlmo_ds.data.prepare", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def samples(folder):
    return [read_sample(s.path, row) for s in list_shards([str(folder)]) for row in range(s.samples)]


def coco_tree(root):
    images = []
    for i, (split, folder) in enumerate(
        [
            ("train", "train2014"),
            ("restval", "val2014"),
            ("test", "val2014"),
            ("train", "train2014"),
            ("train", "train2014"),
        ]
    ):
        name = f"COCO_{folder}_{i:012d}.jpg"
        (root / folder).mkdir(parents=True, exist_ok=True)
        if i != 4:
            (root / folder / name).write_bytes(b"broken" if i == 3 else jpeg(colour=(i * 50, 0, 0)))
        sentences = [
            {"raw": f"caption {j} of {i} \n", "tokens": ["caption"], "imgid": i, "sentid": j} for j in range(5)
        ]
        images.append(
            {
                "filepath": folder,
                "filename": name,
                "imgid": i,
                "split": split,
                "cocoid": 1000 + i,
                "sentences": sentences,
            }
        )
    (root / "karpathy").mkdir()
    (root / "karpathy" / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


def test_karpathy_coco(tmp_path):
    coco_tree(tmp_path / "coco")
    arguments = ["karpathy", "--dataset", "coco", "--root", tmp_path / "coco", "--output", tmp_path / "out"]
    done = prepare(*arguments, "--split", "train+restval")
    assert "2 samples, 10 captions" in done.stdout
    assert "rejected 1: image file missing" in done.stdout and "rejected 1: image: not a readable image" in done.stdout
    first, second = samples(tmp_path / "out")
    assert (
        first.captions == [f"caption {j} of 0" for j in range(5)] and first.image_id == 1000 and second.image_id == 1001
    )
    assert (
        first.image == (tmp_path / "coco/train2014/COCO_train2014_000000000000.jpg").read_bytes()
    )  # not encoded again
    assert "--split: 'trian' is not in" in prepare(*arguments, "--split", "trian", "--overwrite", code=2).stderr
    assert "holds a finished shard set" in prepare(*arguments, "--split", "test", code=2).stderr


def test_karpathy_flickr30k(tmp_path):
    root = tmp_path / "flickr"
    (root / "flickr30k-images").mkdir(parents=True)
    (root / "flickr30k-images" / "7.jpg").write_bytes(jpeg())
    image = {
        "filename": "7.jpg",
        "imgid": 0,
        "split": "test",
        "sentences": [{"raw": "Two men.", "tokens": [], "sentid": 0}],
    }
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": [image], "dataset": "flickr30k"}))
    prepare("karpathy", "--dataset", "flickr30k", "--root", root, "--split", "test", "--output", tmp_path / "out")
    assert samples(tmp_path / "out")[0].captions == ["Two men."]


def test_nlvr1_keeps_true_sentences(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 10)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "dev_images.tar", "w") as tar:
        for identifier in ("10-0", "11-0"):
            for permutation in range(6):
                info = tarfile.TarInfo(f"images/3/dev-{identifier}-{permutation}.png")
                info.size = len(buffer.getvalue())
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
    examples = [
        {"identifier": i, "label": v, "sentence": f"There is {i}", "directory": "3"}
        for i, v in (("10-0", "true"), ("11-0", "false"))
    ]
    (tmp_path / "dev.json").write_text("\n".join(map(json.dumps, examples)))
    prepare("nlvr1", "--root", tmp_path, "--output", tmp_path / "out")
    assert [s.captions for s in samples(tmp_path / "out")] == [["There is 10-0"]]


def test_text_packs_sentences(tmp_path):
    (tmp_path / "a.txt").write_text(
        " = Heading = \n\nOne two three . Four five six .\nSeven eight nine ten eleven twelve .\nno\n"
    )
    done = prepare("text", "--input", tmp_path / "a.txt", "--words", "8", "--output", tmp_path / "out")
    assert [s.captions[0] for s in samples(tmp_path / "out")] == [
        "One two three . Four five six .",
        "Seven eight nine ten eleven twelve .",
    ]
    assert "rejected 1: fewer than three words" in done.stdout
    assert (
        "does not exist" in prepare("text", "--input", tmp_path / "b.txt", "--output", tmp_path / "o2", code=2).stderr
    )


def test_the_same_command_gives_the_same_bytes(tmp_path):
    digests = []
    for name in ("one", "two"):
        prepare(
            "synthetic",
            "--output",
            tmp_path / name,
            "--train",
            12,
            "--test",
            4,
            "--text",
            9,
            "--image_size",
            32,
            "--samples_per_shard",
            5,
        )
        files = sorted((tmp_path / name).rglob("*.tar"))
        assert [f.name for f in files if "train" in f.name] == [f"train-{i:06d}.tar" for i in range(3)]
        digests.append([hashlib.sha256(f.read_bytes()).hexdigest() for f in files])
    assert digests[0] == digests[1]


def test_real_samples(tmp_path, shared_data):
    out = prepare(
        "karpathy",
        "--dataset",
        "coco",
        "--root",
        shared_data / "coco_photos",
        "--split",
        "train+restval",
        "--output",
        tmp_path / "coco",
    )
    assert "255 samples" in out.stdout and "rejected" not in out.stdout
    out = prepare("nlvr1", "--root", shared_data / "nlvr1", "--split", "dev", "--output", tmp_path / "nlvr1")
    assert len(samples(tmp_path / "nlvr1")) > 400
    prepare("text", "--input", shared_data / "wikitext-2/valid.txt", "--output", tmp_path / "text")
    assert all(len(s.captions[0].split()) <= 32 for s in samples(tmp_path / "text")[:200])
