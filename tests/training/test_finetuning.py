"""From a pretrained run to fine-tuning at another resolution, its evaluation and its export; the same on any ranks."""

import json

import pytest
import torch
from conftest import ROOT, call, run_ranks, tiny_recipe, write_yaml
from data.files import jpeg, red_or_green
from safetensors.torch import load_file

from vlmo_ds.config import RecipeError
from vlmo_ds.interop.export import write_official
from vlmo_ds.recipe_file import load_recipe, parse_recipe
from vlmo_ds.weights_file import read_weights

HEADS = ["itc_*", "logit_*scale", "itm_score.*", "mlm_score.*"]
INIT = {
    "irtr": {"drop": ["itc_vl_*", "logit_vl_scale", "itm_score.*", "mlm_score.*"]},
    "vqa": {"fresh": ["vqa_classifier.*"], "drop": HEADS},
    "nlvr2": {"fresh": ["nlvr2_classifier.*"], "drop": HEADS},
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, synthetic):
    """A run of three stages, and its result as official releases are: float16, nested, with index buffers."""
    folder = tmp_path_factory.mktemp("pretrained")
    file = write_yaml(folder / "recipe.yaml", tiny_recipe(synthetic, retrieval=None))
    run_ranks(["train_ds.py", "--recipe", str(file), "--output_dir", str(folder / "run")], 1)
    weights = read_weights(folder / "run/checkpoints/joint/final")
    weights["relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    write_official({"state_dict": weights}, folder / "state_dict.pt", half=True)
    released = torch.load(folder / "state_dict.pt", weights_only=True)["state_dict"]
    torch.save({"module": {f"module.{name}": value for name, value in released.items()}}, folder / "module.pt")
    torch.save({"model": released}, folder / "model.pt")
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return red_or_green(tmp_path_factory.mktemp("asked"))


def recipe(task, data, pretrained, weights, **changes) -> dict:
    made = tiny_recipe(data)
    shards = str(data if task == "irtr" else data / task)
    stage = made["stages"][2] | {
        "name": task,
        "tasks": {task: None},
        "init": INIT[task] | {"weights": str(weights)},
        "global_batch_size": 16,
        "steps": 4,
        "optimizer": {"lr": 1e-3, "head_lr_multiplier": 5},
    }
    stage["data"] = stage["data"] | {"shards": [shards]}
    model = made["model"] | {"image_size": 48, "max_text_len": 16}
    made = made | {
        "name": task,
        "model": model,
        "stages": [stage],
        "tokenizer": {"name": str(pretrained / "run/tokenizer")},
    }
    del made["retrieval"]
    evaluation = {"shards": [shards], "batch_size": 8}
    return made | {"retrieval" if task == "irtr" else task: evaluation} | changes


def finetune(folder, made, ranks, zero) -> tuple[list[dict], dict, str]:
    folder.mkdir(parents=True)
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": zero}, "steps_per_print": 10**9}))
    command = ["train_ds.py", "--recipe", str(write_yaml(folder / "r.yaml", made)), "--output_dir", str(folder / "run")]
    output = run_ranks([*command, "--deepspeed_config", str(folder / "ds.json")], ranks)
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    name = "retrieval" if made["name"] == "irtr" else made["name"]
    return rows, json.loads((folder / f"run/{name}.json").read_text()), output


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "task, ranks, zero, files",
    [
        ("vqa", 2, 3, ("state_dict", "module")),
        pytest.param("nlvr2", 2, 2, ("module", "model"), marks=LONG),
        pytest.param("irtr", 2, 3, ("model", "state_dict"), marks=LONG),
        pytest.param("vqa", 4, 1, ("model", "state_dict"), marks=LONG),
        pytest.param("nlvr2", 4, 3, ("state_dict", "module"), marks=LONG),
    ],
)
def test_losses_and_numbers_do_not_depend_on_ranks_or_zero(
    tmp_path, synthetic, pretrained, asked, task, ranks, zero, files
):
    """Nor on the key that the official file has its weights under."""
    data = synthetic / "train" if task == "irtr" else asked
    made = recipe(task, data, pretrained, pretrained / f"{files[0]}.pt")
    again = recipe(task, data, pretrained, pretrained / f"{files[1]}.pt")
    rows, numbers, output = finetune(tmp_path / "one", made, 1, 0)
    for change in ("4 x 4 to 6 x 6 patches", "[32, 32] -> [16, 32]: cut", "1 index buffers left out"):
        assert change in output
    others, same_numbers, _ = finetune(tmp_path / "many", again, ranks, zero)
    assert len(rows) == len(others) == 4 and same_numbers == numbers
    for ours, theirs in zip(others, rows, strict=True):
        assert ours[f"loss/{task}"] == pytest.approx(theirs[f"loss/{task}"], rel=1e-5)
    weights = load_file(tmp_path / f"one/run/checkpoints/{task}/final/model.safetensors")
    assert weights["relative_position_bias_table"].dtype == torch.float32
    assert task == "irtr" or weights[f"{task}_classifier.3.weight"].abs().max() > 0


def test_learns_to_answer_and_is_exported(tmp_path, pretrained, asked):
    made = recipe("vqa", asked, pretrained, pretrained / "run/checkpoints/joint/final")
    made["stages"][0]["steps"] = 40
    rows, numbers, _ = finetune(tmp_path / "x", made, 1, 0)
    assert rows[-1]["vqa/score"] == 1.0 and numbers["accuracy"] == 100 and numbers["questions"] == 48
    run = tmp_path / "x/run"
    done = call("vlmo_ds.evaluation.vqa", run, "--submission", tmp_path / "answers.json")
    assert "vqa: 48 questions, accuracy 100.00" in done.stdout
    assert {"question_id": 3, "answer": "yes"} in json.loads((tmp_path / "answers.json").read_text())
    for option in ("--submission", "--output"):
        done = call("vlmo_ds.evaluation.vqa", run, option, run / "answers.json", code=2)
        assert f"{option}: {run / 'answers.json'} is the list of answers that the run was trained" in done.stderr
    done = call(
        "vlmo_ds.interop.export", run, "--output", tmp_path / "exported", "--official", tmp_path / "official.pt"
    )
    assert "VLMoForQuestionAnswering" in done.stdout
    from vlmo_ds.families.vlmo.huggingface import VLMoForQuestionAnswering
    from vlmo_ds.interop.huggingface import AutoProcessor

    model = VLMoForQuestionAnswering.from_pretrained(tmp_path / "exported").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        inputs = processor(
            images=[jpeg((40, 40), (230, 20, 20)), jpeg((40, 40), (20, 230, 20))], text=["is it red ?"] * 2
        )
        best = model(**inputs).logits.argmax(1).tolist()
    assert [model.config.id2label[number] for number in best] == ["yes", "no"]
    assert call("vlmo_ds.interop.export", run, "--output", tmp_path / "exported", code=2).stderr.startswith(
        "error: --output"
    )


def test_recipes_extend_others(tmp_path):
    write_yaml(tmp_path / "a.yaml", tiny_recipe(ROOT))
    settings = {"model.depth": 4, "stages.joint.steps": 7, "stages.image": None}
    write_yaml(tmp_path / "b.yaml", {"extends": "a.yaml", "settings": settings})
    found = load_recipe(tmp_path / "b.yaml", ["stages.text.steps=9"])
    assert found.name == "b" and found.model.depth == 4
    assert [(stage.name, stage.steps) for stage in found.stages] == [("text", 9), ("joint", 7)]
    assert [stage.name for stage in load_recipe(tmp_path / "a.yaml", ["stages.text=null"]).stages] == ["image", "joint"]
    write_yaml(tmp_path / "c.yaml", {"extends": "b.yaml", "name": "see", "settings": {"model.depht": 4}})
    with pytest.raises(RecipeError, match="c.yaml:\n  model.depht: unknown setting .did you mean 'depth'"):
        load_recipe(tmp_path / "c.yaml")
    write_yaml(tmp_path / "d.yaml", {"extends": "b.yaml", "seed": 4})
    with pytest.raises(
        RecipeError, match="d.yaml extends another: beside 'extends' it takes 'name' and 'settings'.*found seed"
    ):
        load_recipe(tmp_path / "d.yaml")
    write_yaml(tmp_path / "e.yaml", {"extends": "e.yaml"})
    with pytest.raises(RecipeError, match="e.yaml extends .*e.yaml, which extends it in turn"):
        load_recipe(tmp_path / "e.yaml")


@pytest.mark.parametrize("file", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "launch/recipes").rglob("*.yaml")))
def test_shipped_recipes_are_sound(file):
    assert load_recipe(ROOT / file).name == file.rpartition("/")[2].removesuffix(".yaml")


def test_tasks_with_data_of_their_own_go_alone():
    made = tiny_recipe(ROOT)
    made["stages"][2]["tasks"] = {"vqa": 1, "itc": 1}
    with pytest.raises(RecipeError, match="task 'vqa' has data of its own and goes alone in a stage"):
        parse_recipe(made, "x")
