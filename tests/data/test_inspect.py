"""The page about a shard set."""

import json
from functools import partial

import pytest
from conftest import call
from data.files import jpeg, png, write_pairs, write_tar

from vlmo_ds.data.inspect import main

inspect = partial(call, "vlmo_ds.data.inspect")


def test_page_counts_and_shows(tmp_path):
    same = jpeg((64, 48), (9, 99, 9))
    write_pairs(
        tmp_path / "a.tar", 10, s003_jpg=b"", s004_jpg=same, s005_jpg=same, s006_txt=b"<b>bold</b> claim & more"
    )
    write_tar(tmp_path / "b.tar", {"x.txt": b"a line of text alone"})
    inspect(tmp_path, "--output", tmp_path / "page.html", "--image_size", 64)
    page = (tmp_path / "page.html").read_text()
    for fact in (
        "<td>samples</td><td>11</td>",
        "<td>samples looked at</td><td>11</td>",
        "<td>of these unusable</td><td>1</td>",
        "<td>captions</td><td>10</td>",
        "<td>pictures that look like an earlier one</td><td>1</td>",
        "2 times: a.tar:4, a.tar:5",
        "a.tar, sample 3: not a readable image",
    ):
        assert fact in page, fact
    assert page.count("data:image/jpeg") == 9 + 1 and page.count("&rarr;") >= 9  # 9 pictures and one group of copies
    assert "<b>bold</b>" not in page


def test_fine_tuning_sets(tmp_path):
    """Two images with sentences, an image with questions, an image with a class."""
    members = {
        "a.0.png": png(colour=(1, 2, 3)),
        "a.1.png": png(colour=(90, 2, 3)),
        "a.json": json.dumps({"sentences": [{"sentence": "both are dark", "label": "True"}]}).encode(),
        "b.jpg": jpeg(colour=(4, 200, 6)),
        "b.json": json.dumps({"questions": [{"question": "is it green?"}, {"question": "a cat?"}]}).encode(),
        "d.0.png": png(colour=(1, 2, 3)),
        "d.1.png": png(colour=(90, 2, 3)),
        "d.json": json.dumps({"sentences": [{"sentence": "none is dark", "label": "False"}]}).encode(),
        "c.jpg": jpeg(colour=(7, 8, 230)),
        "c.json": json.dumps({"label": 3, "class": "n0144"}).encode(),
    }
    write_tar(tmp_path / "a.tar", members)
    inspect(tmp_path / "a.tar", "--output", tmp_path / "page.html", "--image_size", 32)
    page = (tmp_path / "page.html").read_text()
    assert "<td>of these unusable</td><td>0</td>" in page and "<td>captions</td><td>4</td>" in page
    assert page.count("data:image/jpeg") == 6 + 2 and page.count("both are dark") == 2
    assert "is it green? / a cat?" in page and "n0144" in page


def test_nothing_to_inspect(tmp_path):
    assert "does not exist" in inspect(tmp_path / "no", "--output", tmp_path / "page.html", code=2).stderr
    assert not (tmp_path / "page.html").exists()


def test_pairs_that_are_torn_apart(tmp_path, capsys):
    """Images first, then their texts: every member is fine, and nothing can be trained."""
    pictures, texts = ({f"{i}.{kind}": data for i in range(6)} for kind, data in (("jpg", jpeg()), ("txt", b"a dog")))
    write_tar(tmp_path / "a.tar", pictures | texts)
    arguments = [
        str(tmp_path / "a.tar"),
        "--output",
        str(tmp_path / "page.html"),
        "--image_size",
        "32",
        "--processes",
        "1",
    ]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "error: 12 of 12 samples looked at cannot be used; the first:" in said and "do not lie side by side" in said
    assert "<td>of these unusable</td><td>12</td>" in (tmp_path / "page.html").read_text()
    assert main([*arguments, "--samples", "4"]) == 2  # few of them, none of one key with another
    write_tar(tmp_path / "b.tar", {"x.jpg": jpeg(), "x.txt": b"whole", **pictures, "0.txt": b"late"})
    assert main([str(tmp_path / "b.tar"), *arguments[1:]]) == 0
    assert "warning: 2 of 8 samples looked at cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("kind, data", [("jpg", jpeg()), ("txt", b"a dog")])
def test_pictures_alone_and_texts_alone_are_fine(tmp_path, kind, data):
    write_tar(tmp_path / "a.tar", {f"{i}.{kind}": data for i in range(3)})
    assert main([str(tmp_path), "--output", str(tmp_path / "page.html"), "--processes", "1"]) == 0


@pytest.mark.parametrize(
    "members, reason",
    [
        ({"cat.v2.jpg": jpeg(), "cat.v2.txt": b"a cat"}, "found .v2.jpg, .v2.txt (the extension begins"),
        ({"1.jpg": b"", "2.jpg": b"x"}, "not a readable image"),
        ({"1.txt": b" "}, "has an empty caption"),
        ({"1.tiff": b"x", "1.cls": b"3"}, "holds no image and no text"),
    ],
)
def test_sets_of_which_nothing_can_be_trained(tmp_path, capsys, members, reason):
    write_tar(tmp_path / "a.tar", members)
    assert main([str(tmp_path), "--output", str(tmp_path / "page.html"), "--processes", "1"]) == 2
    said = capsys.readouterr().err
    assert "samples looked at cannot be used; the first:" in said and reason in said
