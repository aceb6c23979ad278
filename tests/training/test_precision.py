"""What "auto" in a DeepSpeed config becomes on the devices of all ranks, and how a run goes on."""

import json

import pytest
from conftest import run_ranks, tiny_recipe, write_yaml

from vlmo_ds.config import RecipeError
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.training import precision
from vlmo_ds.training.ds_config import precision_of, with_precision
from vlmo_ds.training.precision import Native, all_can, begun_in, settle

AUTO = {"bf16": {"enabled": "auto"}}
NEW_CPU, OLD_CPU = Native("bf16", "A has avx512_bf16", "cpu"), Native("float32", "B has neither", "cpu")
NEW_GPU, OLD_GPU = Native("bf16", "H100 has 9.0", "cuda"), Native("fp16", "V100 has 7.0", "cuda")


@pytest.fixture
def cpu(monkeypatch):
    """Masks what this CPU is."""

    def mask(*flags: str) -> None:
        monkeypatch.setattr(precision, "cpu_flags", lambda: {"avx2", *flags})
        monkeypatch.setattr(precision, "cpu_name", lambda: "Masked")
        monkeypatch.setattr(precision.get_accelerator(), "device_name", lambda *_: "cpu")

    return mask


@pytest.mark.parametrize(
    "flags, expected, line",
    [
        ((), "float32", "precision: float32 (auto: Masked has neither avx512_bf16 nor amx_bf16)"),
        (("avx512_bf16",), "bf16", "precision: bf16 (auto: Masked has avx512_bf16)"),
        (("amx_bf16", "avx512_bf16"), "bf16", "precision: bf16 (auto: Masked has amx_bf16 and avx512_bf16)"),
    ],
)
def test_auto_is_what_the_device_computes_natively(cpu, flags, expected, line):
    cpu(*flags)
    config, told = settle(AUTO, None, Collector())
    assert precision_of(config) == expected and told == line
    assert config["bf16"]["enabled"] is (expected == "bf16")


def test_an_explicit_precision_means_what_it_says(cpu):
    cpu()
    config, told = settle({"bf16": {"enabled": True}}, None, Collector())
    assert precision_of(config) == "bf16"
    assert told.startswith(
        "warning: precision: bf16, as the DeepSpeed config says: ten times slower than float32, or more, here"
    )
    config, told = settle({"bf16": {"enabled": False}}, "bf16", Collector())
    assert (precision_of(config), told) == (
        "float32",
        "precision: float32, as the DeepSpeed config says (the run began in bf16)",
    )
    assert settle({}, None, Collector())[1] == "precision: float32, as the DeepSpeed config says"


def test_a_run_goes_on_in_the_precision_it_began_with(cpu):
    cpu("avx512_bf16")
    config, told = settle(AUTO, "float32", Collector())
    assert precision_of(config) == "float32"
    assert told == "precision: float32, in which the run began (a new one would take bf16: Masked has avx512_bf16)"
    cpu()
    config, told = settle(AUTO, "bf16", Collector())
    assert precision_of(config) == "bf16" and told.startswith("warning: precision: bf16, in which the run began")
    with pytest.raises(RecipeError, match="the run began in fp16, which a CPU cannot train in"):
        settle(AUTO, "fp16", Collector())


@pytest.mark.parametrize(
    "every, expected, reason",
    [
        ([NEW_GPU, NEW_GPU], "bf16", "H100 has 9.0"),
        ([NEW_GPU, OLD_GPU], "fp16", "rank 1's V100 has 7.0"),
        ([OLD_CPU, NEW_CPU], "float32", "rank 0's B has neither"),
        ([NEW_CPU, NEW_GPU], "float32", "the ranks are on devices of several kinds (cpu, cuda)"),
    ],
)
def test_all_ranks_take_what_every_one_of_them_can(every, expected, reason):
    assert all_can(every)[:2] == (expected, reason)


def test_fp16_that_auto_leads_to_scales_its_loss():
    config = with_precision({**AUTO, "zero_optimization": {"stage": 2}}, "fp16")
    assert config["bf16"]["enabled"] is False
    assert config["fp16"] == {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 500, "min_loss_scale": 1}
    assert with_precision({**AUTO, "fp16": {"enabled": "auto", "hysteresis": 4}}, "float32")["fp16"] == {
        "enabled": False,
        "hysteresis": 4,
    }


WORKER = """
import os, sys
from vlmo_ds.training import precision
flags = {"avx2", *os.environ["FLAGS"].split(",")[int(os.environ["RANK"])].split()}
precision.cpu_flags = lambda: flags
from vlmo_ds.training.command import main
sys.exit(main(sys.argv[1:]))
"""


def test_two_ranks_of_which_one_has_no_bf16(tmp_path, synthetic):
    """float32 on both, in the resolved config and in the checkpoint; then on in float32 where both have bf16."""
    recipe = tiny_recipe(synthetic, retrieval=None)
    recipe["stages"] = recipe["stages"][2:]
    recipe["stages"][0] |= {"steps": 4, "checkpoint_every": 2, "init": {}}
    (tmp_path / "ds.json").write_text(json.dumps({**AUTO, "zero_optimization": {"stage": 2}}))
    (tmp_path / "worker.py").write_text(WORKER)
    command = [str(tmp_path / "worker.py"), "--recipe", str(write_yaml(tmp_path / "recipe.yaml", recipe))]
    command += ["--deepspeed_config", str(tmp_path / "ds.json"), "--output_dir", str(tmp_path / "run")]
    output = run_ranks(command, 2, FLAGS="avx512_bf16,")
    assert "precision: float32 (auto: rank 1's" in output
    assert begun_in(tmp_path / "run") == "float32"
    state = json.loads((tmp_path / "run/checkpoints/joint/step-00000002/state.json").read_text())
    assert state["precision"] == "float32"
    assert "float32, in which the run began (a new one would take bf16" in run_ranks(command, 1, FLAGS="amx_bf16")


def test_bf16_is_trained_in_where_the_cpu_has_it(tmp_path, synthetic):
    recipe = tiny_recipe(synthetic, retrieval=None)
    recipe["stages"] = recipe["stages"][2:]
    recipe["stages"][0]["init"] = {}
    (tmp_path / "ds.json").write_text(json.dumps({**AUTO, "zero_optimization": {"stage": 1}}))
    (tmp_path / "worker.py").write_text(WORKER)
    command = [str(tmp_path / "worker.py"), "--recipe", str(write_yaml(tmp_path / "recipe.yaml", recipe))]
    command += ["--deepspeed_config", str(tmp_path / "ds.json"), "--output_dir", str(tmp_path / "run")]
    assert "precision: bf16 (auto: " in run_ranks(command, 1, FLAGS="avx512_bf16")
    assert json.loads((tmp_path / "run/ds_config.json").read_text())["joint"]["bf16"] == {"enabled": True}
