"""Each mistake ends the run before any training, with one message that names the setting or file, and exit status 2."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, run_ranks, start_ranks, tiny_recipe, write_yaml
from data.files import jpeg, write_tar

from vlmo_ds.config import RecipeError
from vlmo_ds.families.handing_over import hand_over
from vlmo_ds.recipe_file import load_recipe, parse_recipe
from vlmo_ds.training.ds_config import merge, micro_batch, read_config, refuse_by_device


def recipe_with(data, change) -> dict:
    recipe = tiny_recipe(data)
    change(recipe)
    return recipe


def change_model(**settings):
    return lambda recipe: recipe["model"].update(settings)


def change_stage(number, **settings):
    return lambda recipe: recipe["stages"][number].update(settings)


def change_data(number, **settings):
    return lambda recipe: recipe["stages"][number]["data"].update(settings)


@pytest.mark.parametrize(
    "change, message",
    [
        (change_model(embed_dims=5), r"model.embed_dims: unknown setting \(did you mean 'embed_dim'\?\)"),
        (change_stage(1, stepz=5), r"stages.text.stepz: unknown setting \(did you mean 'steps'\?\)"),
        (lambda r: r["stages"][0]["data"].update(transfrom="square"), r"stages.image.data.transfrom: unknown setting \(did you mean 'transform'\?\)"),
        (lambda r: r.update(sead=1), r"sead: unknown setting \(did you mean 'seed'\?\)"),
        (change_model(image_size=30), r"image_size is 30, which is not a multiple of patch_size 8: take 24 or 32"),
        (change_model(embed_dim=33), r"embed_dim 33 is not a multiple of num_heads 2"),
        (change_model(vlffn_start_layer_index=9), r"vlffn_start_layer_index is 9, the model has 3 blocks"),
        (change_stage(2, tasks={"itm": 1.0}), r"task 'itm' draws its negatives from the similarities of 'itc'"),
        (change_stage(2, tasks={"itcc": 1.0}), r"task 'itcc' is not known \(did you mean 'itc'\?\)"),
        (change_stage(2, tasks={"mim": 1.0, "itc": 1.0}), r"task 'mim' trains on one modality and goes alone"),
        (change_stage(0, trainable="image_olny"), r"trainable is 'image_olny' \(did you mean 'image_only'\?\)"),
        (change_stage(0, steps="many"), r"stages.image.steps: .*found 'many'"),
        (change_stage(0, steps=0), r"stages.image.steps: .*greater than 0.*found 0"),
        (change_stage(1, name="image"), r"two stages have the same name: image, image, joint"),
        (lambda r: r.pop("stages"), r"stages: missing"),
        (change_data(0, shards=[]), r"stages.image.data: .*neither of shards and sources given"),
        (change_data(0, sources={"a": {"shards": ["x"]}}), r"stages.image.data: .*both of shards and sources given"),
        (change_data(0, shards=[], sources={"coco": {"shards": ["x"], "wieght": 2}}), r"stages.image.data.sources.coco.wieght: unknown setting \(did you mean 'weight'\?\)"),
        (change_data(0, shards=[], sources={"a": {"shards": ["x"], "weight": 0.5}}, mixing="exact"), r"mixing 'exact' needs whole numbers as weights, found \{'a': 0.5\}"),
        (change_data(0, text_only=True), r"data.text_only is true, which fits task 'textmlm' alone, found \['mim'\]"),
        (change_data(0, draw_false_text=1), r"data.draw_false_text is 1, but task 'mim' reads none"),
        (change_data(0, prompt="a photo of"), r"data.prompt is 'a photo of', which is for .*, found \['mim'\]; accepted: ''"),
        (change_data(2, questions_per_image=3), r"data.questions_per_image is 3, which is for vqa, found .*; accepted: 1"),
        (change_stage(0, init={"weights": []}), r"init: weights is an empty list; accepted: 'previous', 'fresh'"),
        (change_stage(0, init={"weights": ["a.pt", "fresh"]}), r"init: weights lists 'fresh'; accepted in a list: files"),
        (change_data(0, min_scale=0.2, transform="pixelbert"), r"min_scale is 0.2, and no source takes random crops"),
        (change_data(0, flip=False, transform="square_transform"), r"flip is False, and no source takes random crops"),
        (change_data(0, transform="square"), r"stages.image.data.transform: .*'square_transform'.*found 'square'"),
        (lambda r: r.update(name=".."), r"name is '..', which names no folder of its own"),
    ],
)  # fmt: skip
def test_recipe_mistakes(synthetic, change, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe_with(synthetic, change), "r.yaml")


NAN, INF = float("nan"), float("inf")


def change_optimizer(**settings):
    return lambda recipe: recipe["stages"][2]["optimizer"].update(settings)


def mixture(**weights):
    return {"shards": [], "sources": {name: {"shards": ["x"], "weight": weight} for name, weight in weights.items()}}


@pytest.mark.parametrize(
    "change, message",
    [
        (change_stage(2, schedule={"warmup_steps": 4}), r"warmup_steps is 4, longer than the stage, whose steps are 3"),
        (change_stage(2, schedule={"warmup_steps": 1.5}), r"joint.schedule: warmup_steps is 1.5; accepted: a whole number"),
        (change_stage(2, schedule={"name": "step"}), r"decay_every is 0 and name 'step'; accepted: above 0 with 'step'"),
        (change_stage(2, schedule={"decay_every": 5}), r"decay_every is 5 and name 'linear'; accepted"),
        (change_stage(2, schedule={"decay": 0.5}), r"decay is 0.5, which is for name 'step', found 'linear'; accepted: 0.9"),
        *((change_stage(2, schedule={"warmup_steps": odd}), r"joint.schedule.warmup_steps") for odd in (-1, NAN, INF, True)),
        *((change_optimizer(betas=odd), r"joint.optimizer.betas.[01]: .*found") for odd in ([1.5, 0.9], [0.9, 1.0], [-0.1, 0.9])),
        *((change_optimizer(betas=odd), r"joint.optimizer.betas") for odd in ([NAN, 0.9], [0.9], [0.9, 0.9, 0.9], 0.9, [True, 0.9])),
        *((change_optimizer(**{name: odd}), rf"joint.optimizer.{name}: .*found")
          for name in ("lr", "eps", "weight_decay", "head_lr_multiplier", "gradient_clipping") for odd in (NAN, INF, -INF, -1, True)),
        *((change_optimizer(lr=odd), r"joint.optimizer.lr: .*found") for odd in (0, 1e30, "inf", "nan")),
        (change_optimizer(eps=1), r"joint.optimizer.eps: .*found"),
        *((change_stage(2, tasks={"itc": 1, "mlm": odd}), r"joint.tasks") for odd in (NAN, INF, "many", True)),
        (change_stage(2, tasks={"itc": 1, "mlm": -0.5}), r"joint: tasks.mlm is -0.5; accepted: a weight of at least 0"),
        (change_stage(2, tasks={"itc": 0, "mlm": 0.0}), r"joint: tasks: all weights are 0 \(itc, mlm\)"),
        *((change_data(0, **mixture(a=1, b=odd)), r"data.sources.b.weight: .*found") for odd in (0, -1, NAN, INF, 1e300, 1e-300, True)),
        (change_data(0, **mixture(a=999_999, b=2), mixing="exact"), r"weights add up to, found 1,000,001; accepted: 1,000,000 at most"),
        *((change_data(0, **{name: odd}), rf"data.{name}: .*found")
          for name in ("mlm_probability", "mim_ratio", "max_bad_fraction", "cache_size_gb", "stall_seconds") for odd in (NAN, INF, -1)),
        *((change_data(0, **{name: odd}), rf"data.{name}: .*found")
          for name in ("lanes", "shuffle", "workers", "prefetch", "tries", "length_bucketing") for odd in (-1, NAN, INF, True, 0.5)),
        (change_data(0, mim_ratio=0.01), r"stages.image.data.mim_ratio is 0.01: of 16 patches some have to be masked"),
        (change_data(0, mim_ratio=0.99), r"stages.image.data.mim_ratio is 0.99"),
        *((change_model(**{name: odd}), rf"model.{name}: .*found")
          for name in ("mlp_ratio", "init_std", "drop_path_rate", "text_dropout", "layer_scale_init_values") for odd in (NAN, INF, -1)),
        (change_model(mlp_ratio=0.001), r"mlp_ratio 0.001 leaves experts of embed_dim 32 no hidden unit"),
        *((lambda r, odd=odd: r.update(loss_spike={"factor": odd}), r"loss_spike.factor: .*found") for odd in (NAN, INF, 1)),
        *((lambda r, odd=odd: r.update(seed=odd), r"seed: .*found") for odd in (-1, 2**32, 10**400, NAN, INF, True)),
        *((change_stage(2, **{name: odd}), rf"joint.{name}: .*found")
          for name in ("steps", "global_batch_size", "micro_batch_size", "checkpoint_every") for odd in (-1, NAN, INF, True, 1.5)),
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense(tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe_with(tmp_path, change), "r.yaml")


def test_numbers_at_the_edge_are_accepted(tmp_path):
    def change(recipe):
        recipe["seed"] = 2**32 - 1
        recipe["stages"][2] |= {"tasks": {"itc": 1, "mlm": 0}, "schedule": {"warmup_steps": 3}}
        recipe["stages"][2]["optimizer"] |= {"betas": [0, 0.999], "lr": "2e-4"}  # a text, as YAML reads it

    assert parse_recipe(recipe_with(tmp_path, change), "r.yaml").stages[2].warmup == 3


@pytest.mark.parametrize(
    "override, message",
    [
        ("stages.jiont.steps=3", "stages has no 'jiont'; accepted: image, text, joint or"),
        ("steps", "is not of the form key=value"),
        ("model.depth.x=3", "has no settings in it"),
        ("model.depht=3", r"model.depht: unknown setting \(did you mean 'depth'\?\)"),
    ],
)
def test_override_mistakes(tmp_path, synthetic, override, message):
    file = write_yaml(tmp_path / "r.yaml", tiny_recipe(synthetic))
    with pytest.raises(RecipeError, match=message):
        load_recipe(file, [override])


def test_overrides_reach_stages_by_name_number_and_star(tmp_path, synthetic):
    file = write_yaml(tmp_path / "r.yaml", tiny_recipe(synthetic))
    recipe = load_recipe(file, ["stages.*.steps=7", "stages.joint.steps=9", "stages.0.optimizer.lr=0.5", "seed=4"])
    assert [s.steps for s in recipe.stages] == [7, 7, 9] and recipe.stages[0].optimizer.lr == 0.5 and recipe.seed == 4


def test_architectures_have_the_published_sizes():
    base = parse_recipe(minimal({"arch": "vlmo_base_patch16", "drop_path_rate": 0.1}), "r").model
    plus = parse_recipe(minimal({"arch": "vlmo_base_plus_patch16"}), "r").model
    large = parse_recipe(minimal({"arch": "vlmo_large_patch16"}), "r").model
    assert (base.embed_dim, base.depth, base.num_heads, base.vlffn_start_layer_index, base.drop_path_rate) == (
        768,
        12,
        12,
        10,
        0.1,
    )
    assert (plus.embed_dim, plus.depth, plus.num_heads, plus.vlffn_start_layer_index) == (544, 24, 16, 21)
    assert plus.use_abs_pos_emb and not plus.need_relative_position_embed and plus.layer_scale_init_values is None
    assert (large.embed_dim, large.depth, large.num_heads, large.vlffn_start_layer_index) == (1024, 24, 16, 21)


def minimal(model) -> dict:
    return {
        "model": model,
        "stages": [
            {"name": "a", "tasks": {"mim": None}, "data": {"shards": ["x"]}, "global_batch_size": 12, "steps": 1}
        ],
    }


def stage_of(**changes):
    recipe = minimal({})
    recipe["stages"][0].update(changes)
    return parse_recipe(recipe, "r").stages[0]


def test_batch_sizes_that_do_not_divide():
    assert micro_batch(stage_of(), 4) == (3, 1) and micro_batch(stage_of(micro_batch_size=2), 2) == (2, 3)
    with pytest.raises(RecipeError, match="global_batch_size is 12, which 5 ranks do not divide: take 10 or 15"):
        micro_batch(stage_of(), 5)
    with pytest.raises(RecipeError, match="6 on each of 2 ranks, which micro_batch_size 4 does not divide"):
        micro_batch(stage_of(micro_batch_size=4), 2)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"train_batch_size": 64}, "train_batch_size = 64, but the recipe's stages.a.global_batch_size gives 12"),
        (
            {"gradient_clipping": 1.0},
            "gradient_clipping = 1.0, but the recipe's stages.a.optimizer.gradient_clipping gives 0.0",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
            "optimizer.params.lr = 0.1, but the recipe's stages.a.optimizer.lr gives 0.0002",
        ),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type = 'Lamb'; accepted: 'AdamW' or 'auto'"),
    ],
)
def test_contradictions_between_recipe_and_deepspeed_config(config, message):
    with pytest.raises(RecipeError, match=message):
        merge(config, stage_of(), 2)


def test_agreement_and_auto_are_merged():
    config = {
        "train_batch_size": 12,
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    }
    merged = merge(config, stage_of(micro_batch_size=3), 2)
    assert merged["train_micro_batch_size_per_gpu"] == 3 and merged["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == "auto" and "optimizer" not in merged


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not valid JSON"),
        ("[1]", "expected an object"),
        ('{"elasticity": {}}', "'elasticity' was removed from DeepSpeed"),
        ('{"scheduler": {}}', "belongs to the recipe"),
    ],
)
def test_deepspeed_config_mistakes(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_config(tmp_path / "c.json")


def test_fp16_on_a_cpu_names_the_config_to_use():
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        pytest.skip("this device can do fp16")
    with pytest.raises(
        RecipeError,
        match=r"zero2_fp16.json:\s+'fp16.enabled' is true, which this cpu device cannot do: use ds_configs/zero2.json",
    ):
        refuse_by_device(read_config("zero2_fp16"), "ds_configs/zero2_fp16.json")


def test_every_config_file_can_be_read():
    for file in (ROOT / "ds_configs").glob("*.json"):
        assert json.loads(file.read_text())["train_batch_size"] == "auto"


# ---- hand-over ----


def test_hand_over_accounts_for_every_key():
    from families.vlmo.tiny import tiny_model

    from vlmo_ds.families.vlmo.config import VLMoInit

    model, source = tiny_model({"textmlm": 1.0}), tiny_model({"mim": 1.0}).state_dict()
    rules = {"fresh": ["mlm_score.*"], "drop": ["mim_score.*", "transformer.mask_token"]}
    report = hand_over(model, source, VLMoInit(**rules), "there")
    assert len(report["fresh"]) == 6 and len(report["dropped"]) == 3
    assert all(torch.equal(model.state_dict()[k], source[k]) for k in report["loaded"])
    with pytest.raises(RecipeError, match=r"6 missing there: mlm_score.bias.*init.fresh"):
        hand_over(model, source, VLMoInit(drop=rules["drop"]), "there")
    with pytest.raises(RecipeError, match=r"3 that this stage does not have: transformer.mask_token.*init.drop"):
        hand_over(model, source, VLMoInit(fresh=rules["fresh"]), "there")
    with pytest.raises(RecipeError, match="'nothing.*' fits no weight"):
        hand_over(model, source, VLMoInit(**{**rules, "fresh": ["mlm_score.*", "nothing.*"]}), "there")
    other = tiny_model({"mim": 1.0}, embed_dim=64).state_dict()
    with pytest.raises(RecipeError, match="of another shape: .* checkpoint of another architecture"):
        hand_over(model, other, VLMoInit(**rules), "there")


# ---- the whole program ----


def fails(tmp_path, recipe: dict, *more: str, ranks: int = 1, config: dict | None = None) -> str:
    file = write_yaml(tmp_path / "recipe.yaml", recipe)
    (tmp_path / "ds.json").write_text(json.dumps(config or {"zero_optimization": {"stage": 1}}))
    command = [
        "train_ds.py",
        "--recipe",
        str(file),
        "--deepspeed_config",
        str(tmp_path / "ds.json"),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    processes = start_ranks([*command, *more], ranks)
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [2] * ranks, outputs
    assert sum(output.count("error: ") for output in outputs) == 1 and "Traceback" not in "".join(outputs)
    assert not list((tmp_path / "run").rglob("final")) and not (tmp_path / "run" / "metrics.jsonl").exists()
    return outputs[0]


def bad_shard(folder, **members) -> str:
    return str(write_tar(folder / "bad.tar", {k.replace("_", "."): v for k, v in members.items()}))


@pytest.mark.parametrize("ranks", [1, 2])
def test_missing_shard(tmp_path, synthetic, ranks):
    recipe = tiny_recipe(synthetic)
    recipe["stages"][2]["data"]["shards"] = ["/no/such/shard-{000..003}.tar"]
    assert "shards: /no/such/shard-000.tar does not exist" in fails(tmp_path, recipe, ranks=ranks)


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a_jpg": b"no image", "a_txt": b"a dog"}, "bad.tar:a: not a readable image"),
        ({"a_jpg": jpeg(), "a_txt": b"  "}, "bad.tar:a has an empty caption"),
        ({"a_txt": b"a dog"}, "bad.tar:a has no image; found .txt, accepted .jpg"),
    ],
)
def test_unusable_samples(tmp_path, synthetic, members, message):
    recipe = tiny_recipe(synthetic, tokenizer={"name": str(make_tokenizer(tmp_path))})
    recipe["stages"] = recipe["stages"][2:]
    recipe["stages"][0]["init"] = {}
    recipe["stages"][0]["data"]["shards"] = [bad_shard(tmp_path, **members)]
    output = fails(tmp_path, recipe)
    assert message in output and "stages.joint.data" in output


def make_tokenizer(folder):
    from vlmo_ds.data.tokenizer import train_tokenizer

    train_tokenizer(["a dog"], 50).save_pretrained(folder / "words")
    return folder / "words"


def test_tokenizer_that_is_not_there(tmp_path, synthetic):
    recipe = tiny_recipe(synthetic, tokenizer={"name": str(tmp_path / "nowhere")})
    assert "nowhere' is no folder here and cannot be loaded" in fails(tmp_path, recipe)


def test_checkpoint_of_another_architecture(tmp_path, synthetic):
    from safetensors.torch import save_file

    save_file({"transformer.cls_token": torch.zeros(1, 1, 99)}, tmp_path / "other.safetensors")
    recipe = tiny_recipe(synthetic)
    recipe["stages"][0]["init"] = {"weights": str(tmp_path / "other.safetensors")}
    output = fails(tmp_path, recipe)
    assert "transformer.cls_token is [1, 1, 99] there and [1, 1, 32] in this model" in output


def test_a_stage_without_its_predecessor(tmp_path, synthetic):
    assert "starts from stage 'text', which has not finished" in fails(
        tmp_path, tiny_recipe(synthetic), "--stages", "joint"
    )


def test_another_recipe_in_the_same_directory(tmp_path, synthetic):
    recipe = tiny_recipe(synthetic)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(synthetic, seed=5)))
    assert "was begun with another recipe" in fails(tmp_path, recipe)
    assert "holds a run already" in fails(tmp_path, recipe, "--resume", "never")


def test_too_few_arguments_are_explained():
    done = subprocess.run(
        [sys.executable, "train_ds.py", "--recipe", "no.yaml"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "recipe no.yaml does not exist; in launch/recipes: " in done.stderr
    assert run_ranks(["train_ds.py", "--help"], 1).count("key=value") >= 2


def test_a_held_out_picture_that_cannot_be_read(tmp_path, synthetic):
    recipe = tiny_recipe(synthetic)
    recipe["retrieval"]["shards"].append(bad_shard(tmp_path, a_jpg=jpeg((90, 90))[:-300], a_txt=b"a dog"))
    assert "retrieval: " in (output := fails(tmp_path, recipe, ranks=2))
    assert "bad.tar:a: not a readable image" in output
