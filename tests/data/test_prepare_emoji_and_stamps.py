"""Emoji and stamps, as packages of the layout that npm and Debian serve."""

import io
import json

import pytest
from data.files import png, prepare_here, samples
from PIL import Image

from vlmo_ds.data.transforms import EncodedImage

EMOJI = {
    "1F600": ("grinning face", "grinsendes Gesicht", "にっこり笑う"),
    "2764-FE0F": ("red heart", "rotes Herz", "赤いハート"),
}
EMOJI |= {f"1F4{i:02X}": (f"thing {i}", f"Ding {i}", f"物 {i}") for i in range(40)}


def transparent() -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def packages(tmp_path):
    """Those of npm: 42 emoji in two styles, one of them transparent, and a flag, which has no name."""
    root = tmp_path / "node_modules"
    listed = [{"unified": code, "image": f"{code.lower()}.png"} for code in [*EMOJI, "1F1EA-1F1EC"]]
    for number, style in enumerate(("google", "twitter")):
        pictures = root / f"emoji-datasource-{style}/img/{style}/64"
        pictures.mkdir(parents=True)
        (root / f"emoji-datasource-{style}/emoji.json").write_text(json.dumps(listed))
        for place, entry in enumerate(listed):
            (pictures / entry["image"]).write_bytes(png((8, 8), (place, 99 * number, 0)) if place else transparent())
    for column, language in enumerate(("en", "de", "ja")):
        named = {
            "".join(chr(int(c, 16)) for c in code.removesuffix("-FE0F").split("-")): {
                "tts": [names[column]],
                "default": [f"{language} a", f"{language} b"],
            }
            for code, names in EMOJI.items()
            if (language, code) != ("ja", "1F401")
        }
        write_annotations(root, language, named)
    write_annotations(root, "de-CH", {})
    return root


def write_annotations(root, language, named):
    folder = root / "cldr-annotations-full/annotations" / language
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "annotations.json").write_text(json.dumps({"annotations": {"annotations": named}}))


def of(folder):
    return {sample.meta["image_id"]: sample for sample in samples(folder)}


def test_emoji(packages, tmp_path, capsys):
    command = ["emoji", "--root", packages, "--style"]
    for style in ("google", "twitter"):
        out = prepare_here(capsys, *command, style, "--language", "en,ja", "--output", tmp_path / style)
        assert "42 samples, 83 captions" in out and "0 rejected" in out
    google, twitter = of(tmp_path / "google"), of(tmp_path / "twitter")
    assert list(google) == list(twitter)  # the same thing has the same id in both styles
    assert [s.captions for s in google.values()] == [s.captions for s in twitter.values()]
    assert google["emoji:2764-fe0f"].captions == ["red heart", "赤いハート"]
    assert google["emoji:1f401"].captions == ["thing 1"]  # without a name in Japanese
    assert google["emoji:2764-fe0f"].image != twitter["emoji:2764-fe0f"].image
    assert (EncodedImage(google["emoji:1f600"].image).decode() == 255).all()  # alpha is on white
    for kind, wanted in (("keywords", ["de a, de b"]), ("both", ["rotes Herz", "de a, de b"])):
        more = ["--language", "de", "--captions", kind, "--output", tmp_path / kind]
        prepare_here(capsys, *command, "google", *more)
        assert of(tmp_path / kind)["emoji:2764-fe0f"].captions == wanted


def test_splits_of_emoji(packages, tmp_path, capsys):
    for style, split in (("google", "train"), ("google", "test"), ("twitter", "test")):
        more = ["--style", style, "--split", split, "--output", tmp_path / f"{style}-{split}"]
        prepare_here(capsys, "emoji", "--root", packages, *more)
    train, test = set(of(tmp_path / "google-train")), set(of(tmp_path / "google-test"))
    assert not train & test and len(train | test) == 42 and test == set(of(tmp_path / "twitter-test"))
    assert 4 <= len(test) <= 13


@pytest.mark.parametrize(
    "given, reason",
    [
        (
            ["--style", "apple"],
            "emoji-datasource-apple/img/apple/64 does not exist: expected pictures of the npm package",
        ),
        (["--style", "nokia"], "--style: 'nokia' is not in the styles; accepted: google, twitter, apple, facebook"),
        (["--language", "en,xx"], "--language: 'xx' is not in cldr-annotations-full; accepted: de, de-CH, en, ja"),
        (["--language", "de-CH"], "de-CH/annotations.json has no names: it only says where 'de-CH' differs"),
        (["--split", "val"], "--split: 'val' is not in the splits; accepted: all, train, test"),
    ],
)
def test_emoji_that_are_not_there(given, reason, packages, tmp_path, capsys):
    command = ["emoji", "--root", packages, "--output", tmp_path / "out", "--style", "google", *given]
    assert reason in prepare_here(capsys, *command, code=2)


def test_damaged_packages_of_emoji(packages, tmp_path, capsys):
    command = ["emoji", "--root", packages, "--style", "google", "--output", tmp_path / "out"]
    (packages / "emoji-datasource-google/img/google/64/1f600.png").write_bytes(b"broken")
    (packages / "emoji-datasource-google/img/google/64/1f401.png").unlink()
    out = prepare_here(capsys, *command)
    assert "rejected 1: image: not a readable image" in out and "rejected 1: image file missing" in out
    for file, content, reason in (
        ("emoji-datasource-google/emoji.json", "{", "emoji.json is not JSON"),
        ("emoji-datasource-google/emoji.json", '[{"image": 1}]', "emoji.json is not the list of emoji"),
        ("cldr-annotations-full/annotations/en/annotations.json", "[]", "annotations.json is not CLDR's annotations"),
    ):
        (packages / file).write_text(content)
        assert reason in prepare_here(capsys, *command, "--overwrite", code=2)


@pytest.fixture
def stamps(tmp_path):
    """The package of Debian: 40 stamps, of which two have the same sentence."""
    root = tmp_path / "unpacked"
    folder = root / "usr/share/tuxpaint/stamps/animals"
    folder.mkdir(parents=True)
    for i in range(40):
        (folder / f"{i:02d}.png").write_bytes(png((8, 8), (i, 0, 0)))
        text = f"Animal {i // 2 if i < 30 else i}.\nde.utf8=Tier {i}.\nja.utf8=動物 {i}。\nzz.utf8=\n"
        (folder / f"{i:02d}.txt").write_text(text + ("hi.utf8=हिन्दी\n" if i == 3 else ""))
    (folder / "00_mirror.png").write_bytes(png())
    (folder / "41.svg").write_text("<svg/>")
    (folder / "41.txt").write_text("Animal 41.\n")
    return root


def test_stamps(stamps, tmp_path, capsys):
    for root in (stamps, stamps / "usr/share/tuxpaint/stamps"):
        command = ["stamps", "--root", root, "--language", "en,hi,ja", "--overwrite", "--output", tmp_path / "all"]
        assert "40 samples, 81 captions" in prepare_here(capsys, *command)
    found = of(tmp_path / "all")
    assert found["stamps:animals/03.png"].captions == ["Animal 1.", "हिन्दी", "動物 3。"]
    assert found["stamps:animals/04.png"].captions == ["Animal 2.", "動物 4。"]
    command = ["stamps", "--root", stamps, "--language", "hi", "--output", tmp_path / "hi"]
    assert "1 samples" in prepare_here(capsys, *command)


def test_splits_of_stamps_share_no_sentence(stamps, tmp_path, capsys):
    for split in ("train", "test"):
        prepare_here(capsys, "stamps", "--root", stamps, "--split", split, "--output", tmp_path / split)
    train, test = ([s.captions[0] for s in samples(tmp_path / split)] for split in ("train", "test"))
    assert set(train) | set(test) == {f"Animal {i}." for i in [*range(15), *range(30, 40)]}
    assert not set(train) & set(test) and len(set(train)) < len(train) and len(set(test)) == len(test) > 1


@pytest.mark.parametrize(
    "given, reason",
    [
        (["--language", "en,xx"], "--language: 'xx' is not in "),
        (["--language", "xx"], "accepted: de, en, hi, ja"),
        (["--split", "val"], "--split: 'val' is not in the splits; accepted: all, train, test"),
        (["--root", "nowhere"], "nowhere does not exist: expected the unpacked Debian package tuxpaint-stamps-default"),
        (["--root", "tests"], "tests has no .png with a .txt beside it: expected tuxpaint-stamps-default, unpacked"),
    ],
)
def test_stamps_that_are_not_there(given, reason, stamps, tmp_path, capsys):
    assert reason in prepare_here(capsys, "stamps", "--root", stamps, "--output", tmp_path / "out", *given, code=2)


def test_damaged_stamps(stamps, tmp_path, capsys):
    command = ["stamps", "--root", stamps, "--output", tmp_path / "out"]
    folder = stamps / "usr/share/tuxpaint/stamps/animals"
    (folder / "05.png").write_bytes(b"broken")
    assert "rejected 1: image: not a readable image" in prepare_here(capsys, *command)
    (folder / "05.txt").write_bytes(b"\xff\xfe")
    assert "05.txt is not the text of a stamp" in prepare_here(capsys, *command, "--overwrite", code=2)
