"""Tokenizers on real processes: the same codebook on any ranks and under any ZeRO stage, killed runs go on; tokens made before training
are those made in it, and bad ones are told of at once."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import call, refused
from data.files import jpeg, write_tar
from families.vqkd.tiny import command_of, image_stage, run, tiny_tokenizer
from faults.runs import killed_at
from safetensors.torch import load_file

from vlmo_ds.config import RecipeError
from vlmo_ds.data import visual_tokens
from vlmo_ds.data.shards import list_shards
from vlmo_ds.data.storage import DataError
from vlmo_ds.families import finished
from vlmo_ds.families.finished import find_stage
from vlmo_ds.recipe_file import parse_recipe
from vlmo_ds.weights_file import read_weights

IMAGE = ["--stages", "image"]
TOKENS = {"mim_target": "tokens", "num_visual_tokens": 12}


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder, stage="tokenizer") -> dict:
    return load_file(folder / "checkpoints" / stage / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, synthetic):
    return run(tmp_path_factory.mktemp("teacher"), image_stage(synthetic), 1, 0, *IMAGE)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, synthetic, teacher):
    return run(tmp_path_factory.mktemp("tokenizer"), tiny_tokenizer(synthetic, teacher, replace_below=0.3), 1, 0)


def test_the_report_shows_the_codes(reference):
    assert (reference / "codes.png").stat().st_size > 1000
    assert "<h2>Codes</h2>" in (reference / "report" / "index.html").read_text()


SHORT = ((2, 3),)


@pytest.mark.parametrize("ranks, zero", [
    pytest.param(r, z, marks=() if (r, z) in SHORT else pytest.mark.long)
    for r in (1, 2, 4) for z in (0, 1, 2, 3) if (r, z) != (1, 0)
])  # fmt: skip
def test_losses_and_codebook_do_not_depend_on_ranks_or_zero(tmp_path, synthetic, teacher, reference, ranks, zero):
    """With a micro-batch of 2 as well: a step's vectors are those of all micro-batches and all ranks."""
    recipe = tiny_tokenizer(synthetic, teacher, replace_below=0.3)
    recipe["stages"][0]["micro_batch_size"] = 2
    folder = run(tmp_path, recipe, ranks, zero)
    for ours, theirs in zip(rows_of(folder), rows_of(reference), strict=True):
        for name in ("loss/vqkd", "vqkd/code_use", "vqkd/perplexity", "vqkd/dead_codes"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (ours["step"], name)
    ours, theirs = weights_of(folder), weights_of(reference)
    assert ours.keys() == theirs.keys() and float(theirs["quantize.embedding.initted"]) == 1
    for name in [name for name in theirs if name.startswith("quantize.")]:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
    assert rows_of(reference)[0]["vqkd/code_use"] == 1  # by k-means


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.long)])
def test_a_killed_run_goes_on_to_the_last_digit(tmp_path, synthetic, teacher, kills):
    """In half precision, whose codebook stays in float32."""
    recipe = tiny_tokenizer(synthetic, teacher, steps=24, replace_below=0.3)
    recipe["stages"][0]["checkpoint_every"] = 4
    half = {"bf16": {"enabled": True}}
    whole = run(tmp_path / "whole", recipe, 2, 2, **half)
    command = command_of(tmp_path / "killed", recipe, 2, **half)
    moments = random.Random(kills)
    for number in range(kills):
        killed_at(
            command, 2, tmp_path / "killed" / "run" / "metrics.jsonl", 8 + 14 * number // kills, 0.3 * moments.random()
        )
    killed = run(tmp_path / "killed", recipe, 2, 2, **half)
    assert rows_of(whole) == rows_of(killed)
    one, other = weights_of(whole), weights_of(killed)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    codes = one["quantize.embedding.weight"]
    assert codes.dtype == torch.float32
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(12), rtol=1e-6, atol=1e-6)  # bfloat16 would leave 4e-3


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, synthetic, reference):
    folder = tmp_path_factory.mktemp("tokens")
    done = call("vlmo_ds.evaluation.tokenize", reference, "--shards", synthetic / "train", "--output", folder)
    assert "tokens of 96 images in 3 shards" in done.stdout and (folder / "codes.png").stat().st_size > 1000
    return folder


def test_tokens_made_before_are_those_made_in_training(tmp_path, synthetic, reference, tokens):
    recipe = image_stage(synthetic, visual_tokenizer=str(reference), mim_early_layer=1, **TOKENS)
    live = rows_of(run(tmp_path / "live", recipe, 2, 3, *IMAGE))
    recipe["stages"][0]["data"]["visual_tokens"] = str(tokens)
    assert rows_of(run(tmp_path / "made", recipe, 2, 3, *IMAGE)) == live
    assert {"mim/accuracy", "mim/early_accuracy", "loss/mim"} <= live[-1].keys()
    assert live[0]["loss/mim"] == pytest.approx(2 * np.log(12), rel=0.1)  # of two predictions that know nothing


def test_tokens_that_are_there_stay(synthetic, reference, teacher, tokens, tmp_path):
    files = {file: file.stat().st_mtime_ns for file in tokens.glob("*.safetensors")}
    call("vlmo_ds.evaluation.tokenize", reference, "--shards", synthetic / "train", "--output", tokens)
    assert files == {file: file.stat().st_mtime_ns for file in tokens.glob("*.safetensors")} and len(files) == 3
    other = run(tmp_path, tiny_tokenizer(synthetic, teacher, steps=1), 1, 0)
    done = call("vlmo_ds.evaluation.tokenize", other, "--shards", synthetic / "train", "--output", tokens, code=2)
    assert done.stderr.count("\n") == 1 and "is there already, and of another tokenizer" in done.stderr


def test_weights_that_are_not_of_the_recipes_model_are_told_of_in_a_line(reference, monkeypatch):
    _, recipe, folder = find_stage(reference)
    weights = read_weights(folder)
    del weights["quantize.embedding.initted"]
    monkeypatch.setattr(finished, "read_weights", lambda folder: weights)
    with pytest.raises(RecipeError, match=r'final: its weights are not .*"quantize.embedding.initted"') as told:
        finished.load_model(recipe, folder)
    assert "\n" not in str(told.value)


def test_what_cannot_get_tokens_is_told_of(tmp_path, synthetic, reference, tokens):
    def tokenized(shards, output, code: int = 0):
        return call("vlmo_ds.evaluation.tokenize", reference, "--shards", shards, "--output", output, code=code)

    members = {f"{i}.jpg": jpeg((32, 32), (i, 90, 9)) for i in range(6)} | {"2.json": b"{", "4.jpg": b"no picture"}
    write_tar(tmp_path / "train-000000.tar", members)
    done = tokenized(tmp_path / "train-000000.tar", tmp_path / "some")
    assert done.stdout.count("it has no tokens") == 2 and "tokens of 5 images" in done.stdout
    assert "and of another shard" in tokenized(tmp_path / "train-000000.tar", tokens, 2).stderr
    for shards, output, words in (
        (synthetic / "text", tmp_path / "none", "text-000000.tar has no image that can be read"),
        (synthetic / "train", tmp_path / "train-000000.tar", "cannot be a folder for the tokens: File exists"),
    ):
        done = tokenized(shards, output, 2)
        assert "Traceback" not in done.stderr and words in done.stderr, done.stderr
    assert not list((tmp_path / "none").glob("*.safetensors"))


def test_sets_that_number_their_pictures_alike_have_tokens_of_their_own(synthetic, tokens):
    """The first shard's samples, with pictures of the second."""
    one, other, *_ = list_shards([str(synthetic / "train")])
    found = visual_tokens.TokensOfShard(visual_tokens.file_of(tokens, one))
    raw, another = one.read(3), other.read(3)
    assert found.of(3, raw).shape == (16,) and found.fits(one) and not found.fits(other)
    raw.fields = {**raw.fields, **{name: data for name, data in another.fields.items() if name != "json"}}
    with pytest.raises(DataError, match="was made of another shard of this name"):
        found.of(3, raw)


def not_begun(folder, recipe) -> str:
    """What is told of a run that cannot start, and has not."""
    told = refused([*command_of(folder, recipe, 0), *IMAGE])
    assert not (folder / "run" / "metrics.jsonl").exists()
    return told


@pytest.mark.parametrize("model, data, words", [
    ({"num_visual_tokens": 0}, {}, "num_visual_tokens is 0, and stages.image predicts them: take the number"),
    ({}, {}, "stages.image predicts visual tokens, and its images have none: name a tokenizer's finished run"),
    ({"visual_tokenizer": "nowhere"}, {}, "model.visual_tokenizer: nowhere is no run: it has no recipe.yaml"),
    ({"visual_tokenizer": "REFERENCE", "num_visual_tokens": 11}, {}, "has 12 codes: take 12"),
    ({"visual_tokenizer": "TEACHER"}, {}, "no task of vlmo trains this"),
    ({"visual_tokenizer": "REFERENCE", "image_size": 48}, {}, "speaks of 4 x 4 patches of an image, the model has 6 x 6"),
    ({"num_visual_tokens": 11}, {"visual_tokens": "TOKENS"}, "are of 12 codes, and model.num_visual_tokens is 11: take 12"),
    ({"image_size": 48}, {"visual_tokens": "TOKENS"}, "tokens of 32 images of 16 patches, and"),
    ({"image_size": 64, "patch_size": 16}, {"visual_tokens": "TOKENS"}, "was made of images of 32 pixels a side, and image_size is 64"),
    ({}, {"visual_tokens": "TOKENS", "transform": "crop_flip"}, "whose crops have other tokens; accepted: square_transform"),
    ({}, {"visual_tokens": "/none"}, "/none/train-000000.tokens.safetensors does not exist; `vlmo tokenize` makes it"),
    ({"mim_target": "pixels"}, {"visual_tokens": "TOKENS"}, "is given, and mim_target is pixels"),
    ({"mim_early_layer": 3}, {"visual_tokens": "TOKENS"}, "mim_early_layer is 3, the model has 3 blocks: take 1 to 2, or 0"),
])  # fmt: skip
def test_tokens_that_do_not_fit_end_the_start_in_one_line(
    tmp_path, synthetic, reference, teacher, tokens, model, data, words
):
    places = {"REFERENCE": str(reference), "TEACHER": str(teacher), "TOKENS": str(tokens)}
    recipe = image_stage(synthetic, **TOKENS | {name: places.get(value, value) for name, value in model.items()})
    recipe["stages"][0]["data"] |= {name: places.get(value, value) for name, value in data.items()}
    assert words in not_begun(tmp_path, recipe)


def test_tokens_of_some_images_are_not_enough(synthetic):
    recipe = image_stage(synthetic, **TOKENS)
    sources = {"a": {"shards": ["-"], "visual_tokens": "x"}, "b": {"shards": ["-"]}}
    recipe["stages"][0]["data"] |= {"shards": [], "sources": sources}
    with pytest.raises(RecipeError, match="visual_tokens are there for a, and not for the other sources"):
        parse_recipe(recipe, "r")
    recipe = image_stage(synthetic, **TOKENS)
    recipe["stages"][0]["data"]["visual_tokens"] = "x"
    recipe["stages"][0] |= {"evaluate_every": 2, "evaluate": {"held_out": ["-"]}}
    with pytest.raises(RecipeError, match=r"stages.image.evaluate.held_out names shards, .* in model.visual_tokenizer"):
        parse_recipe(recipe, "r")


def test_tokens_of_another_tokenizer_or_of_other_shards_are_not_begun(tmp_path, synthetic, reference, teacher, tokens):
    other = run(tmp_path / "other", tiny_tokenizer(synthetic, teacher, steps=1), 1, 0)
    recipe = image_stage(synthetic, visual_tokenizer=str(other), **TOKENS)
    recipe["stages"][0]["data"]["visual_tokens"] = str(tokens)
    assert "make them again with it, or leave model.visual_tokenizer out" in not_begun(tmp_path / "digest", recipe)
    shards = list_shards([str(synthetic / "train")])
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for shard in shards:
        file = visual_tokens.file_of(tokens, shard)
        found = visual_tokens.TokensOfShard(file)
        keys = found.keys_N[::-1].copy()
        visual_tokens.write(wrong / file.name, found.handle.get_tensor("tokens"), keys, found.origin)
    recipe = image_stage(synthetic, **TOKENS)
    recipe["stages"][0]["data"]["visual_tokens"] = str(wrong)
    assert "was made of another shard of this name" in not_begun(tmp_path / "shards", recipe)
    file = next(wrong.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:200])
    assert "cannot be read as visual tokens" in not_begun(tmp_path / "cut", recipe)
