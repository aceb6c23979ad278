"""What a sample's .json may hold, and that every reader hears of what it may not."""

import io
import json
import tarfile
from types import SimpleNamespace

import pytest
from data.files import jpeg, png, samples, write_pairs, write_tar
from data.test_shards import dataset, whole_epoch

from vlmo_ds.data.meta import DEEPEST, parse_json, read_meta
from vlmo_ds.data.prepare.sources import img2dataset, make_text, read_json_lines
from vlmo_ds.data.shards import answer_list, is_true, lines, list_shards
from vlmo_ds.data.storage import DataError
from vlmo_ds.evaluation.zero_shot import label_of, read_lines

NAN, HALF = float("nan"), "a dog \ud83d on grass"
QUESTION = {"question": "is it red?", "question_id": 7, "labels": [0, 3], "scores": [1, 0.3], "answers": ["yes"] * 10}
SENTENCE = {"sentence": "both are red", "label": "True", "identifier": "dev-0-0-1"}


def asked(**changed) -> dict:
    return {"questions": [QUESTION, QUESTION | changed]}


def said(**changed) -> dict:
    return {"sentences": [SENTENCE | changed]}


@pytest.mark.parametrize(
    "meta, reason",
    [
        ({"caption": NAN}, "has caption nan; accepted: a text or a list of texts"),
        ({"caption": 5}, "has caption 5; accepted"),
        ({"captions": True}, "has captions True; accepted"),
        ({"captions": {"en": "a dog"}}, r"has captions \{'en': 'a dog'\}; accepted"),
        ({"captions": ["a dog", None]}, r"has captions \['a dog', None\]"),
        ({"captions": ["a dog", {"raw": "a dog"}]}, "has captions"),
        ({"captions": ["a dog", ["a dog"]]}, "has captions"),
        ({"caption": HALF}, "half a surrogate pair"),
        ({"caption": "a dog", "exif": {"by": [HALF]}}, "half a surrogate pair"),
        ({"caption": "a dog", HALF: 1}, "half a surrogate pair"),
        ({"image_id": 2**64 - 5}, "has image_id 18446744073709551611; accepted: a whole number of 64 bits or a text"),
        ({"image_id": -(2**63) - 1}, "has image_id -"),
        ({"image_id": 10**400}, r"has image_id 1000.*\.\.\."),
        *(({"image_id": odd}, "has image_id") for odd in (True, 4.0, NAN, [1], {"a": 1}, "")),
        *(({"questions": odd}, "has questions .*; accepted: a list of objects") for odd in ("is it?", 4, {"q": 1}, [1])),
        (asked(question=4), "has question 2: question 4; accepted: a text"),
        (asked(question_id=1.5), "has question 2: question_id 1.5"),
        (asked(labels=[-1, 3]), r"has question 2: labels \[-1, 3\]; accepted: a list of different whole numbers from 0"),
        *((asked(labels=odd), "labels") for odd in ([3, 3], [0, True], [0, 1.0], ["0", "3"], 3, [[0], [3]], [0, 2**70])),
        *((asked(scores=odd), "scores .*; accepted: a list of numbers from 0 to 1") for odd in ([1.1, 1], [-0.1, 1])),
        *((asked(scores=odd), "scores") for odd in ([NAN, 1], [1, float("inf")], [1, "1"], [True, 1], 1, [1, None])),
        (asked(scores=[1]), "has 2 labels and 1 scores in question 2"),
        (asked(answers=["yes", 2]), r"has question 2: answers"),
        (asked(answer_type=["other"]), r"has question 2: answer_type"),
        *((said(label=odd), "has sentence 1: label .*; accepted: true or false") for odd in ("yes", 2, -1, 0.5, NAN, [], "")),
        (said(sentence=None, identifier=["a"]), "has sentence 1: identifier"),
        (["a dog"], r"holds \['a dog'\]; accepted: an object such as"),
        (None, "holds None"),
        ("a dog", "holds 'a dog'"),
    ],
)  # fmt: skip
def test_what_is_refused(meta, reason):
    with pytest.raises(ValueError, match=reason):
        read_meta(json.dumps(meta).encode())


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "is not JSON"),
        (b"{'caption': 'a dog'}", "is not JSON"),
        (b'{"caption": "caf\xe9"}', "is not JSON"),
        (b'{"image_id": ' + b"9" * 10_000 + b"}", "is not JSON|has image_id"),
        (b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", f"nested more than {DEEPEST} deep"),
        (b'{"other": ' + b'{"a":' * 70 + b"1" + b"}" * 71, f"nested more than {DEEPEST} deep"),
    ],
)
def test_what_is_no_json_for_us(data, reason):
    with pytest.raises(ValueError, match=reason):
        read_meta(data)
    assert parse_json(b"[" * DEEPEST + b"]" * DEEPEST)


@pytest.mark.parametrize(
    "meta",
    [
        {"caption": "a dog", "questions": None, "image_id": None, "captions": None},
        {"caption": "a dog \U0001f415", "similarity": NAN, "width": 1e400, "exif": '{"Image": null}', "sha256": 5},
        {"captions": ["a dog", ""], "image_id": "coco:1", "label": "dog"},
        {"image_id": -5} | asked(labels=None, scores=None, answers=None),
        {"image_id": 2**63 - 1} | asked(labels=[], scores=[]) | said(label=False),
        *(said(label=value) for value in (True, "true", "FALSE", 0, 1)),
    ],
)
def test_what_is_accepted(meta):
    found = read_meta(json.dumps(meta).encode())
    assert None not in found.values() and not any(None in q.values() for q in found.get("questions", []))


def test_truth_of_nlvr():
    assert [is_true(label) for label in (True, "True", "true", 1, False, "False", 0)] == [True] * 4 + [False] * 3


ODD = {
    "nan": b'{"caption": NaN}',
    "null": b'{"caption": null}',
    "object": b'{"captions": {"en": "a dog"}}',
    "deep": b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "large": json.dumps({"caption": "a dog", "image_id": 2**64 - 5}).encode(),
    "half": b'{"caption": "a dog \\ud83d on grass"}',
    "questions": b'{"caption": "a dog", "questions": [5]}',
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_sample_is_replaced_named_and_counted_by_every_reader(odd, tmp_path):
    members = {}
    for i in range(20):
        members[f"{i:03d}.jpg"] = jpeg(colour=(i, 2, 3))
        members[f"{i:03d}.json"] = ODD[odd] if i == 7 else json.dumps({"caption": f"picture {i}"}).encode()
    write_tar(tmp_path / "a.tar", members)
    _, replaced = whole_epoch(dataset(tmp_path, batch=20), 20)
    assert len(replaced) == 1 and "a.tar:007" in replaced[0][1]
    (shard,) = list_shards([str(tmp_path)])
    texts = []
    for row in range(20):
        try:
            texts += shard.read(row).texts
        except DataError:
            continue
    assert texts == [f"picture {i}" for i in range(20) if i != 7]
    plan = img2dataset([str(tmp_path)], 0, "x", 100)
    made = [part for item in plan.items for part in plan.make(item)]
    assert len(made) == 20 and [getattr(part, "reason", None) is not None for part in made].index(True) == 7


@pytest.mark.parametrize("name", ["00007_caf\udce9", "caf\udce9/00007"])
def test_a_file_name_that_is_not_utf8(name, tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for i in range(20):
            for extension, data in (("jpg", jpeg()), ("txt", b"a picture")):
                info = tarfile.TarInfo(f"{name if i == 7 else f'{i:05d}'}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    _, replaced = whole_epoch(dataset(tmp_path, batch=20), 20)
    assert len(replaced) == 1 and r"sample 7 is not UTF-8: " in replaced[0][1] and r"caf\udce9" in replaced[0][1]
    print(replaced[0][1].encode())  # can be written


def test_a_shard_whose_name_is_not_utf8(tmp_path):
    write_pairs(tmp_path / "caf\udce9.tar", 3)
    with pytest.raises(DataError, match=r"caf\\udce9.tar is not UTF-8: rename it"):
        list_shards([str(tmp_path)])


# ---- texts ----

ODD_ENDS = (
    "a dog\u2028on grass",
    "a cat\x85on a mat",
    "a cow\x0bin a field",
    "a fox\x0cin a wood",
    "an owl\x1con a tree",
)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_texts_end_at_newlines_alone(end, tmp_path):
    text = end.join(ODD_ENDS) + end
    assert lines(text) == [*ODD_ENDS, ""]
    write_tar(
        tmp_path / "a.tar", {"0.jpg": jpeg(), "0.txt": text.encode(), "1.jpg": jpeg(), "1.caption": text.encode()}
    )
    wanted = [" ".join(t.split()) for t in ODD_ENDS]
    assert [raw.captions for raw in samples(tmp_path)] == [wanted, wanted]
    (tmp_path / "names.txt").write_bytes(("\ufeff" + text).encode())
    assert read_lines(tmp_path / "names.txt", "class names") == list(ODD_ENDS)
    found = [
        s.fields["txt"].decode() for s in make_text((str(tmp_path / "names.txt"), 3, 3 + len(text.encode())), 9, None)
    ]
    assert found == wanted


def test_json_lines_may_hold_other_line_ends(tmp_path):
    (tmp_path / "a.json").write_text(
        "".join(json.dumps({"t": t}, ensure_ascii=False) + "\n" for t in ODD_ENDS[:2]), "utf-8"
    )
    assert [row["t"] for row in read_json_lines(tmp_path / "a.json", "rows")] == list(ODD_ENDS[:2])


def test_a_byte_order_mark_is_no_text(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(), "0.txt": b"\xef\xbb\xbfa dog"})
    assert samples(tmp_path)[0].captions == ["a dog"]


# ---- lists of answers, classes ----


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"[1]", b'["a", null]', b'["\\ud83d"]', b"[" * 100_000 + b"]" * 100_000, b"\xff"]
)
def test_answers_that_are_no_list_of_texts(content, tmp_path):
    (tmp_path / "answers.json").write_bytes(content)
    with pytest.raises(DataError, match=r"answers.json"):
        answer_list([f"{tmp_path}/a.tar"])


CLASSES = ["crane", "dog", "crane", "cat"]


@pytest.mark.parametrize(
    "meta, wanted",
    [
        ({"label": 1}, 1),
        ({"label": 1, "class": "dog"}, 1),
        ({"label": 2, "class": "crane"}, 2),
        ({"label": 1, "class": "n02084071"}, 1),  # a name that is not among those of --classes says nothing
        ({"class": "cat"}, 3),
        ({"label": "cat", "class": "cat"}, 3),
        ({"label": 1, "class": "cat"}, "label 1, which is 'dog', and class 'cat'"),
        ({"label": 4, "class": "cat"}, "label 4 and class 'cat'; accepted: a label from 0 to 3"),
        ({"class": "crane"}, "label None and class 'crane'"),
        *(({"label": odd}, "accepted: a label from 0 to 3") for odd in (True, -1, 1.0, [1], NAN)),
        *(({"class": odd}, "accepted: a label from 0 to 3") for odd in (["dog"], 1, {}, "lion")),
    ],
)
def test_labels_of_zero_shot(meta, wanted):
    raw = SimpleNamespace(name="a.tar:7", meta=meta, label=meta.get("label"))
    if isinstance(wanted, int):
        assert label_of(raw, CLASSES) == wanted
    else:
        with pytest.raises(DataError, match=f"a.tar:7: its .json has .*{wanted}"):
            label_of(raw, CLASSES)


@pytest.mark.parametrize("fields, wanted", [
    ({"json": b'{"label": 2}'}, 2), ({"cls": b"2\n"}, 2), ({"cls": b"2", "json": b"{}"}, 2), ({"cls": b"5", "json": b'{"label": 1}'}, 1),
    ({}, "None"), ({"cls": b"3"}, "3"), ({"cls": b"-1"}, "'-1'"), ({"cls": "٢".encode()}, "'٢'"), ({"cls": b""}, "''"),
    ({"cls": b"\xff"}, "'.'"), ({"cls": b"9" * 5000}, "'999+"), ({"json": b'{"label": "2"}', "cls": b"2"}, "'2'"),
    ({"json": b'{"label": true}'}, "True"),
])  # fmt: skip
def test_labels_of_classes(tmp_path, fields, wanted):
    write_tar(tmp_path / "a.tar", {"x.png": png(), **{f"x.{name}": content for name, content in fields.items()}})
    (raw,) = samples(tmp_path)
    if isinstance(wanted, int):
        assert raw.label_below(3) == label_of(raw, ["a", "b", "c"]) == wanted
    else:
        with pytest.raises(
            DataError, match=rf"a.tar:x: its label in .json or .cls is {wanted}.*; accepted: a number from 0 to 2 \("
        ):
            raw.label_below(3)


def test_pairs_without_labels_or_pictures_are_named(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.0.png": png(), "x.1.png": png(), "x.json": json.dumps(said(label=None)).encode()})
    (raw,) = samples(tmp_path)
    with pytest.raises(DataError, match=r"a.tar:x: one of its sentences has no 'label'"):
        raw.entries("sentences", ("sentence", "label"))
    with pytest.raises(DataError, match=r"lists no 'questions'"):
        raw.entries("questions", ("question",))
