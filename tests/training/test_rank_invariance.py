"""The same recipe for 5 steps on 1, 2 and 4 real processes under ZeRO-0, 1, 2 and 3: same losses, same negatives."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_ranks, tiny_recipe, write_yaml

RANKS, ZERO = (1, 2, 4), (0, 1, 2, 3)


def worker(log: str, arguments: list[str]) -> None:
    """train_ds.py, with every drawn negative written down by its sample id."""
    from vlmo_ds.families.vlmo.model import VLMo
    from vlmo_ds.training.run import main

    draw = VLMo.negatives

    def recorded(model, batch, drawn):
        negatives, collector, sample_id = draw(model, batch, drawn), model.collector, batch["sample_id"]
        ids = collector.gather(sample_id)
        found = collector.gather(torch.stack((sample_id, ids[negatives.image_B], ids[negatives.text_B]), 1))
        if collector.rank == 0:
            with open(log, "a") as file:
                file.write(json.dumps(found.tolist()) + "\n")
        return negatives

    VLMo.negatives = recorded
    sys.exit(main(arguments))


def run(folder: Path, data: Path, ranks: int, stage: int) -> tuple[list[dict], list[str]]:
    recipe = tiny_recipe(data, retrieval=None)
    recipe["model"]["patch_dropout"] = 0.3
    for settings in recipe["stages"]:
        settings["steps"] = 5
    recipe_file = write_yaml(folder / "recipe.yaml", recipe)
    ds_config = folder / "ds.json"
    spread = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})  # small ones as well
    ds_config.write_text(json.dumps({"zero_optimization": spread, "steps_per_print": 10**9}))
    arguments = [
        "--recipe",
        str(recipe_file),
        "--deepspeed_config",
        str(ds_config),
        "--output_dir",
        str(folder / "run"),
    ]
    code = f"from training.test_rank_invariance import worker; worker({str(folder / 'negatives')!r}, {arguments!r})"
    run_ranks(["-c", code], ranks)
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return metrics, (folder / "negatives").read_text().splitlines()


@pytest.fixture(scope="module")
def reference(tmp_path_factory, synthetic):
    return run(tmp_path_factory.mktemp("reference"), synthetic, 1, 0)


LONG = ((1, 1), (1, 2), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3))  # as their neighbours


@pytest.mark.parametrize(
    "ranks, stage",
    [pytest.param(r, z, marks=pytest.mark.long if (r, z) in LONG else ()) for r in RANKS for z in ZERO],
)
def test_losses_and_negatives_do_not_depend_on_ranks_or_zero(tmp_path, synthetic, reference, ranks, stage):
    if (ranks, stage) == (1, 0):
        pytest.skip("this is the reference itself")
    metrics, negatives = run(tmp_path, synthetic, ranks, stage)
    expected, expected_negatives = reference
    assert len(metrics) == len(expected) == 15 and len(negatives) == 5
    for ours, theirs in zip(metrics, expected, strict=True):
        for key in theirs:
            if key.startswith("loss"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["stage"], ours["step"], key)
    assert negatives == expected_negatives
