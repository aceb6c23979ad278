"""A contrastive batch in parts: the gradient of the whole batch, with the same random numbers in both passes."""

import json

import pytest
import torch
from conftest import run_ranks, tiny_recipe, write_yaml
from families.vlmo.tiny import tiny_batch, tiny_model

from vlmo_ds.config import RecipeError
from vlmo_ds.families.step import StepOutput
from vlmo_ds.recipe_file import parse_recipe
from vlmo_ds.training.gradient_cache import cached_contrast


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("task", ["irtr", "itc"])
@pytest.mark.parametrize(
    "dropped, changes",
    [
        (0.0, {}),
        (0.3, {}),
        (0.0, {"itc_kind": "sigmoid"}),
        (0.0, {"positives": "image", "itc_kind": "sigmoid"}),
        (0.0, {"positives": "image"}),
    ],
)
def test_512_samples_by_32_have_the_gradient_of_all_at_once(task, dropped, changes):
    """With dropout and stochastic depth the direct step draws the same numbers part by part."""
    model = tiny_model({task: 1.0}, torch.float32, drop_path_rate=dropped, **changes).train()
    batch = tiny_batch(512, dtype=torch.float32)
    batch["image_id"] //= 2
    parts = [{k: v[i : i + 32] for k, v in batch.items() if v.dim()} for i in range(0, 512, 32)]

    def features_of(number):
        torch.manual_seed(number)
        return model(parts[number], "contrast_features")

    if dropped:
        found = [features_of(i) for i in range(16)]
        whole = {k: torch.cat([part[k] for part in found]) if v.dim() else v for k, v in found[0].items()}
    else:
        whole = model(batch, "contrast_features")
    out = StepOutput.empty()
    model.add_contrast(out, whole)
    out.losses[task].backward()
    direct = gradients(model)

    def call(number, name, also):
        torch.manual_seed(number)
        return model({**parts[number], **also}, name)

    cached = cached_contrast(model, 16, call, lambda part: part.backward())
    assert float(cached.loss) == pytest.approx(float(out.losses[task]), rel=1e-6)
    ours = gradients(model)
    assert ours.keys() == direct.keys()
    for name, value in direct.items():
        assert float((ours[name] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-9, name


def finetune(folder, data, ranks, stage, task, *settings) -> list[dict]:
    folder.mkdir()
    recipe = tiny_recipe(data, retrieval=None)
    joint = recipe["stages"].pop() | {"tasks": {task: None}, "init": {"weights": "fresh"}, "steps": 4}
    recipe["stages"] = [joint | {"global_batch_size": 16}]
    recipe["model"] |= {"vocab_size": 200, "patch_dropout": 0.3}
    file = write_yaml(folder / "recipe.yaml", recipe)
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}, "steps_per_print": 10**9}))
    command = ["train_ds.py", "--recipe", str(file), "--deepspeed_config", str(folder / "ds.json")]
    run_ranks([*command, "--output_dir", str(folder / "run"), *settings], ranks)
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


CACHED = ("stages.joint.gradient_cache=true", "stages.joint.micro_batch_size=2")


@pytest.mark.parametrize(
    "task, ranks, stage",
    [
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("irtr", 2, 3), ("irtr", 1, 0), ("irtr", 2, 1), ("itc", 2, 2), ("itc", 4, 3))
        ),
    ],
)
def test_training_in_parts_equals_training_on_whole_batches(tmp_path, synthetic, task, ranks, stage):
    direct = finetune(tmp_path / "direct", synthetic, 1, 0, task)
    rows = finetune(tmp_path / "run", synthetic, ranks, stage, task, *CACHED)
    assert len(rows) == len(direct) == 4
    for ours, theirs in zip(rows, direct, strict=True):
        for key in (f"loss/{task}", "grad_norm"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": {"itc": 1, "itm": 1}, "micro_batch_size": 2}, "gradient_cache is for a stage with the task irtr or itc and no other"),
        ({"tasks": {"irtr": 1}}, "gradient_cache needs micro_batch_size"),
    ],
)  # fmt: skip
def test_where_it_cannot_be_used(synthetic, changes, message):
    recipe = tiny_recipe(synthetic)
    recipe["stages"] = [recipe["stages"][2] | {"gradient_cache": True} | changes]
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe, "test")
