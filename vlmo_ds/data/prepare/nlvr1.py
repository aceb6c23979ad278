"""Cornell NLVR v1 (Suhr et al., ACL 2017): rendered pictures of three boxes with sentences that are true or false."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmo_ds.data.order import generator
from vlmo_ds.data.prepare.sources import TarMember, read_json_lines, sample_json, tar_members, usable_image
from vlmo_ds.data.prepare.writer import Made, Plan, Rejected, Sample
from vlmo_ds.data.shards import clean_texts, is_true, stable_id
from vlmo_ds.data.storage import DataError
from vlmo_ds.data.transforms import EncodedImage

KINDS = ("captions", "questions", "pairs", "statements")
ANSWERS = ["false", "true"]
COLOURS = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
BOX, BETWEEN = (211, 211, 211), (128, 128, 128)
STATEMENTS = 4  # that tell a picture from the next


def nlvr1(root: Path, splits: Sequence[str], kind: str, augment: bool, resize: int) -> Plan:
    """`<split>.json` and `<split>_images.tar`, six pictures of each example's boxes in all orders.

    kind captions: sentences labelled true with the first picture; questions: every picture with its sentence and the
    answers false and true (as VQA); pairs: every picture and the next one of its example, with the sentence (as NLVR2);
    statements: every picture with generated sentences of which its annotation makes half true and half false, as
    questions, and the true ones as captions. augment: all pictures for captions too, and each sample in all six
    exchanges of the three colours. image_id of captions is a hash of the picture: several examples may be about one.
    """
    exchanges = list(itertools.permutations(COLOURS)) if augment else [tuple(COLOURS)]
    items: list[tuple] = []
    for split in splits:
        lines = read_json_lines(root / f"{split}.json", "one example of NLVR v1 a line")
        examples = {e["identifier"]: e for e in lines}
        pictures: dict[str, dict[int, TarMember]] = defaultdict(dict)
        for name, member in tar_members(root / f"{split}_images.tar").items():
            match = re.fullmatch(rf"(?:.*/)?{split}-(\d+-\d+)-(\d)\.png", name)
            if match and match[1] in examples:
                pictures[match[1]][int(match[2])] = member
        if kind == "statements" and any("structured_rep" not in e for e in lines):
            raise DataError(f"{root / f'{split}.json'}: examples without structured_rep, which --kind statements needs")
        made = [statements(lines, number) for number in range(6)] if kind == "statements" else []
        for identifier, found in pictures.items():
            example = {k: examples[identifier][k] for k in ("sentence", "label")}
            for number in found:
                if kind == "captions" and not (is_true(example["label"]) and (augment or number == 0)):
                    continue
                members = [found[number]] + ([found[(number + 1) % len(found)]] if kind == "pairs" else [])
                name = f"{split}-{identifier}-{number}"
                if made:
                    example = {**example, "made": made[number][identifier]}
                items += [(name, members, example, colours) for colours in exchanges]
    extra = {} if kind in ("captions", "pairs") else {"answers.json": json.dumps(ANSWERS).encode()}
    prefix = "nlvr1" if kind == "captions" else f"nlvr1-{kind}"
    return Plan(prefix, items, partial(make, kind=kind, resize=resize), extra)


def make(item: tuple, kind: str, resize: int) -> Made:
    name, members, example, colours = item
    original = colours == tuple(COLOURS)
    pictures = [member.read() if original else recoloured(member.read(), colours) for member in members]
    images = [usable_image(data, resize) for data in pictures]
    if broken := next((image for image in images if isinstance(image, Rejected)), None):
        yield broken
        return
    presentation = "-".join(name.split("-")[:2])
    identifier = name if original else "-".join((name, *colours))
    label, sentence = is_true(example["label"]), renamed(example["sentence"], colours)
    meta: dict[str, Any] = {"image_id": f"nlvr1:{identifier}"}
    if kind == "captions":
        meta = {"image_id": stable_id(pictures[0].hex()), "captions": clean_texts([sentence]), "file": name}
    elif kind == "questions":
        meta["questions"] = [question(sentence, label, identifier)]
    elif kind == "pairs":
        entry = {"sentence": sentence, "label": str(label), "identifier": identifier, "sentence_id": presentation}
        meta["sentences"] = [entry]
    else:
        made = [(renamed(text, colours), holds) for text, holds in example["made"]]
        meta["captions"] = [text for text, holds in made if holds]
        meta["questions"] = [question(t, holds, f"{identifier}-{n}") for n, (t, holds) in enumerate(made)]
    if len(images) == 1:
        fields = {images[0][0]: images[0][1]}
    else:
        fields = {f"{number}.{extension}": data for number, (extension, data) in enumerate(images)}
    texts = len(meta.get("captions", [])) or 1
    yield Sample(fields | {"json": sample_json(**meta)}, texts)


def question(text: str, holds: bool, identifier: str) -> dict[str, Any]:
    entry = {"question": text, "question_id": identifier, "answers": [ANSWERS[holds]] * 10}
    return entry | {"labels": [int(holds)], "scores": [1.0]}


def recoloured(data: bytes, colours: Sequence[str]) -> bytes:
    """The picture with yellow, black and blue exchanged for `colours`; what cannot be decoded stays as it is."""
    try:
        pixels_HW3 = np.array(EncodedImage(data).decode())
    except ValueError:
        return data
    old, new = (np.array([COLOURS[name] for name in names]) - BOX for names in (COLOURS, colours))
    mixed = (pixels_HW3 - np.array(BOX)) @ np.linalg.solve(old, new) + BOX  # linear: edges mix the new colours
    kept = (pixels_HW3 == BETWEEN).all(-1, keepdims=True)
    out = io.BytesIO()
    Image.fromarray(np.where(kept, pixels_HW3, mixed.round().clip(0, 255)).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def renamed(sentence: str, colours: Sequence[str]) -> str:
    """The sentence with the words yellow, black and blue exchanged for `colours`."""
    changed = {old: new for old, new in zip(COLOURS, colours, strict=True) if old != new}
    if not changed:
        return sentence
    return re.sub("|".join(changed), lambda m: changed[m[0].lower()], sentence, flags=re.IGNORECASE)


# ---- sentences that an annotation makes true or false ----

Item = dict[str, Any]  # type, color, x_loc and y_loc of the upper left corner, size, in pixels of a box of 100 x 100
Test = Callable[[Any], bool]
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight"]
SHAPES = ["square", "triangle", "circle"]


def statements(examples: Sequence[dict[str, Any]], seed: int) -> dict[str, list[tuple[str, bool]]]:
    """identifier -> sentences about its boxes, and whether they hold.

    Each sentence is true of one example and false of the next with boxes of the same sort, towers or scattered items,
    and is given to both: no sentence is more often true than false.
    """
    sorts: dict[bool, list[tuple[str, list[list[Item]]]]] = {True: [], False: []}
    for example in examples:
        boxes = [
            [{**item, "color": {"#0099ff": "blue"}.get(item["color"].lower(), item["color"].lower())} for item in box]
            for box in example["structured_rep"]
        ]
        towers = all(item["x_loc"] == 40 and item["size"] == 20 for box in boxes for item in box)
        sorts[towers].append((example["identifier"], boxes))
    out: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for towers, found in sorts.items():
        templates = TOWERS if towers else SCATTERED
        for number, (identifier, boxes) in enumerate(found):
            other, others = found[(number + 1) % len(found)]
            rng, told = generator(20, seed, int(towers), number), set()
            for _ in range(200):
                template, draw = pick(rng, templates), int(rng.integers(2**32))
                (text, holds), (_, there) = (template(b, np.random.default_rng(draw)) for b in (boxes, others))
                if holds and not there and text not in told:
                    told.add(text)
                    out[identifier].append((text, True))
                    out[other].append((text, False))
                if len(told) == STATEMENTS:
                    break
    return out


def pick(rng: np.random.Generator, choices: Sequence) -> Any:
    return choices[int(rng.integers(len(choices)))]


def amount(rng: np.random.Generator, most: int) -> tuple[str, str, Callable[[int], bool]]:
    """("exactly two", "are", test of a count)."""
    n = int(rng.integers(1, most + 1))
    word = pick(rng, [NUMBERS[n], str(n)])
    be = "is" if n == 1 else "are"
    return pick(
        rng,
        [
            (f"exactly {word}", be, lambda count: count == n),
            (f"only {word}", be, lambda count: count == n),
            (f"at least {word}", be, lambda count: count >= n),
            *([("a", "is", lambda count: count >= 1)] * 2 if n == 1 else []),
        ],
    )


def plural(noun: str, be: str) -> str:
    return noun if be == "is" else f"{noun}es" if noun.endswith("x") else f"{noun}s"


def touches(item: Item) -> tuple[bool, bool, bool]:
    """Whether an item touches a side, the upper or the lower edge."""
    side = item["x_loc"] <= 1 or item["x_loc"] + item["size"] >= 99
    return side, item["y_loc"] <= 1, item["y_loc"] + item["size"] >= 99


def kind_of_item(rng: np.random.Generator, place: bool) -> tuple[str, str, Test]:
    """("yellow circle", "touching the wall", test): what is said before and after the plural, of items."""
    colour, shape = pick(rng, [None, *COLOURS, *COLOURS]), pick(rng, [None, *SHAPES])
    noun = shape or pick(rng, ["item", "object"])
    where: tuple[str, Test] = ("", lambda item: True)
    if place:
        edge = pick(rng, ["the wall", "the edge", "the side"])
        where = pick(
            rng,
            [
                (f"touching {edge}", lambda item: any(touches(item))),
                ("not touching any edge", lambda item: not any(touches(item))),
                (f"touching the {pick(rng, ['base', 'bottom'])}", lambda item: touches(item)[2]),
                ("touching a corner", lambda item: touches(item)[0] and any(touches(item)[1:])),
            ],
        )

    def test(item: Item) -> bool:
        return colour in (None, item["color"]) and shape in (None, item["type"]) and where[1](item)

    return f"{colour} {noun}" if colour else noun, where[0], test


def count_items(boxes: list[list[Item]], rng: np.random.Generator, *, place: bool = False) -> tuple[str, bool]:
    how, be, enough = amount(rng, 4)
    what, where, test = kind_of_item(rng, place)
    return f"there {be} {how} {plural(what, be)} {where}".strip(), enough(sum(test(i) for box in boxes for i in box))


def count_boxes(boxes: list[list[Item]], rng: np.random.Generator, says: Callable, noun: str) -> tuple[str, bool]:
    how, be, enough = amount(rng, pick(rng, [1, 1, 1, 2, 3]))
    about, test = says(rng)
    return f"there {be} {how} {plural(noun, be)} with {about}", enough(sum(test(box) for box in boxes))


def each_box(boxes: list[list[Item]], rng: np.random.Generator) -> tuple[str, bool]:
    what, where, test = kind_of_item(rng, bool(rng.integers(2)))
    return f"each {pick(rng, ['grey ', ''])}box contains at least one {what} {where}".strip(), all(
        any(map(test, box)) for box in boxes
    )


def colours_of(box: list[Item]) -> set[str]:
    return {item["color"] for item in box}


def about_colours(rng: np.random.Generator, noun: str) -> tuple[str, Test]:
    colour, other = rng.permutation(list(COLOURS))[:2]
    return pick(
        rng,
        [
            (f"{noun} of only one color", lambda box: len(colours_of(box)) == 1),
            (f"only {colour} {noun}", lambda box: colours_of(box) == {colour}),
            (f"{noun} of all 3 different colors", lambda box: len(colours_of(box)) == 3),
            (f"{noun} of only {colour} and {other} color", lambda box: colours_of(box) == {colour, other}),
        ],
    )


def about_box(rng: np.random.Generator) -> tuple[str, Test]:
    which = int(rng.integers(4))
    if which == 0:
        return about_colours(rng, "items")
    if which == 1:
        (what, where, test), (second, _, also) = kind_of_item(rng, True), kind_of_item(rng, False)
        return f"a {second} and a {what} {where}", lambda box: any(map(test, box)) and any(map(also, box))
    how, be, enough = amount(rng, 7 if which == 2 else 4)
    what, _, test = ("item", "", bool) if which == 2 else kind_of_item(rng, False)
    return f"{how} {plural(what, be)}", lambda box: enough(sum(map(test, box)))


def upwards(box: list[Item]) -> list[str]:
    return [item["color"] for item in sorted(box, key=lambda item: -item["y_loc"])]


def about_end(rng: np.random.Generator) -> tuple[str, Test]:
    colour, end = pick(rng, list(COLOURS)), pick(rng, ["base", "top"])
    return f"a {colour} block at the {end}", lambda box: upwards(box)[0 if end == "base" else -1] == colour


def about_height(rng: np.random.Generator) -> tuple[str, Test]:
    how, be, enough = amount(rng, 4)
    return f"{how} {plural('block', be)}", lambda box: enough(len(box))


def about_order(rng: np.random.Generator) -> tuple[str, Test]:
    upper, lower = pick(rng, list(COLOURS)), pick(rng, list(COLOURS))
    text = f"a {upper} block {pick(rng, ['over', 'above', 'on'])} a {lower} block"
    return text, lambda box: (lower, upper) in itertools.pairwise(upwards(box))


def about_tower(rng: np.random.Generator) -> tuple[str, Test]:
    which = int(rng.integers(6))
    if which < 3:
        return (about_end, about_height, about_order)[which](rng)
    if which == 3:
        return about_colours(rng, "blocks")
    if which == 4:
        (height, high), (end, at_end) = about_height(rng), about_end(rng)
        return f"{height} {pick(rng, ['and', 'with', 'having'])} {end}", lambda box: high(box) and at_end(box)
    how, be, enough = amount(rng, 3)
    colour = pick(rng, list(COLOURS))
    return f"{how} {colour} {plural('block', be)}", lambda box: enough(upwards(box).count(colour))


def block_of_tower(boxes: list[list[Item]], rng: np.random.Generator) -> tuple[str, bool]:
    """As about_end and about_order, with the block as the subject."""
    if rng.integers(2):
        text, test = about_order(rng)
        return f"there is {text}", any(map(test, boxes))
    how, be, enough = amount(rng, 3)
    colour, end = pick(rng, list(COLOURS)), pick(rng, ["base", "top"])
    count = sum(upwards(box)[0 if end == "base" else -1] == colour for box in boxes)
    return f"there {be} {how} {colour} {plural('block', be)} as the {end} of a tower", enough(count)


def count_blocks(boxes: list[list[Item]], rng: np.random.Generator) -> tuple[str, bool]:
    how, be, enough = amount(rng, 6)
    colour = pick(rng, list(COLOURS))
    return f"there {be} {how} {colour} {plural('block', be)}", enough(sum(upwards(box).count(colour) for box in boxes))


TOWERS = [partial(count_boxes, says=about_tower, noun="tower")] * 3 + [block_of_tower, count_blocks]
SCATTERED = [
    *[partial(count_boxes, says=about_box, noun="box")] * 2,
    count_items,
    *[partial(count_items, place=True)] * 2,
    each_box,
]
