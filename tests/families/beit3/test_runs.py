"""BEiT-3's runs on real processes: the same losses on any ranks and under any ZeRO stage, with stochastic depth and without."""

import json
import random
import shutil

import pytest
import torch
from conftest import call, refused, run_ranks, write_yaml
from data.files import jpeg, write_tar
from families.beit3.tiny import SETTINGS, masked_beit3, tiny_beit3
from faults.runs import killed_at
from safetensors.torch import load_file, save_file
from training import gathers

from vlmo_ds.config import RecipeError
from vlmo_ds.data.tokenizer import train_tokenizer
from vlmo_ds.manifest import MANIFEST
from vlmo_ds.recipe_file import parse_recipe


def run(folder, recipe: dict, ranks: int, zero: int):
    """The run's folder."""
    run_ranks(command_of(folder, recipe, zero), ranks)
    return folder / "run"


def command_of(folder, recipe: dict, zero: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    file = write_yaml(folder / "recipe.yaml", recipe)
    spread = {"stage": zero, **({"stage3_param_persistence_threshold": 200} if zero == 3 else {})}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": spread, "steps_per_print": 10**9}))
    command = ["train_ds.py", "--recipe", str(file), "--deepspeed_config", str(folder / "ds.json")]
    return [*command, "--output_dir", str(folder / "run")]


def rows_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name.startswith("loss/")} for row in rows_of(run)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, synthetic):
    return run(tmp_path_factory.mktemp("beit3"), tiny_beit3(synthetic), 1, 0)


def test_a_run_of_two_stages_and_what_is_measured_after_it(reference):
    found = losses(reference)
    assert [sorted(row) for row in found] == [["loss/itc", "loss/itm"]] * 4 + [["loss/captioning"]] * 4
    assert json.loads((reference / "captioning.json").read_text())
    recipe = (reference / "recipe.yaml").read_text()
    assert "mask_word: 4" in recipe  # the tokenizer's


@pytest.mark.parametrize("ranks, zero", [(2, 3), pytest.param(2, 2, marks=pytest.mark.long)])
def test_losses_do_not_depend_on_ranks_or_zero(tmp_path, synthetic, reference, ranks, zero):
    recipe = tiny_beit3(synthetic, captioning=None)
    for ours, theirs in zip(losses(run(tmp_path, recipe, ranks, zero)), losses(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_stochastic_depth_that_leaves_experts_without_sequences_stops_no_rank(tmp_path, synthetic):
    recipe = tiny_beit3(synthetic, captioning=None)
    recipe["model"]["drop_path_rate"] = 0.9
    assert len(losses(run(tmp_path, recipe, 2, 3))) == 8


# ---- masked data modelling: images, texts and pairs in one step ----


@pytest.fixture(scope="module")
def image_tokenizer(tmp_path_factory, synthetic):
    """A tokenizer of images, of one step, whose teacher is a tiny run."""
    from families.vqkd.tiny import image_stage, tiny_tokenizer
    from families.vqkd.tiny import run as trained

    teacher = trained(tmp_path_factory.mktemp("teacher"), image_stage(synthetic), 1, 0, "--stages", "image")
    return trained(tmp_path_factory.mktemp("tokenizer"), tiny_tokenizer(synthetic, teacher, steps=1), 1, 0)


@pytest.fixture(scope="module")
def masked(tmp_path_factory, synthetic, image_tokenizer):
    return run(tmp_path_factory.mktemp("masked"), masked_beit3(synthetic, image_tokenizer), 1, 0)


def test_a_step_reads_all_three_kinds_of_data(masked):
    rows = rows_of(masked)
    assert all({"loss/mim", "loss/textmlm", "loss/mvlm"} <= row.keys() for row in rows)
    last = rows[-1]  # 6 steps of 8, 16 and 4 samples, of 96 each
    assert (
        last["data/epoch/data"] == 0.5
        and last["data/epoch/images/data"] == 1.0
        and last["data/epoch/texts/data"] == 0.25
    )
    assert json.loads((masked / "data.json").read_text()).keys() == {"pretrain", "pretrain/images", "pretrain/texts"}


def test_zero3_gathers_each_weight_once_in_a_step_over_all_three_kinds_of_data(tmp_path, synthetic, image_tokenizer):
    recipe = masked_beit3(synthetic, image_tokenizer)
    recipe["stages"][0]["steps"] = 3
    of_run = command_of(tmp_path, recipe, 3)
    (tmp_path / "ds.json").write_text(json.dumps({**gathers.GATHERED_ALWAYS, "steps_per_print": 10**9}))
    run_ranks(gathers.command(tmp_path, "vlmo_ds.families.beit3.model:BEiT3", of_run[1:]), 2)
    counts = json.loads((tmp_path / "gathers.json").read_text())
    heads = {f"{head}.{part}" for head in ("mim_head", "mlm_head") for part in ("weight", "bias")}  # alone and of pairs
    assert {name: times for name, times in counts.items() if times != 1} == dict.fromkeys(heads, 2)
    blocks = SETTINGS["depth"] * 2 * (4 + 2 + 4) * 2  # of each expert 4 + 2 linear layers and 4 norms, weight and bias
    assert sum(".layers." in name for name in counts) == blocks


SHORT = ((2, 3),)


@pytest.mark.parametrize("ranks, zero", [
    pytest.param(r, z, marks=() if (r, z) in SHORT else pytest.mark.long)
    for r in (1, 2, 4) for z in (0, 1, 2, 3) if (r, z) != (1, 0)
])  # fmt: skip
def test_masked_data_modelling_does_not_depend_on_ranks_or_zero(
    tmp_path, synthetic, image_tokenizer, masked, ranks, zero
):
    """Each rank has all three kinds in every step."""
    recipe = masked_beit3(synthetic, image_tokenizer)
    for ours, theirs in zip(losses(run(tmp_path, recipe, ranks, zero)), losses(masked), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.long)])
def test_a_killed_run_goes_on_to_the_last_digit(tmp_path, synthetic, image_tokenizer, kills):
    recipe = masked_beit3(synthetic, image_tokenizer)
    recipe["stages"][0] |= {"steps": 24, "checkpoint_every": 4}
    whole = run(tmp_path / "whole", recipe, 2, 3)
    command = command_of(tmp_path / "killed", recipe, 3)
    moments = random.Random(kills)
    for number in range(kills):
        metrics = tmp_path / "killed" / "run" / "metrics.jsonl"
        killed_at(command, 2, metrics, 8 + 14 * number // kills, 0.3 * moments.random())
    assert rows_of(run(tmp_path / "killed", recipe, 2, 3)) == rows_of(whole)


@pytest.mark.parametrize("changes, words", [
    ({"streams": {"images": {}}}, "streams.texts is missing, the data that textmlm reads"),
    ({"streams": {}}, "is missing, the data that"),
    ({"streams": {"images": {}, "texts": {}, "text": {}}}, r"streams.text is read by none of .*did you mean 'texts'"),
    ({"tasks": {"mim": None, "textmlm": None}}, "data is read by none of mim, textmlm"),
    ({"micro_batch_size": 8, "streams": {"images": {}, "texts": {"global_batch_size": 3}}, "global_batch_size": 16}, "does not go along with"),
    ({"streams": {"images": {"global_batch_size": 0}, "texts": {}}}, "greater than 0"),
])  # fmt: skip
def test_streams_that_do_not_fit_are_told_in_a_line(synthetic, tmp_path, changes, words):
    recipe = masked_beit3(synthetic, tmp_path)
    stage = recipe["stages"][0]
    if "streams" in changes:
        one = stage["streams"]["texts"]
        changes = {**changes, "streams": {name: {**one, **more} for name, more in changes["streams"].items()}}
    stage |= changes
    with pytest.raises(RecipeError, match=words) as told:
        parse_recipe(recipe, "r")
    assert str(told.value).count("\n") == 1


def test_a_mask_word_that_is_not_the_tokenizers_ends_the_start_in_one_line(tmp_path, synthetic):
    recipe = masked_beit3(synthetic, tmp_path)
    recipe["model"]["mask_word"] = 9999
    assert "error: model.mask_word is 9999, and the tokenizer's mask word 4: take the tokenizer's (null)" in refused(
        command_of(tmp_path, recipe, 0)
    )


def test_a_run_does_not_go_on_with_another_tokenizer_of_images(tmp_path, synthetic, image_tokenizer):
    copied = tmp_path / "tokenizer"
    shutil.copytree(image_tokenizer, copied)
    recipe = masked_beit3(synthetic, copied)
    recipe["stages"][0] |= {"steps": 2, "checkpoint_every": 1}
    run(tmp_path, recipe, 1, 0)
    recipe["stages"][0]["steps"] = 4
    final = copied / "checkpoints" / "tokenizer" / "final"
    weights = load_file(final / "model.safetensors")
    weights["quantize.embedding.weight"].neg_()
    save_file(weights, final / "model.safetensors")
    (final / MANIFEST).unlink()  # which would tell of it
    assert "model.visual_tokenizer: what " in refused(command_of(tmp_path, recipe, 0))


def test_data_is_that_of_the_kind_which_has_no_stream(tmp_path, synthetic, image_tokenizer):
    """Images and texts without pairs: `data` is the images'."""
    recipe = masked_beit3(synthetic, image_tokenizer)
    stage = recipe["stages"][0]
    stage |= {"tasks": {"mim": None, "textmlm": None}, "streams": {"texts": stage["streams"]["texts"]}, "steps": 2}
    parts = parse_recipe(recipe, "r").stages[0].parts
    assert {name: (list(part.tasks), part.global_batch_size) for name, part in parts.items()} == {
        "images": (["mim"], 8),
        "texts": (["textmlm"], 4),
    }
    assert [sorted(row) for row in losses(run(tmp_path, recipe, 2, 3))] == [["loss/mim", "loss/textmlm"]] * 2


def test_one_kind_of_data_needs_no_stream(tmp_path, synthetic, image_tokenizer):
    recipe = masked_beit3(synthetic, image_tokenizer)
    recipe["stages"][0] |= {"tasks": {"textmlm": None}, "streams": {}, "steps": 1}
    assert [sorted(row) for row in losses(run(tmp_path, recipe, 1, 0))] == [["loss/textmlm"]]


# ---- classes of images ----


def labelled(folder, labels: list[int]) -> str:
    """A shard of plain pictures, whose colour is their class; half of them have it in .json, the others in .cls."""
    members = {}
    for i, label in enumerate(labels):
        colour = [40 + i % 5, 40 + i % 7, 40]
        colour[label % 3] = 200
        of_class = {"cls": str(label).encode()} if i % 2 else {"json": json.dumps({"label": label}).encode()}
        members |= {f"{i:03d}.jpg": jpeg((32, 32), tuple(colour))}
        members |= {f"{i:03d}.{kind}": content for kind, content in of_class.items()}
    folder.mkdir(exist_ok=True)
    write_tar(folder / "labelled.tar", members)
    return str(folder / "labelled.tar")


def classes_of(shards: str, **stage) -> dict:
    return {
        "name": "tiny",
        "model": {**SETTINGS, "max_source_positions": 42, "num_classes": 3},
        "stages": [
            {
                "name": "classes",
                "tasks": {"classification": None},
                "data": {"shards": [shards], "transform": "square_transform", "lanes": 8},
                "global_batch_size": 16,
                "steps": 12,
                "log_images_every": 0,
                "optimizer": {"lr": 3e-3},
                **stage,
            }
        ],
        "classification": {"shards": [shards], "batch_size": 16},
    }


def test_images_are_classified_by_the_whole_model_and_by_a_linear_layer_alone(tmp_path):
    shards = labelled(tmp_path / "data", [i % 3 for i in range(48)])
    whole = run(tmp_path / "whole", classes_of(shards), 2, 3)
    found = json.loads((whole / "classification.json").read_text())
    assert found == {"top-1": 100.0, "top-5": 100.0, "images": 48.0}
    call("vlmo_ds.evaluation.classification", whole, "--output", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == found

    weights = whole / "checkpoints" / "classes" / "final"
    fresh = {"weights": str(weights), "fresh": ["fc_norm.*", "head.*"]}
    probe = run(tmp_path / "probe", classes_of(shards, trainable=["fc_norm.*", "head.*"], init=fresh), 1, 0)
    before, after = (load_file(f / "model.safetensors") for f in (weights, probe / "checkpoints/classes/final"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert json.loads((probe / "classification.json").read_text())["top-1"] == 100.0


@pytest.mark.parametrize("label, held_out, classes, words", [
    (7, 1, 3, "labelled.tar:000: its label in .json or .cls is 7; accepted: a number from 0 to 2 (model.num_classes)"),
    (1, 7, 3, "error: classification: "),
    (1, 1, 0, "num_classes is 0, and stages.classes learns classes of images: take as many as the labels number"),
])  # fmt: skip
def test_classes_that_do_not_fit_are_told_in_a_line(tmp_path, label, held_out, classes, words):
    recipe = classes_of(labelled(tmp_path / "data", [label] * 16))
    recipe["classification"]["shards"] = [labelled(tmp_path / "held-out", [held_out] * 4)]
    recipe["model"]["num_classes"] = classes
    assert words in refused(command_of(tmp_path, recipe, 0))


def test_a_vocabulary_of_special_words_alone_is_refused_where_texts_are_read(tmp_path, synthetic):
    recipe = tiny_beit3(synthetic, tokenizer={"name": str(tmp_path / "words")})
    train_tokenizer((), 200).save_pretrained(tmp_path / "words")
    assert "has special words alone" in refused(command_of(tmp_path, recipe, 0))
