"""Learning-rate schedules, learning rates of single layers and parameters, optimisers beside AdamW."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_ranks, tiny_recipe, write_yaml

from vlmo_ds.config import OptimizerConfig, RecipeError
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.families import FAMILIES
from vlmo_ds.recipe_file import parse_recipe
from vlmo_ds.training.ds_config import merge
from vlmo_ds.training.lion import Lion
from vlmo_ds.training.muon import Muon, Piece, orthogonal
from vlmo_ds.training.optim import learning_rate, parameter_groups


def rates(steps: int, **schedule) -> list[float]:
    """Of every step, the peak being 1."""
    recipe = tiny_recipe(ROOT)
    recipe["stages"][2] |= {"steps": steps, "schedule": schedule, "optimizer": {"lr": 1.0}}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = learning_rate(optimizer, parse_recipe(recipe, "test").stages[2])
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_decay_by_steps_after_the_warm_up():
    assert rates(8, name="step", decay=0.5, decay_every=3, warmup_steps=2) == [0, 0.5, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_decay_to_the_end():
    assert rates(6, name="linear", warmup_steps=2) == [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert rates(4, name="cosine", warmup_steps=0) == pytest.approx([1, 0.854, 0.5, 0.146], abs=1e-3)
    assert rates(4, name="constant", warmup_steps=2) == [0, 0.5, 1, 1]


def groups_of(family: str, tasks: list[str], model: dict, **optimizer) -> dict[str, float]:
    """Learning rate over lr of every parameter."""
    of = FAMILIES[family]
    data = {"shards": ["-"]}
    stage = of.stage(
        name="a",
        tasks=dict.fromkeys(tasks),
        data=data,
        global_batch_size=8,
        steps=10,
        optimizer={"lr": 2.0, **optimizer},
    )
    with torch.device("meta"):
        built = of.build(of.config(**model, vocab_size=30), stage.weights, None)
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    groups = parameter_groups(built, stage)
    assert len({group["name"] for group in groups}) == len(groups)
    return {names[id(parameter)]: group["lr"] / 2.0 for group in groups for parameter in group["params"]}


VLMO = {"embed_dim": 8, "depth": 3, "num_heads": 2, "vlffn_start_layer_index": 2}


def test_layers_learn_more_slowly_the_lower_they_are():
    found = groups_of("vlmo", ["itc", "mlm"], VLMO, layer_decay=0.5)
    assert found["transformer.blocks.2.mlp_vl.fc1.weight"] == found["transformer.blocks.2.norm1.bias"] == 0.5
    assert found["transformer.blocks.0.attn.qkv.weight"] == 0.125
    assert {found[name] for name in found if "embed" in name or name == "transformer.cls_token"} == {0.0625}
    assert (
        found["transformer.norm.weight"]
        == found["mlm_score.decoder.weight"]
        == found["relative_position_bias_table"]
        == 1
    )
    assert found["logit_scale"] == 1 and set(found.values()) == {1, 0.5, 0.25, 0.125, 0.0625}


def test_each_stack_has_its_own_depth():
    sizes = {
        "vision_layers": 4,
        "text_layers": 2,
        "vision_width": 8,
        "vision_head_width": 4,
        "text_width": 8,
        "text_heads": 2,
    }
    more = {"decoder_layers": 3, "decoder_heads": 2, "pooler_heads": 2, "embed_dim": 8}
    found = groups_of("coca", ["itc", "caption"], sizes | more, layer_decay=0.5)
    assert found["visual.transformer.resblocks.0.attn.in_proj_weight"] == 0.5**4
    assert (
        found["text.transformer.resblocks.1.ln_1.weight"] == 0.5
        and found["text_decoder.cross_attn.0.ln_1.weight"] == 0.5**3
    )
    assert found["visual.conv1.weight"] == found["text.token_embedding.weight"] == 0.5**5 and found["visual.proj"] == 1


def test_multipliers_by_pattern_come_on_top():
    multipliers = {"*.blocks.1.*": 3.0, "*.mlp_text.*": 7.0, "logit_scale": 0.1}
    found = groups_of("vlmo", ["itc"], VLMO, layer_decay=0.5, lr_multipliers=multipliers)
    assert (
        found["transformer.blocks.1.mlp_text.fc1.weight"] == 0.25 * 3
        and found["transformer.blocks.0.mlp_text.fc1.weight"] == 0.125 * 7
    )
    assert found["logit_scale"] == pytest.approx(0.1) and found["logit_vl_scale"] == 1
    with pytest.raises(RecipeError, match="lr_multipliers: 'blocks.*' fits no parameter that is trained"):
        groups_of("vlmo", ["itc"], VLMO, lr_multipliers={"blocks.*": 2.0})


def test_without_them_groups_are_what_they_were():
    found = groups_of("vlmo", ["vqa"], VLMO | {"vqav2_label_size": 5}, head_lr_multiplier=20)
    assert {value for name, value in found.items() if name.startswith("vqa_classifier")} == {20}
    assert {value for name, value in found.items() if not name.startswith("vqa_classifier")} == {1}


def test_lion_is_the_papers():
    """Algorithm 2, written out."""
    torch.manual_seed(0)
    weight = torch.randn(7, dtype=torch.float32)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = Lion([{"params": [parameter], "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.95))
    momentum = torch.zeros(7)
    for _ in range(5):
        gradient = torch.randn(7)
        parameter.grad = gradient.clone()
        optimizer.step()
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * torch.sign(0.9 * momentum + 0.1 * gradient)
        momentum = 0.95 * momentum + 0.05 * gradient
    torch.testing.assert_close(parameter.detach(), weight)
    assert optimizer.state[parameter].keys() == {"exp_avg"}


@pytest.mark.parametrize(
    "ranks, zero, again",
    [
        (1, 0, 2),
        (2, 2, 1),
        (2, 3, 2),
        *(pytest.param(*one, marks=pytest.mark.long) for one in ((1, 2, 1), (1, 3, 1), (2, 0, 1))),
    ],
)
def test_lion_is_the_same_on_any_ranks_and_goes_on_from_its_checkpoint(
    tmp_path, synthetic, lion_alone, ranks, zero, again
):
    found = trained_by(LION, tmp_path, synthetic, ranks, zero, 3)
    found = trained_by(LION, tmp_path, synthetic, again, zero, 6)
    assert [record["step"] for record in found] == list(range(1, 7))
    for ours, theirs in zip(found, lion_alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def lion_alone(tmp_path_factory, synthetic):
    return trained_by(LION, tmp_path_factory.mktemp("lion"), synthetic, 1, 0, 6)


LION = {"name": "lion", "lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.1}
MUON = {"name": "muon", "lr": 1e-3, "weight_decay": 0.1, "gradient_clipping": 1.0}


def trained_by(optimizer, folder, data, ranks, zero, steps) -> list[dict]:
    recipe = tiny_recipe(data, retrieval=None)
    schedule = {"name": "constant", "warmup_steps": 1}
    joint = recipe["stages"][-1] | {
        "init": {"weights": "fresh"},
        "steps": steps,
        "schedule": schedule,
        "optimizer": optimizer,
    }
    file = write_yaml(folder / "recipe.yaml", recipe | {"stages": [joint | {"checkpoint_every": 3}]})
    spread = {"stage": zero} | ({"stage3_param_persistence_threshold": 0} if zero == 3 else {})
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": spread, "steps_per_print": 10**9}))
    run_ranks(
        ["train_ds.py", "--recipe", file, "--deepspeed_config", folder / "ds.json", "--output_dir", folder / "run"],
        ranks,
    )
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_muon_brings_matrices_near_to_orthogonal_ones_and_steps_as_wide_as_adamw():
    torch.manual_seed(0)
    for shape in ((8, 40), (40, 8), (16, 16)):
        matrix = torch.randn(shape)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        found = orthogonal(matrix)
        values = torch.linalg.svdvals(found)
        assert found.shape == matrix.shape and values.min() > 0.3 and values.max() < 1.3
        torch.testing.assert_close(u.T @ found @ v.T, torch.diag((u.T @ found @ v.T).diag()), rtol=0, atol=1e-4)
    weight, bias = torch.nn.Parameter(torch.randn(16, 64)), torch.nn.Parameter(torch.randn(16))
    before, beside = weight.detach().clone(), torch.nn.Parameter(bias.detach().clone())
    groups = [
        {"params": [weight], "weight_decay": 0.1, "muon": True},
        {"params": [bias], "weight_decay": 0.0, "muon": False},
    ]
    muon = Muon(groups, 0.01, (0.9, 0.95), 1e-8, 0.9, fused=True)
    adamw = torch.optim.AdamW([beside], 0.01, (0.9, 0.95), 1e-8, weight_decay=0.0, fused=True)
    muon.place({id(weight): [Piece(weight.shape, 0, 0, weight.numel())]}, cut=False)
    muon.state[weight]["exp_avg"] = torch.zeros_like(weight)
    momentum = torch.zeros_like(weight)
    for _ in range(3):
        weight.grad, bias.grad = torch.randn_like(weight), torch.randn_like(bias)
        beside.grad, gradient = bias.grad.clone(), weight.grad.clone()
        muon.step()
        adamw.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        step = orthogonal(0.1 * gradient + 0.9 * momentum) * 0.2 * 64**0.5
        assert 0.1 < step.square().mean().sqrt() < 0.3
        before = before * (1 - 0.01 * 0.1) - 0.01 * step
    torch.testing.assert_close(weight.detach(), before)
    assert torch.equal(bias, beside) and muon.state[weight].keys() == {"exp_avg"}


def test_muon_takes_the_matrices_of_blocks_and_no_other():
    recipe = parse_recipe(tiny_recipe(Path("x"), retrieval=None), "x")
    stage = recipe.stages[-1].model_copy(update={"optimizer": OptimizerConfig(name="muon")})
    model = recipe.family.build(recipe.model.model_copy(update={"vocab_size": 50}), stage.weights, Collector())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon = {names[id(p)] for group in parameter_groups(model, stage) if group["muon"] for p in group["params"]}
    assert all(".blocks." in name and name.endswith(".weight") for name in by_muon)
    assert {f"transformer.blocks.0.{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp_text.fc1")} <= by_muon
    shapes = [parameter.dim() for name, parameter in model.named_parameters() if name in by_muon]
    assert set(shapes) == {2} and len(by_muon) < len(names) / 2


@pytest.mark.parametrize(
    "optimizer, words",
    [
        (
            {"name": "lion", "eps": 1e-6},
            "eps is 1e-06, which is for adamw and muon, found name 'lion'; accepted: 1e-08",
        ),
        ({"name": "lion", "momentum": 0.9}, "momentum is 0.9, which is for muon, found name 'lion'; accepted: 0.95"),
        ({"momentum": 0.9}, "momentum is 0.9, which is for muon, found name 'adamw'; accepted: 0.95"),
        ({"name": "muon", "momentum": 1.0}, "optimizer.momentum: "),
        ({"name": "sgd"}, "optimizer.name: "),
    ],
)
def test_a_setting_that_the_optimiser_does_not_read_is_an_error(optimizer, words):
    recipe = tiny_recipe(Path("x"), retrieval=None)
    recipe["stages"][0]["optimizer"] = optimizer
    with pytest.raises(RecipeError) as told:
        parse_recipe(recipe, "x")
    assert words in str(told.value) and str(told.value).count("\n") == 1


@pytest.mark.parametrize("key, value", [("device", "nvme"), ("ratio", 0.5)])
def test_muon_needs_its_matrices_in_memory(key, value):
    recipe = tiny_recipe(Path("x"), retrieval=None)
    recipe["stages"][0]["optimizer"] = {"name": "muon"}
    stage = parse_recipe(recipe, "x").stages[0]
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", key: value}}}
    with pytest.raises(RecipeError, match=f"'muon'.*offload_optimizer.{key} = "):
        merge(config, stage, 1)


# (ranks, ZeRO stage) of the first three steps and of the next three
MUON_RUNS = [((ranks, zero), (4 // ranks, 3 - zero)) for ranks in (1, 2, 4) for zero in (0, 1, 2, 3)]
MUON_SHORT = (((2, 2), (1, 0)), ((2, 3), (2, 1)))


@pytest.mark.parametrize(
    "first, second",
    [*MUON_SHORT, *(pytest.param(*pair, marks=pytest.mark.long) for pair in MUON_RUNS)],
)
def test_muon_is_the_same_on_any_ranks_and_goes_on_at_another_number(tmp_path, synthetic, muon_alone, first, second):
    trained_by(MUON, tmp_path, synthetic, *first, 3)
    found = trained_by(MUON, tmp_path, synthetic, *second, 6)
    assert [record["step"] for record in found] == list(range(1, 7))
    for ours, theirs in zip(found, muon_alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), (
            ours["step"],
            ours["loss"] / theirs["loss"] - 1,
        )


@pytest.fixture(scope="module")
def muon_alone(tmp_path_factory, synthetic):
    return trained_by(MUON, tmp_path_factory.mktemp("muon"), synthetic, 1, 0, 6)
