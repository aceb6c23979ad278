"""Stages of one recipe at growing resolutions: each begins with the positions of the one before it, resampled."""

import json

import pytest
import torch
from conftest import ROOT, run_ranks, tiny_recipe
from safetensors.torch import load_file

from vlmo_ds.blocks.resample import resample_distances
from vlmo_ds.config import RecipeError
from vlmo_ds.families.finished import find_stage, load_model
from vlmo_ds.planning.plan import build
from vlmo_ds.recipe_file import load_recipe, parse_recipe

TABLE = "transformer.relative_position_bias_table"
SIDES = {"image": 3, "text": 3, "words": 3, "contrast": 4, "joint": 6}  # patches


def worker(folder: str, arguments: list[str]) -> None:
    """train_ds.py, with each stage's positions before its first step written down."""
    import sys

    from safetensors.torch import save_file

    from vlmo_ds.training import loop
    from vlmo_ds.training.run import main

    build_model = loop.build_model

    def built(recipe, stage, *args, **more):
        model = build_model(recipe, stage, *args, **more)
        tables = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("bias_table")}
        save_file(tables, f"{folder}/{stage.name}.safetensors")
        return model

    loop.build_model = built
    sys.exit(main(arguments))


def test_the_shipped_recipe_trains_and_resamples(tmp_path, synthetic):
    recipe = ROOT / "launch/recipes/quickstart_progressive.yaml"
    settings = ["stages.*.steps=2", "stages.*.global_batch_size=8", "stages.*.data.lanes=8", "retrieval.rerank=2"]
    settings += [f"stages.*.data.shards=[{synthetic}/train]", f"retrieval.shards=[{synthetic}/test]"]
    settings += [f"stages.text.data.shards=[{synthetic}/text]", "stages.joint.evaluate_every=2"]
    settings += [f"stages.joint.evaluate={{held_out: [{synthetic}/test], batches: 1}}", "check_bits=2"]
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, "steps_per_print": 10**9}))
    arguments = ["--recipe", str(recipe), "--deepspeed_config", str(tmp_path / "ds.json")]
    arguments += ["--output_dir", str(tmp_path / "run"), *settings]
    code = f"from training.test_progressive import worker; worker({str(tmp_path)!r}, {arguments!r})"
    output = run_ranks(["-c", code], 1)
    assert "3 x 3 to 4 x 4 patches" in output and "4 x 4 to 6 x 6 patches" in output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in records] == [name for name in SIDES for _ in range(2)]
    before = None
    for name, side in SIDES.items():
        (table,) = load_file(tmp_path / f"{name}.safetensors").values()
        patches = (2 * side - 1) ** 2
        if before is not None and before[1] != side:
            old, was = before
            wanted = resample_distances(old[: (2 * was - 1) ** 2], 2 * was - 1, 2 * side - 1)
            torch.testing.assert_close(table[:patches], wanted, rtol=0, atol=0)
            assert wanted.abs().max() > 0
            torch.testing.assert_close(
                table[patches:], old[(2 * was - 1) ** 2 :], rtol=0, atol=0
            )  # texts' and the class token's
        elif before is not None:
            assert torch.equal(table, before[0])
        final = load_file(tmp_path / "run" / "checkpoints" / name / "final" / "model.safetensors")
        before = next(value for key, value in final.items() if key.endswith("bias_table")), side
    _, resolved, folder = find_stage(tmp_path / "run", "encode_image")
    assert load_model(resolved, folder).config.image_size == 96
    _, resolved, folder = find_stage(tmp_path / "run" / "checkpoints" / "contrast" / "final")
    assert load_model(resolved, folder).config.image_size == 64
    assert json.loads((tmp_path / "run" / "retrieval.json").read_text())
    again = run_ranks(["train_ds.py", *arguments], 1)
    assert "joint: finished already" in again


def test_plan_counts_each_stage_at_its_resolution():
    recipe = load_recipe(ROOT / "launch/recipes/quickstart_progressive.yaml", ["model.vocab_size=500"])
    assert [build(recipe, stage).config.image_size for stage in recipe.stages] == [48, 48, 48, 64, 96]


@pytest.mark.parametrize(
    "size, words",
    [
        (33, "stages.joint.image_size is 33, which is not a multiple of patch_size 8: take 32 or 40"),
        (0, "stages.joint.image_size: "),
        ("large", "stages.joint.image_size: "),
    ],
)
def test_bad_sizes(tmp_path, size, words):
    recipe = tiny_recipe(tmp_path, retrieval=None)
    recipe["stages"][2]["image_size"] = size
    with pytest.raises(RecipeError) as told:
        parse_recipe(recipe, "x")
    assert words in str(told.value) and str(told.value).count("\n") == 1
