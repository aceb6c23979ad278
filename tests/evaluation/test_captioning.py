"""Scores of captions: by their words, as pycocoevalcap takes them, and by their meaning in the synthetic world."""

import json

import pytest

from vlmo_ds.config import RecipeError
from vlmo_ds.data import synthetic
from vlmo_ds.data.order import generator
from vlmo_ds.data.synthetic import Thing
from vlmo_ds.evaluation import captioning, meaning
from vlmo_ds.evaluation.captioning import Captioned

SCENE = (
    Thing("circle", "red", "large", "striped", 0, 0),
    Thing("star", "blue", "small", "plain", 2, 1),
    Thing("ring", "red", "small", "dotted", 1, 1),
)


@pytest.mark.parametrize("caption, things, statements", [
    ("a large striped red circle in the top left corner", [("red", "circle")], [True, True, True]),
    ("a small dotted red circle at the bottom", [("red", "circle")], [False, False, False]),
    ("the picture shows a blue star below a red ring", [("blue", "star"), ("red", "ring")], [True]),
    ("a tiny dotted red ring in the middle, with a red circle to the right of a blue star",
     [("red", "ring"), ("red", "circle"), ("blue", "star")], [True, True, True, False]),
    ("a green heart to the left of a red ring", [("green", "heart"), ("red", "ring")], [False]),
    ("a red circle above", [("red", "circle")], [False]),
    ("a picture of nothing", [], []),
    ("A  Big Red circle ON the left", [("red", "circle")], [True, False]),
])  # fmt: skip
def test_what_a_caption_says(caption, things, statements):
    said = meaning.read(caption, SCENE)
    assert said.things == things
    assert said.statements == statements


def test_true_captions_are_wholly_right_and_others_are_not():
    scenes, _ = synthetic.scenes(0, 200, 10)
    captions = [synthetic.describe(scene, generator(9, i)) for i, scene in enumerate(scenes)]
    own = meaning.judge(captions, scenes)
    assert own["objects/F1"] == own["statements true"] == own["wholly right"] == 100
    assert 3.4 < own["statements a caption"] < 4.1
    others = meaning.judge(captions[1:] + captions[:1], scenes)
    assert others["objects/F1"] < 6 and others["statements true"] < 2 and others["wholly right"] == 0


def test_a_thing_named_twice_is_not_wholly_right():
    scene = SCENE[:1]
    once = meaning.judge(["a red circle in the top left corner"], [scene])
    twice = meaning.judge(["a red circle in the top left corner and a red circle"], [scene])
    assert once["wholly right"] == 100 and twice["wholly right"] == 0
    assert twice["objects/F1"] == pytest.approx(200 / 3)


def photographs(shared_data) -> list[Captioned]:
    images = json.loads((shared_data / "coco_photos" / "karpathy" / "dataset_coco.json").read_text())["images"]
    texts = [[sentence["raw"] for sentence in image["sentences"]] for image in images]
    return [Captioned(i, i, b"", of[1:], (), [of[0]]) for i, of in enumerate(texts)]


@pytest.mark.parametrize(
    "java, tokenizer, cider", [(False, "NLTK's Treebank tokenizer", 96.056), (True, "PTBTokenizer (Java)", 96.044)]
)
def test_coco_scores_are_those_recorded(shared_data, monkeypatch, java, tokenizer, cider):
    """The first caption of each photograph against its others."""
    if java and not captioning.java_runs():
        pytest.skip("needs Java, for PTBTokenizer")
    monkeypatch.setattr(captioning, "java_runs", lambda: java)
    found, how = captioning.scores(photographs(shared_data))
    assert how == f"words by {tokenizer}"
    assert found["CIDEr"] == pytest.approx(cider, abs=0.01)
    assert 0 < found["BLEU-4"] < found["BLEU-1"] < 100 and 0 < found["ROUGE-L"] < 100


def test_things_of_another_world_are_not_judged():
    assert meaning.scene_of({"things": [{"name": "dog"}]}) == () == meaning.scene_of({})
    thing = {"shape": "ring", "colour": "red", "size": "small", "texture": "plain", "row": 0, "column": 2}
    assert meaning.scene_of({"things": [thing]})[0].place == "in the top right corner"


def test_words_are_cut_without_marks():
    words, _ = captioning.words_of(["A man's dog (brown) isn't here, is it?"], java=False)
    assert words == ["a man 's dog brown is n't here is it"]


def test_a_missing_scorer_is_told_and_does_not_stop_a_run(monkeypatch):
    monkeypatch.setattr(captioning, "find_spec", lambda name: None)
    found, how = captioning.scores([])
    assert found == {} and "vlmo_ds[captioning]" in how
    with pytest.raises(RecipeError, match="METEOR needs pycocoevalcap"):
        captioning.scores([], ["METEOR"])


def test_captions_are_compared_by_their_words_alone():
    made = [
        Captioned(1, 1, b"", ["A man's dog.", "another"], (), ["a man ' s dog"]),
        Captioned("b", 2, b"", ["a cat"], (), ["a dog"]),
    ]
    found, _ = captioning.overall(made)
    assert found["word by word one of its own"] == 50
    assert json.loads(captioning.server_json(made)) == [
        {"image_id": 1, "caption": "a man ' s dog"},
        {"image_id": "b", "caption": "a dog"},
    ]
