"""The float32 values that the optimiser holds: the model's exact ones at the start, and settable later."""

import pytest
from conftest import run_ranks, tiny_recipe, write_yaml

WORKER = """
import math, sys, torch, torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from models.tiny import tiny_model
from vlmo_ds.config import load_recipe
from vlmo_ds.training.engine import build_engine, merge, start_distributed
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
for name, parameter in engine.module.named_parameters():
    value = safe_get_full_fp32_param(parameter)
    assert torch.equal(value.view(before[name].shape), before[name]), name
clamp_scales(engine.module)
scales = [float(safe_get_full_fp32_param(p)) for p in (engine.module.logit_scale, engine.module.logit_vl_scale)]
assert abs(scales[0] - math.log(100)) < 1e-6 and scales[1] == float(before["logit_vl_scale"]), scales
dist.destroy_process_group()
print("DONE")
"""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_master_weights_are_exact_and_the_scales_are_clamped(tmp_path, stage):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    recipe = write_yaml(tmp_path / "recipe.yaml", tiny_recipe(tmp_path))
    assert "DONE" in run_ranks([str(script), str(stage), str(recipe)], 2)
