"""The float32 values that the optimiser holds: the model's exact ones at the start, and settable later."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from conftest import run_ranks, tiny_recipe, write_yaml

from vlmo_ds.training.engine import agreed_name

WORKER = """
import math, sys, torch, torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from families.vlmo.tiny import tiny_model
from vlmo_ds.recipe_file import load_recipe
from vlmo_ds.training.ds_config import merge
from vlmo_ds.training.engine import build_engine, start_distributed
from vlmo_ds.training.loop import clamp_scales
start_distributed()
stage = load_recipe(sys.argv[2]).stages[2]
config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": int(sys.argv[1])}, "steps_per_print": 10**9}
torch.manual_seed(0)
model = tiny_model().float()
torch.nn.init.constant_(model.logit_scale, 4.9)
before = {n: p.detach().clone() for n, p in model.named_parameters()}
assert any(v.numel() % 2 for v in before.values())
assert any(not torch.equal(v, v.bfloat16().float()) for v in before.values())
engine = build_engine(model, stage, merge(config, stage, dist.get_world_size()))
assert "torch._inductor.select_algorithm" not in sys.modules  # a second of imports that nothing here needs
for name, parameter in engine.module.named_parameters():
    value = safe_get_full_fp32_param(parameter)
    assert torch.equal(value.view(before[name].shape), before[name]), name
clamp_scales(engine, stage.family.clamped)
scales = [float(safe_get_full_fp32_param(p)) for p in (engine.module.logit_scale, engine.module.logit_vl_scale)]
assert abs(scales[0] - math.log(100)) < 1e-6 and scales[1] == float(before["logit_vl_scale"]), scales
dist.barrier()
dist.destroy_process_group()
print("DONE")
"""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_master_weights_are_exact_and_the_scales_are_clamped(tmp_path, stage):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    recipe = write_yaml(tmp_path / "recipe.yaml", tiny_recipe(tmp_path))
    assert "DONE" in run_ranks([str(script), str(stage), str(recipe)], 2)


def image_stage(folder, data, config, *settings):
    """Metrics of 5 steps of the image-only stage on one rank."""
    recipe = write_yaml(folder / "recipe.yaml", tiny_recipe(data, retrieval=None))
    command = ["train_ds.py", "--recipe", str(recipe), "--deepspeed_config", str(config), "--output_dir"]
    run_ranks([*command, str(folder / "run"), "--stages", "image", "stages.image.steps=5", *settings], 1)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "stage, half",
    [
        (3, True),
        *(pytest.param(*c, marks=pytest.mark.long) for c in ((1, True), (2, True), (1, False), (2, False), (3, False))),
    ],
)
def test_accumulated_micro_batches_make_the_same_steps(tmp_path, synthetic, stage, half):
    """Also in bfloat16, where the gradients of micro-batches are summed in float32."""
    config = tmp_path / "ds.json"
    precision = {"bf16": {"enabled": True}} if half else {}
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}, "steps_per_print": 10**9, **precision}))
    rows = {}
    for micro in (8, 2):
        (tmp_path / str(micro)).mkdir()
        settings = [f"stages.image.micro_batch_size={micro}", "stages.image.checkpoint_every=2"]
        rows[micro] = image_stage(tmp_path / str(micro), synthetic, config, *settings)
    assert [row["step"] for row in rows[2]] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(rows[2], rows[8], strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-2 if half else 2e-5), (ours["step"], key)


@pytest.mark.parametrize(
    "name",
    [
        "zero2_offload",
        "zero3_offload",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("zero1", "zero3_checkpointing")),
    ],
)
def test_every_shipped_config_trains(tmp_path, synthetic, name):
    settings = ["stages.image.optimizer.lr=0.01", "model.recompute=blocks"]
    rows = image_stage(tmp_path, synthetic, f"ds_configs/{name}.json", *settings, "stages.image.checkpoint_every=2")
    assert len(rows) == 5 and rows[-1]["loss"] < rows[0]["loss"]


def test_ranks_that_are_started_again_agree_on_a_new_name():
    """In a store that holds what the ranks before them have left."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    names = []
    for _ in range(5):
        stores = [dist.TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(3)]
        with ThreadPoolExecutor() as pool:
            found = {pool.submit(agreed_name, store, rank, 3, 20.0) for rank, store in enumerate(stores)}
            agreed = {future.result() for future in found}
        assert len(agreed) == 1
        names += agreed
    assert len(set(names)) == 5
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] have not come within 0 s"):
        agreed_name(server, 0, 3, 0.1)
