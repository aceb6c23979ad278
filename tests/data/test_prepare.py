"""The prepare commands, on small trees in the datasets' own layout and on the real samples where they are."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import ROOT
from data.files import jpeg, png, prepare, prepare_here, samples, write_tar
from PIL import Image

from vlmo_ds.data.prepare.answers import normalize_answer, soft_score
from vlmo_ds.data.prepare.sources import text
from vlmo_ds.data.prepare.writer import begin
from vlmo_ds.evaluation.capfilt import is_true
from vlmo_ds.evaluation.meaning import scene_of


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
    assert "2 samples, 10 captions" in done.stdout and "2 rejected" in done.stdout
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


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_visual_genome(tmp_path):
    for folder, image in (("VG_100K", 1), ("VG_100K_2", 107)):
        (tmp_path / "vg/images" / folder).mkdir(parents=True)
        (tmp_path / "vg/images" / folder / f"{image}.jpg").write_bytes(jpeg(colour=(image, 9, 9)))
    regions = [
        {
            "id": image,
            "regions": [
                {"region_id": i, "image_id": image, "phrase": p, "x": 1, "y": 2, "width": 3, "height": 4}
                for i, p in enumerate(("a clock", "the street", "a clock"))
            ],
        }
        for image in (1, 107, 5)
    ]
    (tmp_path / "vg/annotations").mkdir()
    (tmp_path / "vg/annotations/region_descriptions.json").write_text(json.dumps(regions))
    done = prepare("vg", "--root", tmp_path / "vg", "--output", tmp_path / "out")
    assert [s.captions for s in samples(tmp_path / "out")] == [["a clock", "the street"]] * 2
    assert "rejected 1: image file missing" in done.stdout


def test_vilt_layout_is_looked_up_by_the_whole_path(tmp_path, capsys):
    """Two pictures of one name, two captions of one picture, paths of another machine, what is ambiguous or missing."""
    colours = {"5/7.jpg": 30, "0/1.jpg": 10, "1/1.jpg": 60, "2/2.jpg": 110, "3/3.jpg": 160, "4/4.jpg": 210}
    for name, colour in colours.items():
        (tmp_path / "images_train" / name).parent.mkdir(parents=True)
        (tmp_path / "images_train" / name).write_bytes(jpeg(colour=(colour, 0, 0)))
    annotations = [
        ["images_train/0/1.jpg", "first"],
        ["./1/1.jpg", "second"],
        ["images_train/1/1.jpg", "second, again"],
        ["/elsewhere/2/2.jpg", "third"],
        ["/elsewhere/2/2.jpg", "third"],
        ["3.jpg", "fourth"],
        ["1.jpg", "which?"],
        ["6/7.jpg", "of another folder, which is missing"],
        ["/a/4/4.jpg", "this one?"],
        ["/b/4/4.jpg", "or this?"],
        ["images_train/0/1.jpg", None],
    ]
    (tmp_path / "annot.json").write_text(json.dumps(annotations))
    out = prepare_here(capsys, "sbu", "--root", tmp_path, "--output", tmp_path / "out")
    found = {s.meta["file"].removeprefix("images_train/"): s for s in samples(tmp_path / "out")}
    captions = {name: sample.captions for name, sample in found.items()}
    expected = {
        "0/1.jpg": ["first"],
        "1/1.jpg": ["second", "second, again"],
        "2/2.jpg": ["third"],
        "3/3.jpg": ["fourth"],
    }
    assert {name: sorted(texts) for name, texts in captions.items()} == expected
    assert len({s.image_id for s in found.values()}) == 4 and "rejected 4: image file missing" in out
    (tmp_path / "annot.json").write_text('[["a.jpg"]]')
    refused = prepare_here(capsys, "sbu", "--root", tmp_path, "--output", tmp_path / "o", code=2)
    assert "annot.json is not a list of [path, caption] pairs" in refused


def test_coco_captions(tmp_path, capsys):
    """The layout of COCO's download; an image without captions, one that is missing, captions of no image."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    for name in ("1", "3"):
        (tmp_path / f"val2017/{name}.jpg").write_bytes(jpeg(colour=(int(name), 0, 0)))
    content = {
        "info": {},
        "images": [{"id": 100 + i, "file_name": f"{i}.jpg", "width": 20} for i in (1, 2, 3)],
        "annotations": [{"id": i, "image_id": m, "caption": f"of {m}\n"} for i, m in enumerate((101, 102, 101, 900))],
    }
    file = tmp_path / "annotations/captions_val2017.json"
    file.write_text(json.dumps(content))
    out = prepare_here(capsys, "coco-captions", "--annotations", file, "--output", tmp_path / "out")
    (sample,) = samples(tmp_path / "out")
    assert sample.captions == ["of 101", "of 101"] and sample.image_id == 101
    assert all(
        f"rejected 1: {what}" in out for what in ("image file missing", "no caption", "captions of an image that")
    )
    more = ["coco-captions", "--annotations", file, "--images", tmp_path / "no", "--output", tmp_path / "o"]
    assert f"{tmp_path / 'no'} does not exist" in prepare_here(capsys, *more, code=2)
    for bad in ({"images": [{}], "annotations": []}, {"images": []}, [], {"annotations": [3], "images": []}):
        file.write_text(json.dumps(bad))
        refused = prepare_here(capsys, "coco-captions", "--annotations", file, "--output", tmp_path / "o", code=2)
        assert "captions_val2017.json is not COCO's captions" in refused


def test_two_calls_at_once(tmp_path, capsys):
    """The second ends at once; when the first has died, its place is taken."""
    (tmp_path / "out.partial/.progress").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("Three words here.\n")
    arguments = ["text", "--input", tmp_path / "a.txt", "--output", tmp_path / "out"]
    assert "was begun with other input" in prepare_here(capsys, *arguments, code=2)
    plan = text([tmp_path / "a.txt"], 32, None, 40, 1000)
    (tmp_path / "out.partial/.progress").rmdir()
    (tmp_path / "out.partial").rmdir()
    begin(tmp_path / "out.partial", plan, 1).close()
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
    command = [sys.executable, "-c", holder, str(tmp_path / "out.partial/.progress/lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert "is being written by another call" in prepare_here(capsys, *arguments, code=2)
        other.kill()
    assert "1 samples" in prepare_here(capsys, *arguments)


def test_a_folder_called_old_is_not_touched(tmp_path, capsys):
    """It is where a replaced set was once put for a moment."""
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old/thesis.txt").write_text("do not lose")
    (tmp_path / "a.txt").write_text("Three words here.\n")
    for more in ([], ["--overwrite"]):
        prepare_here(capsys, "text", "--input", tmp_path / "a.txt", "--output", tmp_path / "out", *more)
    assert (tmp_path / "out.old/thesis.txt").exists() and sorted(os.listdir(tmp_path)) == ["a.txt", "out", "out.old"]


@pytest.mark.parametrize("name, split", [("sbu", "train"), ("conceptual", "val")])
def test_vilt_layout(tmp_path, name, split):
    for number in ("0000001", "0000002", "0001000"):
        folder = tmp_path / f"root/images_{split}" / number[:4]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / number).write_bytes(jpeg(colour=(int(number) % 250, 0, 0)))
    annotations = [[f"images_{split}/{n[:4]}/{n}", f"caption of {n}"] for n in ("0000001", "0001000", "0009999")]
    file = "annot.json" if name == "sbu" else f"{split}_annot.json"
    (tmp_path / "root" / file).write_text(json.dumps(annotations))
    more = [] if name == "sbu" else ["--split", split]
    prepare(name, "--root", tmp_path / "root", "--output", tmp_path / "out", *more)
    assert [s.captions for s in samples(tmp_path / "out")] == [["caption of 0000001"], ["caption of 0001000"]]


def test_img2dataset(tmp_path):
    """As img2dataset 1.45 writes them: jpg, txt and json with the download's status."""
    meta = {
        "caption": "a cat",
        "url": "http://x/1",
        "key": "000000001",
        "status": "success",
        "sha256": "ab",
        "width": 20,
    }
    members = {}
    for i in range(6):
        members[f"00000000{i}.jpg"] = b"gone" if i == 2 else jpeg((60, 40), (i * 40, 0, 0))
        members[f"00000000{i}.txt"] = b"" if i == 4 else f"caption {i}".encode()
        members[f"00000000{i}.json"] = json.dumps(meta).encode()
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "00000.tar", members)
    (tmp_path / "in" / "00000_stats.json").write_text("{}")
    (tmp_path / "in" / "00000.parquet").write_bytes(b"PAR1")
    assert len(samples(tmp_path / "in")) == 6  # used as they are
    done = prepare("img2dataset", "--input", tmp_path / "in", "--output", tmp_path / "out", "--resize", 20)
    assert "4 samples" in done.stdout and "rejected 1: image: not a readable image" in done.stdout
    kept = samples(tmp_path / "out")
    assert [s.captions for s in kept] == [[f"caption {i}"] for i in (0, 1, 3, 5)]
    assert Image.open(io.BytesIO(kept[0].image)).size == (30, 20) and kept[0].meta["url"] == "http://x/1"


def vqa_tree(root):
    """Two images in each split; 'yes' and 'net' are frequent."""
    root.mkdir()
    number = 0
    for split, year in (("train", "train2014"), ("val", "val2014"), ("test", "test2015"), ("test-dev", "test2015")):
        (root / year).mkdir(exist_ok=True)
        questions, annotations = [], []
        for image in (9, 25):
            (root / year / f"COCO_{year}_{image:012d}.jpg").write_bytes(jpeg(colour=(image, 0, 0)))
            for i in range(5):
                number += 1
                questions.append({"image_id": image, "question": f"Is it {i}?", "question_id": number})
                main = ("yes", "Yes", "net", "a net", "unheard of")[i]
                given = ["yes"] * (i + 1) + ["net"] * 3 + ["other"] * (6 - i)
                annotations.append(
                    {
                        "question_id": number,
                        "image_id": image,
                        "multiple_choice_answer": main,
                        "question_type": "is it",
                        "answer_type": "other",
                        "answers": [
                            {"answer": a if i < 4 else "unheard of", "answer_confidence": "yes", "answer_id": n + 1}
                            for n, a in enumerate(given)
                        ],
                    }
                )
        name = {"test": "test2015", "test-dev": "test-dev2015"}.get(split, year)
        (root / f"v2_OpenEnded_mscoco_{name}_questions.json").write_text(json.dumps({"questions": questions}))
        if "test" not in split:
            (root / f"v2_mscoco_{year}_annotations.json").write_text(json.dumps({"annotations": annotations}))


def test_vqav2(tmp_path):
    vqa_tree(tmp_path / "vqa")
    out = {split: tmp_path / split for split in ("train", "val", "test", "test-dev")}
    for split, folder in out.items():
        done = prepare("vqav2", "--root", tmp_path / "vqa", "--split", split, "--output", folder, "--least", 5)
        dropped = "rejected 2: question without an answer in the vocabulary"
        assert (dropped in done.stdout) == ("test" not in split)
    assert json.loads((out["train"] / "answers.json").read_text()) == ["yes", "net"]
    first = samples(out["val"])[0]
    assert first.meta["image_id"] == 9 and len(first.meta["questions"]) == 4
    assert first.meta["questions"][1] == {
        "question": "Is it 1?",
        "question_id": 12,
        "answers": ["yes"] * 2 + ["net"] * 3 + ["other"] * 5,
        "labels": [0, 1],
        "scores": [0.6, 0.9],
    }
    assert samples(out["test-dev"])[1].meta["questions"][0] == {"question": "Is it 0?", "question_id": 36}
    assert not (out["test"] / "answers.json").exists()


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("The Dog", "dog"),
        ("two", "2"),
        ("dont know", "don't know"),
        ("3,000", "3000"),
        ("yes/no", "yes no"),
        ("hello!  ", "hello"),
        ("u.s.", "us"),
        ("none", "0"),
        ("couldnt've", "couldn't've"),
    ],
)
def test_answers_are_normalised_as_in_the_official_evaluation(answer, normal):
    assert normalize_answer(answer) == normal


def test_easy_vqa_counts_images_that_are_missing(tmp_path):
    write_tar(tmp_path / "test_images.tar", {"test/images/0.png": png()})
    (tmp_path / "test_questions.json").write_text(json.dumps([["what colour?", "red", 0], ["what shape?", "box", 7]]))
    (tmp_path / "answers.txt").write_text("red\nbox\n")
    done = prepare("easy_vqa", "--root", tmp_path, "--split", "test", "--output", tmp_path / "out")
    assert "1 samples, 1 captions" in done.stdout and "rejected 1: image file missing" in done.stdout


def test_some_questions_alone(tmp_path):
    write_tar(tmp_path / "test_images.tar", {f"test/images/{i}.png": png() for i in range(2)})
    triples = [["What colour?", "red", 0], ["what shape?", "box", 0], ["what colour?", "red", 1]]
    (tmp_path / "test_questions.json").write_text(json.dumps(triples))
    (tmp_path / "answers.txt").write_text("red\nbox\n")
    command = ["easy_vqa", "--root", tmp_path, "--split", "test", "--output"]
    prepare(*command, tmp_path / "shapes", "--questions", "SHAPE")
    (found,) = samples(tmp_path / "shapes")
    assert [(q["question"], q["labels"]) for q in found.meta["questions"]] == [("what shape?", [1])]  # as among all
    refused = prepare(*command, tmp_path / "none", "--questions", "^how many", code=2)
    assert "--questions: '^how many' is in none of the questions" in refused.stderr
    refused = prepare(*command, tmp_path / "none", "--questions", "(", code=2)
    assert "'(' is not a regular expression" in refused.stderr


def test_soft_scores():
    assert [soft_score(n) for n in (0, 1, 2, 3, 4, 10)] == [0.0, 0.3, 0.6, 0.9, 1.0, 1.0]


def test_nlvr2(tmp_path):
    root = tmp_path / "nlvr"
    for folder in ("images/train/17", "dev", "nlvr2/data/balanced"):
        (root / folder).mkdir(parents=True)
    for name in ("images/train/17/train-10-0", "dev/dev-3-1"):
        for i in (0, 1):
            (root / f"{name}-img{i}.png").write_bytes(png(colour=(i * 200, 0, 0)))

    def row(identifier, **more):
        return {"identifier": identifier, "sentence": f"About {identifier}", "label": "True", "query": "x", **more}

    train = [row("train-10-0-0", directory=17), row("train-10-0-1", directory=17), row("train-11-0-0", directory=17)]
    (root / "nlvr2/data/train.json").write_text("\n".join(map(json.dumps, train)))
    (root / "nlvr2/data/balanced/balanced_dev.json").write_text(json.dumps(row("dev-3-1-0")) + "\n")
    done = prepare("nlvr2", "--root", root, "--split", "train", "--output", tmp_path / "train")
    assert "rejected 1: image file missing" in done.stdout
    (sample,) = samples(tmp_path / "train")
    assert set(sample.fields) == {"0.png", "1.png", "json"} and sample.fields["0.png"] != sample.fields["1.png"]
    assert [s["label"] for s in sample.meta["sentences"]] == ["True", "True"]
    prepare("nlvr2", "--root", root, "--split", "balanced_dev", "--output", tmp_path / "dev")
    assert samples(tmp_path / "dev")[0].meta["sentences"][0]["sentence"] == "About dev-3-1-0"
    assert "accepted: train, dev" in prepare("nlvr2", "--root", root, "--split", "tset", "--output", "x", code=2).stderr


def test_image_folder(tmp_path):
    for label, name in enumerate(("n01440764", "n01443537")):
        (tmp_path / "imagenet" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "imagenet" / name / f"{name}_{i}.JPEG").write_bytes(jpeg(colour=(label * 90, i * 90, 0)))
    prepare("image_folder", "--root", tmp_path / "imagenet", "--output", tmp_path / "out")
    found = samples(tmp_path / "out")
    assert Counter(s.meta["label"] for s in found) == {0: 3, 1: 3}
    assert [s.meta["label"] for s in found] != [0, 0, 0, 1, 1, 1] and found[0].image_id == found[0].sample_id


@pytest.mark.long
def test_arrow(tmp_path):
    """The columns of the scripts of ViLT, written as they write them."""
    import pyarrow as pa

    def write(name, **columns):
        table = pa.table(columns)
        with pa.OSFile(str(tmp_path / name), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
            writer.write_table(table)

    pictures = [jpeg(colour=(i * 100, 0, 0)) for i in range(2)]
    write(
        "coco.arrow",
        image=pictures,
        caption=[["one", "two"], ["three"]],
        image_id=["a.jpg", "b.jpg"],
        split=["train"] * 2,
    )
    write(
        "vqav2_train.arrow",
        image=pictures,
        questions=[["q0", "q1"], ["q2"]],
        answers=[[["yes"], ["no"]], [["2"]]],
        answer_labels=[[[0], [1, 2]], [[3]]],
        answer_scores=[[[1.0], [0.3, 0.6]], [[0.9]]],
        image_id=[5, 6],
        question_id=[[50, 51], [60]],
        split=["train"] * 2,
    )
    write(
        "nlvr2_dev.arrow",
        image_0=pictures,
        image_1=pictures[::-1],
        questions=[["s"], ["t"]],
        answers=[["True"], ["False"]],
        identifier=["dev-0-0", "dev-0-1"],
    )
    write("wikibk_train_0.arrow", caption=["A paragraph of text.", "x"])
    write("odd.arrow", pictures=[1])
    prepare("arrow", "--input", tmp_path / "coco.arrow", "--output", tmp_path / "coco")
    assert [s.captions for s in samples(tmp_path / "coco")] == [["one", "two"], ["three"]]
    assert samples(tmp_path / "coco")[0].image == pictures[0]
    prepare("arrow", "--input", tmp_path / "vqav2_train.arrow", "--output", tmp_path / "vqa")
    assert samples(tmp_path / "vqa")[0].meta["questions"][1] == {
        "question": "q1",
        "question_id": 51,
        "labels": [1, 2],
        "scores": [0.3, 0.6],
    }
    prepare("arrow", "--input", tmp_path / "nlvr2_dev.arrow", "--output", tmp_path / "nlvr2")
    assert samples(tmp_path / "nlvr2")[1].meta["sentences"] == [
        {"sentence": "t", "label": "False", "identifier": "dev-0-1-0", "sentence_id": "dev-0:t"}
    ]
    done = prepare("arrow", "--input", tmp_path / "wikibk_train_0.arrow", "--output", tmp_path / "text")
    assert samples(tmp_path / "text")[0].captions == ["A paragraph of text."] and "1 rejected" in done.stdout
    failed = prepare("arrow", "--input", tmp_path / "odd.arrow", "--output", tmp_path / "odd", code=2)
    assert "odd.arrow has the columns pictures; accepted: caption, image" in failed.stderr
    failed = prepare("arrow", "--input", __file__, "--output", tmp_path / "odd", code=2)
    assert "is not a pyarrow file" in failed.stderr


def test_text_fills_samples_by_word_pieces(tmp_path, shared_data):
    (tmp_path / "a.txt").write_text("Unaffable people gathered. They talked about antidisestablishmentarianism.\n" * 3)
    vocabulary = shared_data / "bert-base-uncased"
    prepare(
        "text",
        "--input",
        tmp_path / "a.txt",
        "--tokenizer",
        vocabulary,
        "--max_text_len",
        16,
        "--output",
        tmp_path / "out",
    )
    from vlmo_ds.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(vocabulary))
    lengths = [len(tokenizer(s.captions[0])["input_ids"]) for s in samples(tmp_path / "out")]
    assert max(lengths) <= 16 and min(lengths) >= 5 and len(lengths) == 6


SMALL = ["--train", 300, "--test", 6, "--text", 40, "--image_size", 64, "--samples_per_shard", 10]


def test_processes_do_not_change_the_shards(tmp_path):
    for processes in (1, 3):
        sizes = ["--train", 40, *SMALL[2:]]
        prepare("synthetic", "--output", tmp_path / str(processes), *sizes, "--processes", processes)
    assert digests(tmp_path / "1/train") == digests(tmp_path / "3/train") and len(digests(tmp_path / "1/train")) == 5


def test_captions_of_the_web_that_changed_places(tmp_path):
    sizes = ["--test", 6, "--image_size", 64]
    prepare("synthetic_web", "--output", tmp_path / "out", "--human", 30, "--web", 200, "--exchanged", 0.25, *sizes)
    prepare("synthetic", "--output", tmp_path / "world", "--train", 230, "--text", 5, *sizes)
    human, web = samples(tmp_path / "out/human"), samples(tmp_path / "out/web")
    one = [(s.meta["things"], s.captions) for s in samples(tmp_path / "out/one")]
    assert one == [(s.meta["things"], s.captions) for s in web if len(s.meta["things"]) == 1]
    held_out = [[s.meta["things"] for s in samples(tmp_path / of / "test")] for of in ("out", "world")]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 6
    assert (len(human), len(web)) == (30, 200)
    scenes = [json.dumps(s.meta["things"]) for s in [*human, *web]]
    assert scenes == [
        json.dumps(s.meta["things"]) for s in samples(tmp_path / "world/train")
    ]  # nothing that is held out
    assert {s.meta["source"] for s in human} == {"human"} and {s.meta["source"] for s in web} == {"web"}
    assert all(len(s.captions) == 1 for s in [*human, *web])
    assert all(is_true(s.captions[0], scene_of(s.meta)) for s in human)
    wrong = [s for s in web if not is_true(s.captions[0], scene_of(s.meta))]
    assert 45 <= len(wrong) <= 50  # of 50, as what is said of another scene may be true of this one
    assert (
        "'1.5' is not a number from 0 to 1"
        in prepare("synthetic_web", "--output", tmp_path / "no", "--exchanged", 1.5, code=2).stderr
    )


def test_killed_and_started_again(tmp_path):
    """SIGKILL at several moments; the last call finishes, keeps what was there, and leaves the same bytes."""
    prepare("synthetic", "--output", tmp_path / "whole", *SMALL)
    command = [sys.executable, "-m", "vlmo_ds.data.prepare", "synthetic", "--output", str(tmp_path / "out")]
    command += [*map(str, SMALL), "--processes", "2"]
    partial = tmp_path / "out/train.partial"
    done_before = 0
    for more in (2, 5, 4):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(partial.glob("*.tar"))) < done_before + more and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done_before = len(list(partial.glob("*.tar")))
        assert done_before >= more and not (tmp_path / "out/train").exists()
    first = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.tar")}
    changed = prepare("synthetic", "--output", tmp_path / "out", *SMALL[:-1], 20, code=2)
    assert "was begun with other input or settings" in changed.stderr
    prepare("synthetic", "--output", tmp_path / "out", *SMALL)
    assert digests(tmp_path / "out/train") == digests(tmp_path / "whole/train")
    assert {n: (tmp_path / "out/train" / n).stat().st_mtime_ns for n in first} == first  # not made again
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["one", "test", "text", "train"]


def test_outputs_are_not_overwritten_by_mistake(tmp_path):
    sizes = ["--train", 5, "--test", 2, "--text", 4, "--image_size", 32]
    prepare("synthetic", "--output", tmp_path / "out", *sizes)
    before = digests(tmp_path / "out/train")
    assert "holds a finished shard set" in prepare("synthetic", "--output", tmp_path / "out", *sizes, code=2).stderr
    prepare("synthetic", "--output", tmp_path / "out", *sizes, "--seed", 1, "--overwrite")
    assert digests(tmp_path / "out/train") != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    refused = prepare("text", "--input", __file__, "--output", tmp_path / "mine", "--overwrite", code=2)
    assert "exists and is not a shard set" in refused.stderr and (tmp_path / "mine/thesis.txt").exists()


@pytest.mark.long
def test_real_samples(tmp_path, shared_data):
    arguments = ["--dataset", "coco", "--root", shared_data / "coco_photos", "--split", "train+restval"]
    out = prepare("karpathy", *arguments, "--output", tmp_path / "coco")
    assert "255 samples, 1276 captions" in out.stdout and "0 rejected" in out.stdout
    prepare("nlvr1", "--root", shared_data / "nlvr1", "--split", "dev", "--output", tmp_path / "nlvr1")
    assert len(samples(tmp_path / "nlvr1")) == 547
    prepare("text", "--input", shared_data / "wikitext-2/valid.txt", "--output", tmp_path / "text")
    assert all(len(s.captions[0].split()) <= 32 for s in samples(tmp_path / "text")[:200])
    out = prepare("easy_vqa", "--root", shared_data / "easy_vqa", "--split", "test", "--output", tmp_path / "easy")
    questions = [q for s in samples(tmp_path / "easy") for q in s.meta["questions"]]
    vocabulary = json.loads((tmp_path / "easy/answers.json").read_text())
    wanted = json.loads((shared_data / "easy_vqa/test_questions.json").read_text())
    assert len(vocabulary) == 13 and len(questions) == len(wanted) == 9673 and "0 rejected" in out.stdout
    first = next(q for q in questions if q["question_id"] == 0)
    assert [first["question"], vocabulary[first["labels"][0]]] == wanted[0][:2] and first["scores"] == [1.0]
