"""Held-out sets are read before training as their evaluations read them afterwards."""

import json

import pytest
import torch
from conftest import tiny_recipe
from data.files import jpeg, png, write_tar
from families.vlmo.tiny import tiny_model

from vlmo_ds.config import VQAConfig
from vlmo_ds.data.storage import DataError
from vlmo_ds.data.tokenizer import train_tokenizer
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import vqa
from vlmo_ds.evaluation.held_out import check_held_out
from vlmo_ds.recipe_file import parse_recipe

WORDS = train_tokenizer([f"is {i} a word" for i in range(30)], 50)
QUESTION = {"question": "is it red?", "question_id": 1, "answers": ["yes"] * 10}
SENTENCE = {"sentence": "both are red", "label": "True", "identifier": "dev-0-0-0"}
TASKS = {"retrieval": {"itc": None}, "vqa": {"vqa": None}, "nlvr2": {"nlvr2": None}}


def members(setting: str, key: str, changed: dict | None = None) -> dict[str, bytes]:
    """A sample of the kind that an evaluation reads. changed: other members, by extension, or None for none."""
    fields = {
        "retrieval": {"jpg": jpeg(), "json": {"caption": f"picture {key}"}},
        "vqa": {"jpg": jpeg(), "json": {"questions": [QUESTION]}},
        "nlvr2": {"0.png": png(), "1.png": png(), "json": {"sentences": [SENTENCE]}},
    }[setting] | (changed or {})
    found = {f"{key}.{name}": value for name, value in fields.items() if value is not None}
    return {name: v if isinstance(v, bytes) else json.dumps(v).encode() for name, v in found.items()}


def recipe_for(setting: str, folder, **more):
    recipe = tiny_recipe(folder)
    recipe["stages"] = recipe["stages"][2:]
    recipe["stages"][0] |= {"tasks": TASKS[setting], "init": {}}
    del recipe["retrieval"]
    return parse_recipe(recipe | {setting: {"shards": [str(folder / "test.tar")], **more}}, "r")


CUT = jpeg((90, 90))[:-300]


@pytest.mark.parametrize(
    "setting, changed, reason",
    [
        ("retrieval", {"jpg": CUT}, "not a readable image"),
        ("retrieval", {"jpg": None}, "has no image"),
        ("retrieval", {"json": {"caption": None}}, "has an empty caption"),
        ("retrieval", {"json": {"caption": 5}}, "has caption 5"),
        ("vqa", {"jpg": CUT}, "not a readable image"),
        ("vqa", {"json": {"questions": []}}, "lists no 'questions'"),
        ("vqa", {"json": {"questions": [QUESTION | {"question": None}]}}, "one of its questions has no 'question'"),
        ("vqa", {"json": {"questions": [QUESTION | {"answers": ["yes", 1]}]}}, "question 1: answers"),
        ("nlvr2", {"1.png": CUT}, "not a readable image"),
        ("nlvr2", {"1.png": None}, "has no image"),
        ("nlvr2", {"json": {"sentences": [SENTENCE | {"label": "maybe"}]}}, "label 'maybe'"),
    ],
)
def test_a_bad_sample_is_named(setting, changed, reason, tmp_path):
    samples = {k: v for i in range(9) for k, v in members(setting, f"{i}", changed if i == 7 else None).items()}
    write_tar(tmp_path / "test.tar", samples)
    with pytest.raises(DataError, match=rf"^{setting}: .*test.tar:7.*{reason}"):
        check_held_out(recipe_for(setting, tmp_path), Collector())


@pytest.mark.parametrize("setting", TASKS)
def test_what_is_not_read_is_not_checked(setting, tmp_path):
    write_tar(tmp_path / "test.tar", {k: v for i in range(3) for k, v in members(setting, f"{i}").items()})
    check_held_out(recipe_for(setting, tmp_path), Collector())
    other = "vqa" if setting == "retrieval" else "retrieval"
    recipe = recipe_for(setting, tmp_path).model_copy(update={other: getattr(recipe_for(other, tmp_path), other)})
    check_held_out(recipe, Collector())  # of an evaluation that the last stage has no task for


def test_folds_that_do_not_divide_the_images(tmp_path):
    write_tar(tmp_path / "test.tar", {k: v for i in range(5) for k, v in members("retrieval", f"{i}").items()})
    with pytest.raises(DataError, match="retrieval.folds is 2, which does not divide 5 images"):
        check_held_out(recipe_for("retrieval", tmp_path, folds=2), Collector())
    check_held_out(recipe_for("retrieval", tmp_path, folds=2, max_images=4), Collector())


def test_an_evaluation_by_itself_names_it_in_one_line(tmp_path):
    samples = members("vqa", "0") | members("vqa", "1", {"jpg": CUT})
    write_tar(tmp_path / "test.tar", samples)
    model = tiny_model({"vqa": 1.0}, torch.float32, vqav2_label_size=2)
    for workers in (0, 1):
        config = VQAConfig(shards=[str(tmp_path / "test.tar")], workers=workers)
        with pytest.raises(DataError, match="test.tar:1: not a readable image") as caught:
            vqa.evaluate(model, config, ["yes", "no"], WORDS, Collector())
        assert "Traceback" not in str(caught.value)
