"""Shards of NLVR v1: sentences, questions, pairs, and what is made of its annotations."""

import io
import itertools
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
from data.files import png, prepare, samples
from PIL import Image

from vlmo_ds.data.prepare import nlvr1
from vlmo_ds.data.prepare.nlvr1 import pick


def write_nlvr1(root: Path) -> None:
    """Two examples, the first true, the second false; the six pictures of each have widths of their own."""
    with tarfile.open(root / "dev_images.tar", "w") as tar:
        for first, identifier in ((30, "10-0"), (40, "10-1")):
            for permutation in range(6):
                picture = png((first + permutation, 10))
                info = tarfile.TarInfo(f"images/3/dev-{identifier}-{permutation}.png")
                info.size = len(picture)
                tar.addfile(info, io.BytesIO(picture))
    examples = [
        {"identifier": i, "label": v, "sentence": "There is a box", "directory": "3"}
        for i, v in (("10-0", "true"), ("10-1", "false"))
    ]
    (root / "dev.json").write_text("\n".join(map(json.dumps, examples)))


def width(data: bytes) -> int:
    return Image.open(io.BytesIO(data)).width


def test_nlvr1_keeps_true_sentences(tmp_path):
    write_nlvr1(tmp_path)
    prepare("nlvr1", "--root", tmp_path, "--output", tmp_path / "out")
    (sample,) = samples(tmp_path / "out")
    assert sample.captions == ["There is a box"] and width(sample.image) == 30


def test_nlvr1_as_questions(tmp_path):
    write_nlvr1(tmp_path)
    prepare("nlvr1", "--root", tmp_path, "--kind", "questions", "--output", tmp_path / "out")
    found = {s.meta["questions"][0]["question_id"]: s for s in samples(tmp_path / "out")}
    assert sorted(found) == [f"dev-10-{i}-{k}" for i in (0, 1) for k in range(6)]
    assert json.loads((tmp_path / "out" / "answers.json").read_text()) == [
        "false",
        "true",
        *"0123456789",
        "left",
        "middle",
        "right",
        "none",
    ]
    (question,) = found["dev-10-1-4"].meta["questions"]
    assert question["question"] == "There is a box" and question["answers"] == ["false"] * 10
    assert (question["labels"], question["scores"]) == ([0], [1.0]) and width(found["dev-10-1-4"].image) == 44


def test_nlvr1_as_pairs(tmp_path):
    write_nlvr1(tmp_path)
    prepare("nlvr1", "--root", tmp_path, "--kind", "pairs", "--output", tmp_path / "out")
    found = {s.meta["sentences"][0]["identifier"]: s for s in samples(tmp_path / "out")}
    assert len(found) == 12
    (sentence,) = found["dev-10-0-5"].meta["sentences"]
    assert sentence["label"] == "True" and sentence["sentence_id"] == "dev-10"
    assert [width(found["dev-10-0-5"].picture(f"{n}.")) for n in (0, 1)] == [35, 30]


def test_nlvr1_in_all_exchanges_of_colours(tmp_path):
    grey, yellow, black, blue = (211, 211, 211), (255, 255, 0), (0, 0, 0), (0, 153, 255)
    between, edge = (128, 128, 128), tuple(np.mean([grey, yellow], 0).round().astype(int))
    pixels = np.array([[grey, yellow, black, blue, between, edge]], np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert("RGBA").save(out, "PNG")
    with tarfile.open(tmp_path / "dev_images.tar", "w") as tar:
        for number in range(2):
            info = tarfile.TarInfo(f"images/3/dev-1-0-{number}.png")
            info.size = len(out.getvalue())
            tar.addfile(info, io.BytesIO(out.getvalue()))
    example = {"identifier": "1-0", "label": "true", "sentence": "Yellow over a black one", "directory": "3"}
    (tmp_path / "dev.json").write_text(json.dumps(example))

    prepare("nlvr1", "--root", tmp_path, "--augment", "--output", tmp_path / "captions")
    assert len(samples(tmp_path / "captions")) == 12  # two pictures, six exchanges
    prepare("nlvr1", "--root", tmp_path, "--kind", "questions", "--augment", "--output", tmp_path / "out")
    found = {s.meta["questions"][0]["question_id"]: s for s in samples(tmp_path / "out")}
    assert len(found) == 12 and found["dev-1-0-1"].meta["questions"][0]["question"] == "Yellow over a black one"
    changed = found["dev-1-0-1-blue-yellow-black"]
    assert changed.meta["questions"][0]["question"] == "blue over a yellow one"
    edge = np.mean([grey, blue], 0)
    shown = np.asarray(Image.open(io.BytesIO(changed.image)).convert("RGB")).astype(int)
    assert np.abs(shown - [[grey, blue, yellow, black, between, edge]]).max() <= 1


def item(colour: str, height: int) -> dict:
    return {"type": "square", "color": colour, "x_loc": 40, "y_loc": 80 - 21 * height, "size": 20}


def read_question(text: str, towers: list[list[str]]) -> list[str] | None:
    """A reading of its own of a few forms of questions about towers; None for others."""
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4} | {str(n): n for n in range(1, 5)}
    ends = {"base": 0, "top": -1}
    if found := re.fullmatch(r"which is a tower with a (\w+) block at the (\w+)", text):
        shown = [
            side for side, t in zip(("left", "middle", "right"), towers, strict=True) if t[ends[found[2]]] == found[1]
        ]
        return shown or ["none"]
    if found := re.fullmatch(r"how many (\w+) blocks are there", text):
        return [str(sum(t.count(found[1]) for t in towers))]
    if found := re.fullmatch(
        r"there (?:is|are) (exactly|only|at least) (\w+) (\w+) blocks? as the (\w+) of a tower", text
    ):
        count, said = sum(t[ends[found[4]]] == found[3] for t in towers), numbers[found[2]]
        return ["true" if (count >= said if found[1] == "at least" else count == said) else "false"]
    return None


def test_nlvr1_annotations(tmp_path):
    """Captions and questions made of annotations are right by another reading; no statement is more often true than false,
    and where an example has one of the same items in other places, its statements are false of that one."""
    scenes = {
        "1-0": [["blue", "black"], ["yellow"], ["yellow", "yellow", "blue"]],
        "1-1": [["black", "blue", "blue"], ["black"], ["yellow", "black"]],
        "1-3": [["yellow", "black"], ["blue"], ["blue", "yellow", "yellow"]],  # the blocks of 1-0
        "2-0": [["yellow", "black", "black"], ["blue", "blue"], ["black"]],
    }
    names = {"blue": "#0099ff", "black": "Black", "yellow": "Yellow"}
    examples = []
    with tarfile.open(tmp_path / "dev_images.tar", "w") as tar:
        for identifier, towers in scenes.items():
            for number in range(6):
                picture = png((40, 10))
                info = tarfile.TarInfo(f"images/3/dev-{identifier}-{number}.png")
                info.size = len(picture)
                tar.addfile(info, io.BytesIO(picture))
            boxes = [[item(names[colour], height) for height, colour in enumerate(tower)] for tower in towers]
            examples.append({"identifier": identifier, "label": "true", "sentence": "A", "structured_rep": boxes})
    (tmp_path / "dev.json").write_text("\n".join(map(json.dumps, examples)))
    prepare("nlvr1", "--root", tmp_path, "--kind", "annotations", "--output", tmp_path / "out")
    found = samples(tmp_path / "out")
    assert len(found) == 24
    read, statements = Counter(), {}
    for sample in found:
        name, number = re.search(r"dev-(\d-\d)-(\d)", sample.meta["questions"][0]["question_id"]).groups()
        towers = [scenes[name][place] for place in list(itertools.permutations(range(3)))[int(number)]]
        contents, features = sample.captions
        assert contents == " ; ".join(map(" ".join, towers))
        assert features.split(" ; ")[0].endswith(f"{towers[0][-1]} at the top {towers[0][0]} at the base")
        for question in sample.meta["questions"]:
            text, answers = question["question"], sorted(set(question["answers"]))
            assert [nlvr1.ANSWERS[label] for label in sorted(question["labels"])] == sorted(
                answers, key=nlvr1.ANSWERS.index
            )
            if (right := read_question(text, towers)) is not None:
                assert answers == sorted(right), (text, towers)
                read[text.split()[0]] += 1
            if answers[0] in ("true", "false"):
                statements.setdefault((name, number, answers[0]), set()).add(text)
    assert read == {"which": 87, "how": 30, "there": 10}
    for number in "012345":
        told = {key[::2]: texts for key, texts in statements.items() if key[1] == number}
        for one, other in (("1-0", "1-3"), ("1-1", "2-0")):
            assert told[one, "true"] == told[other, "false"] and told[other, "true"] == told[one, "false"]


def test_nlvr1_scattered_items():
    """Captions and questions about items in no order, by another reading."""
    rng = np.random.default_rng(0)
    colours = {"yellow": "Yellow", "black": "Black", "blue": "#0099ff"}
    boxes = []
    for _ in range(3):
        places = rng.permutation([(x, y) for x in (0, 30, 60, 90) for y in (5, 40, 90)])[:4]
        looks = [(pick(rng, ["circle", "square"]), pick(rng, list(colours.values()))) for _ in places]
        boxes.append(
            [
                {"type": shape, "color": colour, "x_loc": int(x), "y_loc": int(y), "size": 10}
                for (shape, colour), (x, y) in zip(looks, places, strict=True)
            ]
        )
    asked = 0
    for number, order in enumerate(itertools.permutations(boxes)):
        made = nlvr1.made_up([{"identifier": "1-0", "structured_rep": boxes}], number)["1-0"]
        contents, features = made["captions"]
        leftmost = min(order[0], key=lambda item: item["x_loc"])
        touching = " touching" if leftmost["x_loc"] in (0, 90) or leftmost["y_loc"] == 90 else ""
        name = next(word for word, colour in colours.items() if colour == leftmost["color"])
        assert re.match(rf"{name} {leftmost['type']}{touching} (yellow|black|blue) ", contents)
        assert features.count("four items") == 3
        for text, answers in made["questions"]:
            found = re.fullmatch(
                r"which is a box with a (yellow|black|blue) (circle|square)( touching the bottom)?", text
            )
            if found:
                wanted = [
                    [
                        i["color"] == colours[found[1]] and i["type"] == found[2] and (not found[3] or i["y_loc"] == 90)
                        for i in box
                    ]
                    for box in order
                ]
                right = [
                    side
                    for side, is_there in zip(("left", "middle", "right"), map(any, wanted), strict=True)
                    if is_there
                ]
                assert answers == (right or ["none"]), (text, order)
                asked += 1
    assert asked == 10


def test_nlvr1_pictures_have_their_boxes_in_these_orders(shared_data):
    examples = {}
    for line in (shared_data / "nlvr1" / "dev.json").read_text().splitlines()[:40]:
        example = json.loads(line)
        examples[example["identifier"]] = nlvr1.scene(example["structured_rep"])
    seen = Counter()
    with tarfile.open(shared_data / "nlvr1" / "dev_images.tar") as tar:
        for member in tar:
            found = re.search(r"dev-(\d+-\d)-(\d)\.png", member.name)
            if found and examples.get(found[1], (False,))[0]:
                shown = np.asarray(Image.open(tar.extractfile(member)).convert("RGB")).astype(int)
                boxes = [examples[found[1]][1][place] for place in nlvr1.ORDERS[int(found[2])]]
                for slot, box in enumerate(boxes):
                    for block in box:
                        colour = shown[block["y_loc"] + 10, 150 * slot + block["x_loc"] + 10]
                        assert np.abs(colour - nlvr1.COLOURS[block["color"]]).max() < 40, member.name
                seen[found[2]] += 1
    assert len(seen) == 6 and min(seen.values()) > 5
