"""CoCa's runs on real processes: the same losses on any ranks and under any ZeRO stage, killed runs go on, the same captions."""

import json

import pytest
from conftest import call, run_ranks, write_yaml
from families.coca.tiny import tiny_coca
from faults.runs import killed_at

from vlmo_ds.evaluation.captioning import java_runs

CACHED = {"gradient_cache": True, "micro_batch_size": 2}


def arguments(folder, recipe, zero: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    file = write_yaml(folder / "recipe.yaml", recipe)
    spread = {
        "stage": zero,
        **({"stage3_param_persistence_threshold": 0} if zero == 3 else {}),
    }  # every weight is let go
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": spread, "steps_per_print": 10**9}))
    command = ["train_ds.py", "--recipe", str(file), "--deepspeed_config", str(folder / "ds.json")]
    return [*command, "--output_dir", str(folder / "run")]


def run(folder, data, ranks: int, zero: int, steps: int = 10, cached: bool = False, **model) -> list[dict]:
    recipe = tiny_coca(data, retrieval=None, captioning=None)
    recipe["model"] |= model
    for stage in recipe["stages"]:
        stage["steps"] = steps
        if cached:
            stage |= CACHED
    run_ranks(arguments(folder, recipe, zero), ranks)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, synthetic):
    return run(tmp_path_factory.mktemp("coca"), synthetic, 1, 0)


SHORT = ((2, 2, False), (2, 3, True))  # of all; the others are their neighbours


@pytest.mark.parametrize("ranks, zero, cached", [
    pytest.param(r, z, c, marks=() if (r, z, c) in SHORT else pytest.mark.long)
    for r in (1, 2, 4) for z in (0, 1, 2, 3) for c in (False, True) if (r, z, c) != (1, 0, False)
])  # fmt: skip
def test_losses_do_not_depend_on_ranks_zero_or_parts(tmp_path, synthetic, reference, ranks, zero, cached):
    rows = run(tmp_path, synthetic, ranks, zero, cached=cached)
    assert len(rows) == len(reference) == 20
    for ours, theirs in zip(rows, reference, strict=True):
        for key, value in theirs.items():
            if key.startswith("loss"):
                assert ours[key] == pytest.approx(value, rel=1e-5), (ours["stage"], ours["step"], key)


@pytest.mark.parametrize(
    "model",
    [{"attentional_pool": "cascade"}, {"itc_kind": "sigmoid"}, {"positives": "image"}],
    ids=["cascade", "sigmoid", "positives"],
)
def test_other_kinds_of_models_under_zero_3(tmp_path, synthetic, model):
    found = [run(tmp_path / f"{ranks}", synthetic, ranks, zero, 4, **model) for ranks, zero in ((1, 0), (2, 3))]
    for number, (ours, theirs) in enumerate(zip(*found, strict=True)):  # AdamW makes the first step's rounding larger
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4 if number else 1e-6)


def test_a_killed_run_goes_on_to_the_last_digit(tmp_path, synthetic):
    recipe = tiny_coca(synthetic, retrieval=None, captioning=None)
    for stage in recipe["stages"]:
        stage |= {"steps": 15, "checkpoint_every": 4}
    run_ranks(arguments(tmp_path / "whole", recipe, 2), 2)
    command = arguments(tmp_path / "killed", recipe, 2)
    metrics = tmp_path / "killed" / "run" / "metrics.jsonl"
    for lines in (6, 21):
        killed_at(command, 2, metrics, lines)
    run_ranks(command, 2)
    assert metrics.read_text() == (tmp_path / "whole" / "run" / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, synthetic):
    """Two runs of the same recipe that write samples: on one rank in batches of 16, on two in batches of 1."""
    folders = []
    for ranks, batch in ((1, 16), (2, 1)):
        held_out = {"shards": [str(synthetic / "test")], "max_length": 12}
        recipe = tiny_coca(synthetic, captioning={**held_out, "method": "sample", "top_p": 0.9, "batch_size": batch})
        folder = tmp_path_factory.mktemp("trained")
        run_ranks(arguments(folder, recipe, 1), ranks)
        folders.append(folder / "run")
    return folders


def test_sampled_captions_do_not_depend_on_ranks_or_batches(trained):
    one, two = trained
    captions = json.loads((one / "captions.json").read_text())
    assert len(captions) == 24 and len({row["caption"] for row in captions}) > 12
    assert (one / "captions.json").read_bytes() == (two / "captions.json").read_bytes()


def test_a_run_ends_with_scores_and_a_report(trained):
    scores = json.loads((trained[0] / "captioning.json").read_text())
    assert {"objects/F1", "statements true", "wholly right", "CIDEr", "BLEU-4", "ROUGE-L"} <= scores.keys()
    assert scores["images"] == 24
    assert "text_to_image" in json.loads((trained[0] / "retrieval.json").read_text())
    page = (trained[0] / "report" / "index.html").read_text()
    assert "<h2>Captions</h2>" in page and "<h2>Retrieval</h2>" in page


def test_captions_by_command(tmp_path, trained):
    run = trained[0]
    file, output = tmp_path / "captions.json", tmp_path / "scores.json"
    out = call(
        "vlmo_ds.evaluation.captioning", run, "--method", "beam", "--beams", 2, "--captions", file, "--output", output
    ).stdout
    assert "captions of 24 images" in out and "words by" in out
    rows = json.loads(file.read_text())
    assert len({row["image_id"] for row in rows}) == len(rows) == 24
    assert json.loads(output.read_text())["settings"]["beams"] == 2
    texts = []
    for kept in ("--keep_prompt", "--no-keep_prompt"):
        call("vlmo_ds.evaluation.captioning", run, "--prompt", "a large", kept, "--captions", file)
        texts.append([row["caption"] for row in json.loads(file.read_text())])
    assert all(text.startswith("a large") for text in texts[0])
    assert [text.removeprefix("a large").strip() for text in texts[0]] == texts[1]
    for given, message in (
        (["--method", "sample", "--beams", 3], "beams is 3, which is for method 'beam', found method 'sample'"),
        (["--min_length", 20, "--max_length", 10], "min_length is 20, above max_length, which is 10"),
        (
            ["--prompt", "a picture of a large red circle and a blue ring at the top", "--max_length", 6],
            "leaves no place",
        ),
        (["--max_length", 99], "max_length is 99, the model's texts have 40"),
        *([] if java_runs() else [(["--meteor"], "METEOR runs in Java")]),
    ):
        assert message in call("vlmo_ds.evaluation.captioning", run, *given, code=2).stderr, given


def test_exported_for_transformers_and_searched(tmp_path, trained, synthetic):
    """The exported model writes what the run's own evaluation does, and a folder of pictures is searched with it."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import vlmo_ds.interop.huggingface  # noqa: F401
    from vlmo_ds.data.shards import list_shards

    folder, file = tmp_path / "exported", tmp_path / "captions.json"
    call("vlmo_ds.interop.export", trained[0], "--output", folder)
    call("vlmo_ds.evaluation.captioning", trained[0], "--method", "greedy", "--captions", file)
    wanted = [row["caption"] for row in json.loads(file.read_text())]
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    shards = list_shards([str(synthetic / "test")])
    images = [shard.read(row).image for shard in shards for row in range(shard.samples)]
    ids = model.generate(**processor(images=images), max_length=12)
    assert [text.strip() for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)] == wanted

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, data in enumerate(images[:5]):
        (pictures / f"{number}.jpg").write_bytes(data)
    out = call(
        "vlmo_ds.evaluation.search",
        "--model",
        folder,
        "--images",
        pictures,
        "--output",
        tmp_path / "a.png",
        "a red circle",
    )
    assert ".jpg" in out.stdout
    assert Image.open(tmp_path / "a.png").size[0] > 100


def test_zero_shot_takes_a_coca_run(tmp_path, trained, synthetic):
    """Pictures of a folder for each class."""
    from vlmo_ds.data.shards import list_shards

    shard = list_shards([str(synthetic / "test")])[0]
    for row in range(8):
        folder = tmp_path / "pictures" / ("circle", "square")[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row}.jpg").write_bytes(shard.read(row).image)
    call("vlmo_ds.data.prepare", "image_folder", "--root", tmp_path / "pictures", "--output", tmp_path / "shards")
    (tmp_path / "classes.txt").write_text("circle\nsquare\n")
    given = (
        "--classes",
        tmp_path / "classes.txt",
        "--shards",
        tmp_path / "shards",
        "--output",
        tmp_path / "scores.json",
    )
    call("vlmo_ds.evaluation.zero_shot", trained[0], *given)
    assert min(json.loads((tmp_path / "scores.json").read_text()).values()) >= 0
