"""Settings of DeepSpeed that are removed, unknown or known to be wrong are refused, with the key and the way out."""

import json

import pytest
import torch
from conftest import ROOT, tiny_recipe

from vlmo_ds.config import RecipeError
from vlmo_ds.recipe_file import parse_recipe
from vlmo_ds.training.ds_config import (
    check_recipe,
    leaves,
    merge,
    precision_of,
    problems_of,
    read_config,
    refuse_by_device,
    refuse_by_models,
    with_precision,
)
from vlmo_ds.training.ds_schema import MODELS, removed, settings_of

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
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "large"}}, "'zero_optimization.reduce_bucket_size' is 'large', expected a whole number"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, "'zero_optimization.reduce_bucket_size' is 'auto', but the recipe has no value for it"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' belongs to the recipe"),
        ({"optimizer": {"type": "FusedLamb"}, "zero_optimization": {"stage": 1}}, "'optimizer.type' is 'FusedLamb' with ZeRO-1: LAMB scales by the norms of whole tensors"),
        ({"gradient_allreduce_op": "sum", "zero_optimization": ZERO3}, "'gradient_allreduce_op' is 'sum': the losses are written for gradients that are averaged"),
        ({**BF16, "data_types": {"grad_accum_dtype": "bf16"}}, "'data_types.grad_accum_dtype' is 'bf16': sums of many small gradients"),
        ({**BF16, "fp16": {"enabled": True}}, "'bf16.enabled' and 'fp16.enabled' are both true"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "'zero_optimization.offload_param.device' is 'cpu' with stage 2: it needs stage 3"),
        ({"fp16": {"enabled": True, "auto_cast": True}}, "'fp16.auto_cast' is true: it rounds features to 16 bits"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "'zero_optimization.offload_optimizer.nvme_path' is missing"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "disk"}}}, "'zero_optimization.offload_optimizer.device' is 'disk'; accepted: 'none', 'cpu' or 'nvme'"),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}}, "'zero_optimization.zero_hpz_partition_size' is 8 with stage 2: ZeRO++ needs stage 3"),
        ({"activation_checkpointing": {"partition_activations": True}}, "'activation_checkpointing.partition_activations' is true: it splits activations over tensor-parallel ranks"),
        ({"bf16": {"enabled": True, "loss_scale": 0, "hysteresis": 2}}, "'bf16.loss_scale' is not known; accepted in 'bf16': bf16_master_weights_and_grads, "),
        ({"bf16": {"enable": True}}, "'bf16.enable' is not known (did you mean 'enabled'?)"),
        ({"bf16": {"enabled": "yes please"}}, "'bf16.enabled' is 'yes please', expected true or false"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "'bf16.bf16_optimizer_states' is true: checkpoints and hand-overs need float32"),
        ({"fp16": {"enabled": True, "initial_scale": 16}}, "'fp16.initial_scale' is not known (did you mean 'initial_scale_power'?)"),
        ({"wandb": {"enabled": True}}, "'wandb.enabled' is true, but the package wandb is not installed"),
        ({"wandb": {"enable": True}}, "'wandb.enable' is not known (did you mean 'enabled'?)"),
        ({"tensorboard": True}, "'tensorboard' is True, expected settings such as {\"enabled\": true}"),
        ({"csv_monitor": {"path": "x"}}, "'csv_monitor.path' is not known"),
        ({"comms_logger": True}, "'comms_logger' is True, expected settings"),
        ({"comms_logger": {"prof_ops": "all_reduce"}}, "'comms_logger.prof_ops' is 'all_reduce', expected a list"),
        ({"flops_profiler": True}, "'flops_profiler' is True, expected settings"),
        ({"flops_profiler": {"profile_stp": 1}}, "'flops_profiler.profile_stp' is not known (did you mean 'profile_step'?)"),
        ({"aio": {"block_size": "1M"}}, "'aio.block_size' is '1M', expected a whole number"),
        ({"aio": [1]}, "'aio' is [1], expected settings"),
        ({"steps_per_print": "inf"}, "'steps_per_print' is 'inf', expected a whole number"),
        ({"steps_per_print": float("inf")}, "'steps_per_print' is inf, expected a whole number"),
        ({"steps_per_print": 0}, "'steps_per_print' is 0; accepted: a whole number from 1 on"),
        ({"prescale_gradients": True, "gradient_predivide_factor": 8.0, "zero_optimization": {"stage": 2}}, "'gradient_predivide_factor' is 8.0, which DeepSpeed does not support under ZeRO"),
        ({"communication_data_type": "int8"}, "'communication_data_type' is 'int8'; accepted: 'fp16', 'bf16', 'fp32'"),
        ({"data_types": {"grad_accumulation": "fp32"}}, "'data_types.grad_accumulation' is not known"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_mem": True}}}, "'zero_optimization.offload_param.pin_mem' is not known (did you mean 'pin_memory'?)"),
        ({"zero_optimization": {"stage": True}}, "'zero_optimization.stage' is True; accepted: 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "true"}}, "'zero_optimization.overlap_comm' is 'true', expected true or false"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "'torch_autocast' computes contrastive features and logits in 16 bits"),
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
def test_shipped_configs_are_sound(file, monkeypatch):
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda builder: True)
    config = json.loads((ROOT / "ds_configs" / file).read_text())
    assert list(problems_of(config)) == []
    assert precision_of(config) == ("fp16" if file == "zero2_fp16.json" else "auto")
    refuse_by_models(read_config(file.removesuffix(".json")), file)
    if file in ("zero2_fp16.json", "zeropp.json") and not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="needs a GPU|device cannot do"):
            refuse_by_device(config, file)
    else:
        refuse_by_device(config, file)


def test_states_on_a_disk_without_what_that_needs(monkeypatch):
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda builder: False)
    with pytest.raises(
        RecipeError, match=r"ds.json:\n  'zero_optimization.offload_optimizer.device' is 'nvme', .* libaio"
    ):
        refuse_by_device(read_config("zero3_nvme"), "ds.json")


def test_what_hugging_face_users_paste_is_taken(tmp_path):
    """The ZeRO-3 config of its DeepSpeed page, with its automatic sizes and scheduler."""
    pasted = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    }  # fmt: skip
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(pasted))
    config = read_config(file)
    refuse_by_models(config, file)
    merged = merge(with_precision(config, "bf16"), stage_of(), 2)
    assert merged["zero_optimization"]["reduce_bucket_size"] == 5e7 and "scheduler" not in merged
    assert not [path for path, value in leaves(merged) if value == "auto"]
    file.write_text(json.dumps({"bf16": "auto"}))
    assert precision_of(read_config(file)) == "auto"


def test_values_are_compared_with_the_installed_deepspeed(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}))
    with pytest.raises(
        RecipeError, match="'zero_optimization.reduce_bucket_size' is -1: Input should be greater than 0"
    ):
        refuse_by_models(read_config(file), file)


def test_every_section_is_found_in_the_installed_deepspeed():
    for section in MODELS:
        assert settings_of(section), section
    assert settings_of("zero_optimization")["overlap_comm"] == "bool" and settings_of("fp16")["loss_scale"] == "float"
    assert "stage3_prefetch_bucket_size" in settings_of("zero_optimization")
    assert {"amp", "elasticity"} <= removed("_REMOVED_TOP_LEVEL_CONFIG_KEYS")


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
    with pytest.raises(RecipeError, match=r"cpu_checkpointing = true, but the recipe's\s+model.recompute is cheap"):
        check_recipe({"activation_checkpointing": {"cpu_checkpointing": True}}, recipe)
