"""A folder is indexed once, goes on where it was interrupted, and is searched by text and by image."""

import numpy as np
import pytest
import torch
from families.vlmo.tiny import JOINT, tiny_model
from PIL import Image
from transformers import AutoProcessor

from vlmo_ds.data.tokenizer import train_tokenizer
from vlmo_ds.evaluation import search
from vlmo_ds.families.vlmo.huggingface import VLMoForImageTextRetrieval, exported

WORDS = train_tokenizer([f"is {i} a word" for i in range(30)], 50)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    tiny = tiny_model(JOINT, torch.float32)
    exported(tiny.state_dict(), tiny.config, list(JOINT), WORDS, None, folder)
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for i in range(7):
        noise = np.random.default_rng(i).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / ("deeper" if i % 2 else ".") / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "notes.txt").write_text("no picture either")
    return folder


def run(model, images, tmp_path, *arguments) -> int:
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "found.html")]
    return search.main(["--model", str(model), "--images", str(images), *output, *map(str, arguments)])


def test_an_image_finds_itself_and_a_text_every_image(model, images, tmp_path, capsys):
    assert run(model, images, tmp_path, "is 3 a word", "--image", images / "deeper/3.png", "--count", 3) == 0
    printed, errors = capsys.readouterr()
    assert "7 images, 7 of them newly indexed" in printed and "left out:" in errors and "broken.jpg" in errors
    assert printed.split("like ")[1].splitlines()[1].split() == ["1.000", "deeper/3.png"]
    page = (tmp_path / "found.html").read_text()
    assert page.count("<img") == 6 and page.count("<h2>") == 2 and 'src="data:image' in page
    assert run(model, images, tmp_path, "is 3 a word", "--output", tmp_path / "found.png", "--rerank", 4) == 0
    assert "7 images, 0 of them newly indexed" in capsys.readouterr().out
    assert Image.open(tmp_path / "found.png").height > search.THUMBNAIL


def test_reranking_adds_the_log_odds_of_the_first(model, images):
    loaded = VLMoForImageTextRetrieval.from_pretrained(model).eval()
    processor = AutoProcessor.from_pretrained(model)
    index = search.Index(images, images / search.INDEX, "x")
    search.build(index, index.files(), loaded, processor, 2)
    files, features = index.features(index.files())
    query = search.Query(text="is 5 a word")
    plain = search.search(query, files, features, loaded, processor, 7)
    again = search.search(query, files, features, loaded, processor, 7, rerank=3)
    assert {hit.file for hit in plain[:3]} == {hit.file for hit in again[:3]}
    assert [hit.file for hit in plain[3:]] == [hit.file for hit in again[3:]]
    text = processor(text=query.text)
    for hit in again[:3]:
        with torch.no_grad():
            odds = loaded.match(
                text["input_ids"], processor.image_processor(hit.file)["pixel_values"], text["attention_mask"]
            )
        before = next(h.score for h in plain if h.file == hit.file)
        assert hit.score == pytest.approx(before + float(odds[0]), abs=1e-4)


def test_an_index_goes_on_where_it_was_interrupted(model, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "PART", 2)
    add, calls = search.Index.add, []

    def fails_at_the_third(self, keys, features):
        calls.append(keys)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(self, keys, features)

    monkeypatch.setattr(search.Index, "add", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(model, images, tmp_path, "--batch_size", 2)
    monkeypatch.setattr(search.Index, "add", add)
    capsys.readouterr()
    assert run(model, images, tmp_path, "--batch_size", 2) == 0
    first = sum(len(keys) for keys in calls[:2])
    assert f"7 images, {7 - first} of them newly indexed" in capsys.readouterr().out
    Image.new("RGB", (9, 9)).save(images / "0.png")
    (images / "deeper/1.png").unlink()
    assert run(model, images, tmp_path) == 0
    assert "6 images, 1 of them newly indexed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (["--images", "/nowhere"], "--images: /nowhere is no folder"),
        (["--images", "EMPTY"], "--images: EMPTY holds no image; accepted: .jpeg"),
        (["--model", "/nowhere"], "--model: /nowhere holds no exported model"),
        (["--model", "IMAGES"], "--model: IMAGES holds no exported model"),
        (["--output", "x.pdf"], "--output: x.pdf; accepted: a file that ends in .html or .png"),
        (["--output", "/nowhere/x.png"], "--output: /nowhere/x.png cannot be written: /nowhere is no folder"),
        (["--image", "/nowhere.png"], "--image: /nowhere.png: No such file or directory; accepted: an image's file"),
        (["--image", "IMAGES"], "--image: IMAGES: Is a directory; accepted"),
        (["--image", "IMAGES/notes.txt"], "--image: IMAGES/notes.txt: not a readable image"),
        (["--image", "IMAGES/broken.jpg"], "--image: IMAGES/broken.jpg: not a readable image"),
        (["--image", "a\0b"], "--image: a\0b: "),
        ([""], "query: ''; accepted: a text that is not empty"),
        ([" \n"], "query: ' \\n'; accepted: a text that is not empty"),
        (["\udcff"], "query: '\\\\udcff'; accepted"),
    ],
)
def test_what_cannot_be_used_is_named_before_a_model_is_loaded(
    model, images, tmp_path, capsys, monkeypatch, change, message
):
    monkeypatch.setattr(VLMoForImageTextRetrieval, "from_pretrained", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "empty").mkdir()

    def filled(text: str) -> str:
        return text.replace("IMAGES", str(images)).replace("EMPTY", str(tmp_path / "empty"))

    assert run(model, images, tmp_path, "a", *map(filled, change)) == 2
    printed, errors = capsys.readouterr()
    assert filled(message) in errors and len(errors.splitlines()) == 1 and not printed
    assert not (images / search.INDEX).exists()


def test_names_that_are_not_utf8_are_searched_too(model, images, tmp_path, capsys):
    (images / "0.png").rename(images / "\udcff.png")
    query = images / "\udcff.png"
    assert run(model, images, tmp_path, "--image", query, "--count", 1) == 0
    assert "\\udcff.png" in capsys.readouterr().out and "\\udcff.png" in (tmp_path / "found.html").read_text()
