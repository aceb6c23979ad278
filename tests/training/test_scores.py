"""What is measured while a stage trains changes nothing of the training; the best weights are the best."""

import json
from pathlib import Path

import pytest
from conftest import call, run_ranks, start_ranks, tiny_recipe, write_yaml
from pydantic import ValidationError
from safetensors.torch import load_file

from vlmo_ds.config import RecipeError
from vlmo_ds.data.prepare.__main__ import main as prepare
from vlmo_ds.data.shards import list_shards
from vlmo_ds.families.finished import find_stage
from vlmo_ds.recipe_file import parse_recipe

BEST = "retrieval/text_to_image/itc/R@5"
HELD_OUT = {"loss", "loss/itc", "loss/itm", "loss/mlm", "itc/i2t_accuracy", "itm/accuracy"}


def recipe_of(data: Path, steps: int, every: int, **stage) -> dict:
    recipe = tiny_recipe(data)
    recipe["stages"] = recipe["stages"][-1:]
    recipe["stages"][0] |= {
        "steps": steps,
        "checkpoint_every": 5,
        "init": {"weights": "fresh"},
        "evaluate_every": every,
    }
    recipe["stages"][0] |= stage
    recipe["model"]["drop_path_rate"] = 0.2
    return recipe


def train(folder: Path, recipe: dict, ranks: int = 1, zero: int = 0) -> Path:
    file = write_yaml(folder / "recipe.yaml", recipe)
    spread = {"stage": zero} | ({"stage3_param_persistence_threshold": 0} if zero == 3 else {})
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": spread, "steps_per_print": 10**9}))
    options = ["--recipe", file, "--deepspeed_config", folder / "ds.json", "--output_dir", folder / "run"]
    run_ranks(["train_ds.py", *options], ranks)
    return folder / "run"


def lines_of(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


SHORT = ((1, 0), (2, 2), (2, 3))
ALL = [(ranks, zero) for ranks in (1, 2) for zero in (0, 2, 3)]


@pytest.mark.parametrize(
    "ranks, zero", [*SHORT, *(pytest.param(*one, marks=pytest.mark.long) for one in ALL if one not in SHORT)]
)
def test_training_goes_on_as_if_nothing_had_been_measured(tmp_path, synthetic, ranks, zero):
    evaluate = {"held_out": [str(synthetic / "test")], "batches": 2, "best": BEST}
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    recipe = recipe_of(synthetic, 15, 7, evaluate=evaluate, ema={"decay": 0.9})
    measured = train(tmp_path / "with", recipe, ranks, zero)
    recipe["stages"][0] |= {"evaluate_every": 0, "evaluate": {}}
    plain = train(tmp_path / "without", recipe, ranks, zero)
    assert (measured / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
    assert len(lines_of(measured, "metrics.jsonl")) == 15 and not (plain / "evaluations.jsonl").exists()
    for name in ("final", "ema"):
        ours, theirs = (load_file(run / "checkpoints/joint" / name / "model.safetensors") for run in (measured, plain))
        assert all(ours[key].equal(theirs[key]) for key in theirs)
    scores = lines_of(measured, "evaluations.jsonl")
    assert [record["step"] for record in scores] == [0, 7, 14, 15]
    assert {name.removeprefix("held_out/") for name in scores[0] if name.startswith("held_out")} >= HELD_OUT
    assert scores[0]["held_out/loss/mlm"] > scores[-1]["held_out/loss/mlm"]  # it learns
    final = json.loads((measured / "retrieval.json").read_text())["text_to_image"]["itc"]["R@5"]
    assert scores[-1][BEST] == pytest.approx(final)
    best = max(scores, key=lambda record: record[BEST])
    told = json.loads((measured / "checkpoints/joint/best/stage.json").read_text())
    assert told["step"] == best["step"] and told["score"] == {BEST: best[BEST]}
    call("vlmo_ds.evaluation.retrieval", measured, "--weights", "best", "--output", tmp_path / "best.json")
    assert json.loads((tmp_path / "best.json").read_text())["text_to_image"]["itc"]["R@5"] == pytest.approx(best[BEST])
    by_average = json.loads((measured / "retrieval_ema.json").read_text())
    call("vlmo_ds.evaluation.retrieval", measured, "--weights", "ema", "--output", tmp_path / "ema.json")
    assert json.loads((tmp_path / "ema.json").read_text()) == by_average
    assert "retrieval/text_to_image/itc" in (measured / "report/index.html").read_text()


def labelled(data: Path, folder: Path) -> Path:
    """Pictures of the synthetic world's test set as shards with classes, and beside them the file of the names."""
    shard = list_shards([str(data / "test")])[0]
    for row in range(8):
        place = folder / "pictures" / ("circle", "square")[row % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{row}.jpg").write_bytes(shard.read(row).image)
    assert prepare(["image_folder", "--root", str(folder / "pictures"), "--output", str(folder / "labelled")]) == 0
    (folder / "names.txt").write_text("circle\nsquare\n")
    return folder / "labelled"


def test_pictures_are_classified_while_a_stage_trains(tmp_path, synthetic):
    section = {"shards": [str(labelled(synthetic, tmp_path))], "classes": str(tmp_path / "names.txt"), "batch_size": 3}
    recipe = recipe_of(synthetic, 4, 2, evaluate={"best": "zero_shot/top-1"})
    run = train(tmp_path, recipe | {"retrieval": None, "zero_shot": section}, 2)
    scores = lines_of(run, "evaluations.jsonl")
    assert [record["step"] for record in scores] == [0, 2, 4] and {r["zero_shot/images"] for r in scores} == {8.0}
    final = json.loads((run / "zero_shot.json").read_text())
    assert final["top-1"] == scores[-1]["zero_shot/top-1"] and final["top-5"] == 100
    call("vlmo_ds.evaluation.zero_shot", run, "--output", tmp_path / "again.json")  # by the recipe's section
    assert json.loads((tmp_path / "again.json").read_text()) == final
    assert "zero_shot" in (run / "report/index.html").read_text()


def test_names_of_classes_that_cannot_be_read_are_told_at_the_start(tmp_path, synthetic):
    section = {"shards": [str(labelled(synthetic, tmp_path))], "classes": str(tmp_path / "none.txt")}
    file = write_yaml(tmp_path / "recipe.yaml", recipe_of(synthetic, 4, 2) | {"zero_shot": section})
    (done,) = start_ranks(["train_ds.py", "--recipe", str(file), "--output_dir", str(tmp_path / "run")], 1)
    output, _ = done.communicate(timeout=120)
    assert done.returncode == 2 and "none.txt, the class names: " in output and "Traceback" not in output


def test_deepspeeds_monitors_get_the_same_scalars(tmp_path, synthetic):
    recipe = recipe_of(synthetic, 3, 2, evaluate={"held_out": [str(synthetic / "test")]}) | {"retrieval": None}
    file = write_yaml(tmp_path / "recipe.yaml", recipe)
    ds_config = {
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "csv"},
        "steps_per_print": 10**9,
    }
    (tmp_path / "ds.json").write_text(json.dumps(ds_config))
    options = ["--recipe", file, "--deepspeed_config", tmp_path / "ds.json", "--output_dir", tmp_path / "run"]
    run_ranks(["train_ds.py", *options], 1)
    metrics, scores = (lines_of(tmp_path / "run", name) for name in ("metrics.jsonl", "evaluations.jsonl"))
    for records, name in ((metrics, "loss/itc"), (scores, "held_out/loss/itc")):
        rows = (tmp_path / "csv" / f"joint_{name.replace('/', '_')}.csv").read_text().splitlines()[1:]
        found = {int(step): float(value) for step, value in (row.split(",") for row in rows)}
        assert found == pytest.approx({record["step_of_run"]: record[name] for record in records})


def test_held_out_losses_do_not_depend_on_ranks(tmp_path, synthetic):
    evaluate = {"held_out": [str(synthetic / "test")], "weights": "ema"}
    found = []
    for ranks, zero in ((1, 0), (2, 3)):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        recipe = recipe_of(synthetic, 2, 1, evaluate=evaluate, ema={"decay": 0.5})
        recipe["model"]["drop_path_rate"] = 0.0
        found.append(lines_of(train(folder, recipe, ranks, zero), "evaluations.jsonl"))
    assert [len(records) for records in found] == [3, 3]
    for one, two in zip(*found, strict=True):
        assert one.keys() == two.keys()
        losses = [name for name in one if "/loss" in name]
        assert len(losses) == 4
        assert {name: one[name] for name in losses} == pytest.approx({name: two[name] for name in losses}, rel=1e-5)


def test_a_stage_ends_when_its_score_gets_no_better(tmp_path, synthetic, capfd):
    """A learning rate that destroys what was learnt: the loss is best at an early step."""
    evaluate = {"held_out": [str(synthetic / "test")], "best": "held_out/loss", "patience": 2}
    recipe = recipe_of(synthetic, 40, 2, evaluate=evaluate, optimizer={"lr": 5.0}, schedule={"warmup_steps": 0})
    run = train(tmp_path, recipe)
    scores = lines_of(run, "evaluations.jsonl")
    steps = len(lines_of(run, "metrics.jsonl"))
    best = min(scores, key=lambda record: record["held_out/loss"])
    assert steps == best["step"] + 4 == scores[-1]["step"] < 40
    stage = run / "checkpoints" / "joint"
    assert json.loads((stage / "best/stage.json").read_text())["step"] == best["step"]
    assert (stage / "final").is_dir() and (stage / f"step-{steps:08d}").is_dir()
    again = train(tmp_path, recipe)  # finished: nothing happens
    assert len(lines_of(again, "metrics.jsonl")) == steps
    for name in ("final", "retrieval.json"):  # killed between its last step and its result
        path = stage / name if name == "final" else run / name
        path.rename(path.with_name(f"was-{name}"))
    train(tmp_path, recipe)
    assert len(lines_of(run, "metrics.jsonl")) == steps and (stage / "final").is_dir()


def test_a_resumed_stage_measures_what_is_left(tmp_path, synthetic):
    evaluate = {"held_out": [str(synthetic / "test")], "best": "held_out/loss", "batches": 1}
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = train(tmp_path / "whole", recipe_of(synthetic, 8, 2, evaluate=evaluate, schedule={"name": "constant"}))
    part = recipe_of(synthetic, 5, 2, evaluate=evaluate, schedule={"name": "constant", "warmup_steps": 1})
    train(tmp_path / "parts", part)
    parts = train(tmp_path / "parts", part | {"stages": [part["stages"][0] | {"steps": 8}]})
    records = {record["step"]: record for record in lines_of(parts, "evaluations.jsonl")}
    assert sorted(records) == [0, 2, 4, 5, 6, 8] and len(lines_of(whole, "evaluations.jsonl")) == 5


def test_what_is_asked_wrongly_is_told_at_once(synthetic):
    def refused(**stage):
        with pytest.raises((RecipeError, ValidationError)) as error:
            parse_recipe(recipe_of(synthetic, 10, 5, **stage), "a recipe")
        return str(error.value)

    for decay in (0, 1, 1.5, -0.1):
        assert "ema.decay" in refused(ema={"decay": decay})
    assert "best is 'recall'; accepted: a metric of held_out, retrieval" in refused(evaluate={"best": "recall"})
    assert "held_out names no shards" in refused(evaluate={"best": "held_out/loss"})
    assert "patience is 3, for a better value of no metric" in refused(evaluate={"patience": 3})
    assert "has no moving average (ema)" in refused(evaluate={"weights": "ema"})
    recipe = recipe_of(synthetic, 10, 0, evaluate={"best": BEST})
    with pytest.raises(RecipeError, match="evaluate has settings, and evaluate_every is 0"):
        parse_recipe(recipe, "a recipe")
    recipe = recipe_of(synthetic, 10, 5) | {"retrieval": None}
    with pytest.raises(RecipeError, match="evaluate_every is 5, and there is nothing to measure"):
        parse_recipe(recipe, "a recipe")


def test_a_metric_that_is_not_measured_is_told_before_training(tmp_path, synthetic):
    recipe = recipe_of(synthetic, 5, 5, evaluate={"best": "retrieval/text_to_image/itc/R@7"})
    file = write_yaml(tmp_path / "recipe.yaml", recipe)
    done = call("vlmo_ds.training.command", "--recipe", file, "--output_dir", tmp_path / "run", code=2)
    assert "evaluate.best is 'retrieval/text_to_image/itc/R@7', which is not measured (did you mean" in done.stderr
    recipe["stages"][0]["evaluate"] = {"held_out": [str(synthetic / "test")]}
    recipe["stages"][0]["global_batch_size"] = 32
    write_yaml(file, recipe)
    done = call("vlmo_ds.training.command", "--recipe", file, "--output_dir", tmp_path / "run2", code=2)
    assert "evaluate.held_out has 24 samples, and a batch over all ranks 32" in done.stderr


def test_weights_that_a_run_has_not_are_named(tmp_path, synthetic):
    write_yaml(tmp_path / "recipe.yaml", parse_recipe(tiny_recipe(synthetic), "r").model_dump(mode="json"))
    with pytest.raises(RecipeError, match=r"no stage with a moving average \(ema\)"):
        find_stage(tmp_path, "encode_text", "ema")
    with pytest.raises(RecipeError, match="--weights best asks for other weights than"):
        find_stage(tmp_path / "checkpoints" / "joint" / "final", "encode_text", "best")


@pytest.mark.parametrize("name", ["ema", "best", "final"])
def test_a_run_may_be_called_as_a_folder_of_weights_is(tmp_path, synthetic, name):
    run = tmp_path / name
    (run / "checkpoints" / "joint" / "final").mkdir(parents=True)
    write_yaml(run / "recipe.yaml", parse_recipe(tiny_recipe(synthetic), "r").model_dump(mode="json"))
    assert find_stage(run, "encode_text")[2] == run / "checkpoints" / "joint" / "final"
    assert find_stage(run / "checkpoints" / "joint" / "final")[0] == run
