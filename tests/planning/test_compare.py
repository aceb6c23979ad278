"""A run beside recorded curves: inside, or outside since a step, with what usually causes it."""

import contextlib
import io
import json
import random
import shutil
import tarfile

import numpy as np
import pytest
from conftest import ROOT, run_ranks
from PIL import Image

from vlmo_ds import shipped
from vlmo_ds.data.prepare.__main__ import main as prepare
from vlmo_ds.planning.compare import LEAST_STEPS, POINTS, main, read_reference, stretches
from vlmo_ds.recipe_file import load_recipe

RECIPE = ROOT / "launch" / "recipes" / "quickstart.yaml"
STEPS = 96


def losses(stage, step, **wrong):
    """What a run that learns measures in a step, but for what is set to be wrong: factors by metric."""
    fall = np.exp(-step / 30)
    of = {
        "image": {"loss/mim": 0.7 + fall},
        "text": {"loss/textmlm": 3.4 + 2 * fall, "textmlm/accuracy": 0.2 - 0.2 * fall},
        "words": {"loss/mlm": 0.9 + 2 * fall},
        "contrast": {"loss/itc": 0.5 + 3 * fall, "loss/mlm": 1.0},
        "joint": {"loss/itc": 0.4 + fall, "loss/itm": 0.45 + 0.2 * fall},
    }[stage]
    return {name: value * wrong.get(f"{stage}:{name}", wrong.get(name, 1.0)) for name, value in of.items()} | {
        "lr": 1e-3 * wrong.get("lr", 1.0),
        "grad_norm": 1.0 + 5 * (step % 7 == 0),
    }


def make_run(folder, seed, *overrides, last=STEPS, **wrong):
    """A run's directory with the quickstart's recipe. last: steps of its last stage."""
    folder.mkdir()
    recipe = load_recipe(
        RECIPE, [f"seed={seed}", *(f"stages.{s.name}.steps={STEPS}" for s in load_recipe(RECIPE).stages), *overrides]
    )
    (folder / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    rng, lines, done = random.Random(seed), [], 0
    for stage in recipe.stages:
        for step in range(1, (last if stage is recipe.stages[-1] else STEPS) + 1):
            done += 1
            record = {
                name: value * rng.uniform(0.98, 1.02) if name.startswith("loss") else value
                for name, value in losses(stage.name, step, **wrong).items()
            }
            lines.append(
                json.dumps({"stage": stage.name, "step": step, "step_of_run": done, **record, "data/epoch": 0.1})
            )
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    runs = [make_run(folder / f"run{seed}", seed) for seed in range(3)]
    assert main([*map(str, runs), "--record", str(folder / "recorded.json")]) == 0
    return folder / "recorded.json"


def test_a_run_that_learns_is_inside(tmp_path, reference, capsys):
    run = make_run(tmp_path / "run", 7)
    assert main([str(run), str(reference)]) == 0
    out = capsys.readouterr().out
    assert f"{run} beside 3 runs recorded in {reference}: inside" in out and "usual cause" not in out
    assert main([str(run), *(str(reference.parent / f"run{seed}") for seed in range(3))]) == 0  # the runs themselves


def test_a_run_that_is_still_training(tmp_path, reference, capsys):
    run = make_run(tmp_path / "run", 7, last=40)
    assert main([str(run), str(reference)]) == 0
    assert "joint        inside    5 of 12 stretches" in capsys.readouterr().out
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n")
    assert main([str(run), str(reference)]) == 0
    out = capsys.readouterr().out
    assert "too short to say" in out and "image        not there yet  0 of 12" in out


@pytest.mark.parametrize(
    "wrong, overrides, said, cause",
    [
        ({"lr": 10}, ["stages.image.optimizer.lr=0.01"], "lr above since step 8: 0.01", r"the learning rate: in stage image it is 10 times the reference's (stages.image.optimizer.lr 0.01, in the reference 0.001)"),
        ({"loss/mim": 1.6, "loss/mlm": 2, "loss/itc": 3}, [], "loss/mim above since step 8", "the images: what reads images alone is outside, texts alone are inside"),
        ({"loss/textmlm": 1.5, "words:loss/mlm": 2}, [], "loss/textmlm above since step 8", "the texts: what reads texts alone is outside, images alone are inside"),
        ({"words:loss/mlm": 3, "loss/itc": 3}, [], "loss/mlm above since step 8", "the pairing: what reads an image and its text together is outside, what reads one of them is inside"),
        ({"loss/itc": 0.3, "loss/itm": 0.3}, [], "loss/itc below since step 8", "pairs are easier than the reference's"),
        ({"loss/mim": 1.6, "loss/textmlm": 1.6}, ["stages.image.optimizer.weight_decay=0.5"], "loss/mim above", "settings that differ: stages.image.optimizer.weight_decay 0.5, in the reference 0.05; if not these, what all stages share: optimizer, batch"),
    ],
    ids=["rate", "images", "texts", "pairing", "easy", "all"],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, reference, capsys, wrong, overrides, said, cause):
    run = make_run(tmp_path / "run", 7, *overrides, **wrong)
    assert main([str(run), str(reference)]) == 1
    out = capsys.readouterr().out
    assert "outside" in out.splitlines()[0] and said in out and f"usual cause: {cause}" in out


def test_since_when(tmp_path, reference, capsys):
    """The first of three stretches one after another; two of them are chance."""
    for last, inside in ((56, True), (72, False)):
        run = make_run(tmp_path / f"run{last}", 7)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for record in records:
            if record["stage"] == "words" and 40 < record["step"] <= last:
                record["loss/mlm"] *= 2
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        assert main([str(run), str(reference)]) == (0 if inside else 1)
        assert ("loss/mlm above since step 48" in capsys.readouterr().out) != inside


def test_learning_sooner_than_others_is_no_fault(tmp_path, reference, capsys):
    run = make_run(tmp_path / "run", 7)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["stage"] == "contrast" and record["step"] < 60:
            record["loss/itc"] = 0.9
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main([str(run), str(reference)]) == 0


def test_a_loss_that_is_no_number(tmp_path, reference, capsys):
    run = make_run(tmp_path / "run", 7)
    text = (run / "metrics.jsonl").read_text().replace('"loss/textmlm": ', '"loss/textmlm": null, "was": ', 30)
    (run / "metrics.jsonl").write_text(text)
    assert main([str(run), str(reference)]) == 1
    assert (
        "usual cause: loss/textmlm is not finite at step 1 of stage text: the learning rate" in capsys.readouterr().out
    )


def test_the_page_shows_the_band(tmp_path, reference):
    run = make_run(tmp_path / "run", 7)
    main([str(run), str(reference), "--page", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<polygon") == page.count("<polyline") == 18 and "contrast: loss/itc" in page


def bad(tmp_path, kind):
    path = tmp_path / "bad.json"
    good = {"recorded_by": "", "recipe": {}, "runs": [], "stages": {"a": {"steps": [8], "metrics": {"loss": [[1.0]]}}}}
    if kind == "no JSON":
        path.write_text("{")
    elif kind == "another JSON":
        path.write_text("[1]")
    elif kind == "steps":
        path.write_text(json.dumps(good | {"stages": {"a": {"steps": [8, 8], "metrics": {}}}}))
    elif kind == "lengths":
        path.write_text(json.dumps(good | {"stages": {"a": {"steps": [8, 16], "metrics": {"loss": [[1.0]]}}}}))
    elif kind == "folder":
        path.mkdir()
    elif kind == "recipe":
        path.write_text(json.dumps(good | {"recipe": {"model": {"depth": "x"}}}))
    return path


@pytest.mark.parametrize("kind", ["missing", "no JSON", "another JSON", "steps", "lengths", "folder", "recipe"])
def test_references_that_are_none(tmp_path, capsys, kind):
    run = make_run(tmp_path / "run", 7)
    assert main([str(run), str(bad(tmp_path, kind))]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "Traceback" not in err and str(tmp_path / "bad.json") in err


def test_runs_that_are_none(tmp_path, reference, capsys):
    run = make_run(tmp_path / "run", 7)
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert "empty/recipe.yaml does not exist" in capsys.readouterr().err
    shutil.copy(run / "recipe.yaml", tmp_path / "empty")
    assert main([str(tmp_path / "empty"), str(reference)]) == 2
    assert "is no run: it has no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    assert main([str(tmp_path / "empty"), str(reference)]) == 2
    assert "has no record of a step yet" in capsys.readouterr().err


def test_what_has_no_recorded_curves(tmp_path, capsys):
    run = make_run(tmp_path / "run", 7, "stages.text=null")
    assert main([str(run)]) == 2
    assert (
        "no recorded curves have the stages and tasks of recipe 'quickstart'; there are some of "
        in capsys.readouterr().err
    )


def test_runs_of_two_recipes_make_no_band(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", 1), make_run(tmp_path / "b", 2, "model.depth=6")]
    assert main([*map(str, runs), "--record", str(tmp_path / "r.json")]) == 2
    assert "b is no run of the recipe of " in capsys.readouterr().err and not (tmp_path / "r.json").exists()


def test_stretches():
    assert stretches(3) == [3] and stretches(80) == list(range(8, 81, 8))
    assert len(stretches(100_000)) == POINTS and stretches(20) == [LEAST_STEPS, 2 * LEAST_STEPS]


@pytest.mark.parametrize("name", shipped.names("references"))
def test_curves_that_come_with_the_project(name):
    """Small, of a recipe as it is shipped, and from several seeds."""
    path = shipped.find("references", name)
    reference = read_reference(path)
    assert path.stat().st_size < 100_000 and len({run["seed"] for run in reference.runs}) >= 3
    recipe = load_recipe(shipped.find("recipes", name))
    assert list(reference.stages) == [stage.name for stage in recipe.stages]
    assert [
        of.steps[-1] + of.steps[0] > stage.steps
        for of, stage in zip(reference.stages.values(), recipe.stages, strict=True)
    ]


# ---- the quickstart itself, made wrong in three ways ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The quickstart's data, and two copies: with the captions of other scenes, and with noise in place of images."""
    folder = tmp_path_factory.mktemp("world")
    assert prepare(["synthetic", "--output", str(folder / "synthetic")]) == 0
    samples = []
    for path in sorted((folder / "synthetic" / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            samples += [(path.name, member.name, tar.extractfile(member).read()) for member in tar]
    shards = dict.fromkeys(shard for shard, _, _ in samples)
    captions = [json.loads(data)["captions"] for _, name, data in samples if name.endswith(".json")]
    random.Random(0).shuffle(captions)
    rng = np.random.default_rng(0)
    for kind in ("shuffled", "noise"):
        (folder / kind).mkdir()
        others = iter(captions)
        with contextlib.ExitStack() as opened:
            tars = {name: opened.enter_context(tarfile.open(folder / kind / name, "w")) for name in shards}
            for shard, name, data in samples:
                if name.endswith(".json"):
                    found = json.loads(data)
                    data = json.dumps(found | {"captions": next(others)} if kind == "shuffled" else found).encode()
                elif kind == "noise":
                    buffer = io.BytesIO()
                    Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(buffer, "JPEG")
                    data = buffer.getvalue()
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tars[shard].addfile(member, io.BytesIO(data))
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    "kind, status, cause",
    [
        ("right", 0, ""),
        ("rate", 1, "the learning rate: in stage image it is 10 times the reference's"),
        ("noise", 1, "the images: what reads images alone is outside, texts alone are inside"),
        (
            "shuffled",
            1,
            "the pairing: what reads an image and its text together is outside, what reads one of them is inside",
        ),
    ],
)
def test_the_quickstart_made_wrong(tmp_path, world, capsys, kind, status, cause):
    recipe = load_recipe(RECIPE)
    settings = [
        f"stages.{stage.name}.data.shards=[{world}/synthetic/{'text' if stage.name == 'text' else 'train'}]"
        for stage in recipe.stages
    ]
    if kind == "rate":
        settings += [f"stages.{stage.name}.optimizer.lr={10 * stage.optimizer.lr}" for stage in recipe.stages]
    elif kind != "right":
        settings += [
            f"stages.{stage.name}.data.shards=[{world}/{kind}]" for stage in recipe.stages if stage.name != "text"
        ]
    run = tmp_path / "run"
    arguments = [
        "--recipe",
        str(RECIPE),
        "--deepspeed_config",
        "ds_configs/zero2.json",
        "--output_dir",
        str(run),
        "seed=11",
    ]
    stages = {"right": "image,text,words", "shuffled": "image,text,words,contrast"}.get(kind, "image,text")
    run_ranks(
        ["train_ds.py", *arguments, *settings, f"retrieval.shards=[{world}/synthetic/test]", "--stages", stages],
        2,
        timeout=1200,
    )
    assert main([str(run)]) == status
    out = capsys.readouterr().out
    assert cause in out and ("usual cause" in out) == bool(cause)
