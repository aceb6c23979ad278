"""Settings of DeepSpeed that are removed, unknown or known to be wrong are refused, with the key and the way out."""

import json

import pytest
import torch
from conftest import ROOT, tiny_recipe

from vlmo_ds.config import RecipeError, parse_recipe
from vlmo_ds.training.ds_config import check_recipe, merge, problems_of, read_config

ZERO3, BF16 = {"stage": 3}, {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    "config, message",
    [
        ({"amp": {"enabled": False}}, "'amp' was removed from DeepSpeed: use bf16 or fp16"),
        ({"elasticity": {}}, "'elasticity' was removed from DeepSpeed: start again with another number of ranks"),
        ({"quantize_training": {}}, "'quantize_training' was removed from DeepSpeed"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 8}}, "'zero_optimization.mics_shard_size' was removed from DeepSpeed: use zero_hpz_partition_size"),
        ({"zero_optimisation": ZERO3}, "'zero_optimisation' is not known (did you mean 'zero_optimization'?); DeepSpeed would ignore it"),
        ({"zero_optimization": {"stgae": 3}}, "'zero_optimization.stgae' is not known (did you mean 'stage'?)"),
        ({"zero_optimization": {"stage": 4}}, "'zero_optimization.stage' is 4; accepted: 0, 1, 2, 3"),
        ({"zero_optimization": 3}, "'zero_optimization' is 3, expected settings"),
        ({"bf16": True}, "'bf16' is True, expected settings such as {\"enabled\": true}"),
        ({"optimizer": "AdamW"}, "'optimizer' is 'AdamW', expected settings such as {\"type\": \"AdamW\"}"),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "'zero_optimization.offload_param' is 'cpu', expected settings"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "large"}}, "'zero_optimization.reduce_bucket_size' is 'large': Input should be a valid integer"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, "'zero_optimization.reduce_bucket_size' is 'auto', but the recipe has no value for it"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' belongs to the recipe"),
        ({"optimizer": {"type": "FusedLamb"}, "zero_optimization": {"stage": 1}}, "'optimizer.type' is 'FusedLamb' with ZeRO-1: LAMB scales by the norms of whole tensors"),
        ({"gradient_allreduce_op": "sum", "zero_optimization": ZERO3}, "'gradient_allreduce_op' is 'sum': the losses are written for gradients that are averaged"),
        ({**BF16, "data_types": {"grad_accum_dtype": "bf16"}}, "'data_types.grad_accum_dtype' is 'bf16': sums of many small gradients"),
        ({**BF16, "fp16": {"enabled": True}}, "'bf16.enabled' and 'fp16.enabled' are both true"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "'zero_optimization.offload_param.device' is 'cpu' with stage 2: it needs stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "'zero_optimization.offload_optimizer.nvme_path' is missing"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "disk"}}}, "'zero_optimization.offload_optimizer.device' is 'disk': Input should be 'none', 'cpu' or 'nvme'"),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}}, "'zero_optimization.zero_hpz_partition_size' is 8 with stage 2: ZeRO++ needs stage 3"),
        ({"activation_checkpointing": {"partition_activations": True}}, "'activation_checkpointing.partition_activations' is true: it splits activations over tensor-parallel ranks"),
        ({"activation_checkpointing": {"number_checkpoints": 4}}, "'activation_checkpointing.number_checkpoints' is 4; accepted: cpu_checkpointing"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named_with_a_way_out(config, message):
    found = list(problems_of(config))
    assert message in found[0], found


def test_all_problems_are_told_at_once(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"amp": {}, "zero_optimization": {"stage": 5}}))
    with pytest.raises(RecipeError, match=r"ds.json:\n  'amp' was removed .*\n  'zero_optimization.stage' is 5"):
        read_config(file)


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "ds_configs").glob("*.json")))
def test_shipped_configs_are_sound(file):
    config = json.loads((ROOT / "ds_configs" / file).read_text())
    needs_gpu = [p for p in problems_of(config) if "needs a GPU" in p or "device cannot do" in p]
    assert list(problems_of(config)) == needs_gpu
    assert not (needs_gpu and torch.cuda.is_available())


def stage_of(**changes):
    recipe = tiny_recipe(ROOT)
    recipe["stages"][0] |= changes
    return parse_recipe(recipe, "tiny").stages[0]


def test_bfloat16_micro_batches_are_summed_in_float32():
    stage = stage_of(global_batch_size=8, micro_batch_size=2)
    for zero in (1, 2, 3):
        merged = merge({**BF16, "zero_optimization": {"stage": zero}}, stage, 2)
        assert merged["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in merge({**BF16, "zero_optimization": ZERO3}, stage_of(), 2)
    assert "data_types" not in merge({"zero_optimization": ZERO3}, stage, 2)
    with pytest.raises(RecipeError, match="makes 2 micro-batches a step, whose gradients DeepSpeed sums in bfloat16"):
        merge(BF16, stage, 2)


def test_hpz_has_to_divide_the_ranks():
    with pytest.raises(RecipeError, match="zero_hpz_partition_size = 8, which does not divide 2 ranks"):
        merge({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, stage_of(), 2)


def test_offloaded_checkpoints_need_checkpoints():
    recipe = parse_recipe(tiny_recipe(ROOT), "tiny")
    with pytest.raises(
        RecipeError, match=r"cpu_checkpointing = true, but the recipe's\s+model.activation_checkpoint_every is 0"
    ):
        check_recipe({"activation_checkpointing": {"cpu_checkpointing": True}}, recipe)
