"""Three stages end to end: what is frozen stays to the bit, hand-over, memory, ZeRO-3's gathers, resume after kill -9."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, free_port, run_ranks, start_ranks, tiny_recipe, write_yaml
from safetensors.torch import load_file
from training import gathers

from vlmo_ds.config import RecipeError
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation.report import duration
from vlmo_ds.families.interface import matches
from vlmo_ds.families.vlmo.config import TRAINABLE
from vlmo_ds.recipe_file import load_recipe, parse_recipe
from vlmo_ds.training.loop import Run, build_model

BF16 = {"bf16": {"enabled": True}, "steps_per_print": 10**9}


def ds_file(folder, stage, **more):
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}, "steps_per_print": 10**9, **more}))
    return str(path)


def arguments(folder, data, stage, precision=None, **changes):
    recipe = write_yaml(folder / "recipe.yaml", tiny_recipe(data, **changes))
    config = ds_file(folder, stage, **(precision or {}))
    return ["train_ds.py", "--recipe", str(recipe), "--deepspeed_config", config, "--output_dir", str(folder / "run")]


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def finished(request, tmp_path_factory, synthetic):
    """A finished run on two ranks in bf16, with recomputation of activations under ZeRO-3 (frozen parameters included)."""
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    command = arguments(folder, synthetic, request.param, BF16)
    output = run_ranks([*command, f"model.recompute={'blocks' if request.param == 3 else 'cheap'}"], 2)
    return folder / "run", output


def final(run, stage):
    return load_file(run / "checkpoints" / stage / "final" / "model.safetensors")


@pytest.mark.parametrize("stage, trains", [("image", "mlp_imag"), ("text", "mlp_text")])
def test_what_a_stage_does_not_train_stays_to_the_bit(finished, stage, trains):
    run, _ = finished
    recipe = load_recipe(run / "recipe.yaml")
    config = next(s for s in recipe.stages if s.name == stage)
    source = None if stage == "image" else final(run, "image")
    before = {k: v.clone() for k, v in build_model(recipe, config, source, "image", Collector()).state_dict().items()}
    after = final(run, stage)
    assert before.keys() == after.keys()
    frozen = [k for k in after if not matches(k, TRAINABLE[config.trainable])]
    kinds = {
        "image": ("mlp_text", "mlp_vl", "norm2_text", "text_embeddings"),
        "text": ("attn", "norm1", "mlp_imag", "mlp_vl", "gamma", "patch_embed", "norm2_imag", "cls_token"),
    }
    for kind in kinds[stage]:
        assert any(kind in k for k in frozen), kind
    assert [k for k in frozen if not torch.equal(before[k], after[k])] == []
    unchanged = [k for k in after if k not in frozen and "position" not in k and torch.equal(before[k], after[k])]
    assert unchanged == []
    assert sum(trains in k for k in after if k not in frozen) == 12


def test_text_stage_leaves_the_image_rows_of_shared_tables(finished):
    run, _ = finished
    before, after = final(run, "image"), final(run, "text")
    rows = (2 * 4 - 1) ** 2 + 3  # image distances of a 4 x 4 grid
    table = "relative_position_bias_table"
    assert torch.equal(before[table][:rows], after[table][:rows]) and not torch.equal(before[table], after[table])
    assert torch.equal(before["token_type_embeddings.weight"][1], after["token_type_embeddings.weight"][1])


def test_vl_experts_start_from_the_text_experts(finished):
    run, output = finished
    recipe, text = load_recipe(run / "recipe.yaml"), final(run, "text")
    model = build_model(recipe, recipe.stages[2], text, "text", Collector()).state_dict()
    prefix = "transformer.blocks.2."
    assert torch.equal(model[prefix + "mlp_vl.fc1.weight"], text[prefix + "mlp_text.fc1.weight"])
    assert torch.equal(model[prefix + "norm2_vl.bias"], text[prefix + "norm2_text.bias"])
    assert "joint: weights from" in output and "0 dropped" in output


def test_a_run_leaves_what_it_should(finished):
    run, output = finished
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"], r["step_of_run"]) for r in records] == [
        (s, i + 1, n * 3 + i + 1) for n, s in enumerate(("image", "text", "joint")) for i in range(3)
    ]
    joint = records[-1]
    assert {
        "loss",
        "loss/mlm",
        "loss/itc",
        "loss/itm",
        "lr",
        "grad_norm",
        "itc/logit_scale",
        "itm/accuracy",
        "itc/i2t_accuracy",
        "mlm/accuracy",
        "data/replaced",
        "data/epoch",
    } <= set(joint)
    assert joint["loss"] == pytest.approx(0.25 * joint["loss/mlm"] + joint["loss/itc"] + joint["loss/itm"])
    assert {p.name for p in run.iterdir()} == {
        "recipe.yaml",
        "ds_config.json",
        "stages.json",
        "metrics.jsonl",
        "pace.jsonl",
        "tensorboard",
        "checkpoints",
        "report",
        "retrieval.json",
        "tokenizer",
        "data.json",
        ".lock",
    }
    assert "text to image   itc+itm" in output and "samples/s" in output
    page = (run / "report" / "index.html").read_text()
    assert page.count("<svg") >= 4 and "data:image/jpeg;base64" in page and "http" not in page.replace("http-equiv", "")
    text = " ".join(re.sub("<[^>]*>", " ", page).split())
    noted = json.loads((run / "stages.json").read_text())
    for stage, entry in noted.items():
        assert 0 < entry["seconds"] < 240 and 0 < entry["trained"] <= entry["parameters"]
        assert f"{stage} bf16 {entry['parameters']:,} {entry['trained']:,} {duration(entry['seconds'])}" in text
    assert list(noted) == ["image", "text", "joint"] and noted["text"]["trained"] < noted["text"]["parameters"]
    for shown in (
        "(2 ranks)",
        f"torch {torch.__version__}",
        "vlffn_start_layer_index: 2",
        "train_batch_size",
        "whole run",
    ):
        assert shown in text, shown
    resolved = json.loads((run / "ds_config.json").read_text())["joint"]
    assert resolved["train_batch_size"] == 8 and resolved["train_micro_batch_size_per_gpu"] == 4


def test_starting_a_finished_run_again_does_nothing(finished, synthetic):
    run, _ = finished
    before = (run / "metrics.jsonl").read_bytes()
    command = arguments(run.parent, synthetic, 2, BF16)
    recompute = load_recipe(run / "recipe.yaml").model.recompute
    output = run_ranks([*command, f"model.recompute={recompute}"], 2)
    assert output.count("finished already") == 3
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.long
def test_resume_after_kill_9_equals_the_uninterrupted_run(tmp_path, synthetic):
    changes = {}
    recipe = tiny_recipe(synthetic, retrieval=None)
    for stage in recipe["stages"]:
        stage.update(steps=8, checkpoint_every=3)
    recipe["model"]["drop_path_rate"] = 0.1
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = arguments(tmp_path / "a", synthetic, 2, BF16, **recipe, **changes)
    run_ranks(whole, 2)
    broken = arguments(tmp_path / "b", synthetic, 2, BF16, **recipe, **changes)
    metrics = tmp_path / "b" / "run" / "metrics.jsonl"
    for moment in (5, 14, 21):  # in each of the stages
        processes = start_ranks(broken, 2)
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= moment):
            assert time.monotonic() < deadline and all(p.poll() is None for p in processes), processes[0].communicate()[
                0
            ]
            time.sleep(0.01)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.communicate()
    output = run_ranks(broken, 2)
    assert "resumed at step" in output or "finished already" in output
    assert metrics.read_text() == (tmp_path / "a" / "run" / "metrics.jsonl").read_text()
    a, b = final(tmp_path / "a" / "run", "joint"), final(tmp_path / "b" / "run", "joint")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert list((tmp_path / "b" / "run").rglob("*.tmp")) == []


def test_zero3_gathers_each_weight_at_most_twice_in_a_joint_forward(tmp_path, synthetic):
    of_run = arguments(tmp_path, synthetic, 3, gathers.GATHERED_ALWAYS, retrieval=None)[1:]
    run_ranks(gathers.command(tmp_path, "vlmo_ds.families.vlmo.model:VLMo", of_run), 2)
    counts = json.loads((tmp_path / "gathers.json").read_text())
    assert {k: v for k, v in counts.items() if v not in (1, 2)} == {}
    for i in range(3):
        for part in ("attn.qkv.weight", "attn.proj.weight", "norm1.weight"):
            assert counts[f"transformer.blocks.{i}.{part}"] == 2
    assert (
        counts["transformer.blocks.0.mlp_text.fc1.weight"] == 2
        and counts["transformer.blocks.0.mlp_imag.fc1.weight"] == 2
    )
    assert counts["transformer.blocks.2.mlp_vl.fc1.weight"] == 2
    assert counts["transformer.blocks.2.mlp_text.fc1.weight"] == 1  # text alone passes here, and in wave 1 only
    assert counts["mlm_score.decoder.weight"] == 1


MEMORY = """
import gc, sys, torch
from vlmo_ds.training import run
train = run.train_stage
def live():
    gc.collect()
    tensors = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
def measured(*args, **kwargs):
    before = live()
    train(*args, **kwargs)
    print("MEMORY", before, live(), flush=True)
run.train_stage = measured
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_memory_is_back_to_its_baseline_after_each_stage(tmp_path, synthetic, stage):
    (tmp_path / "memory.py").write_text(MEMORY)
    model = {**tiny_recipe(synthetic)["model"], "embed_dim": 64, "depth": 6, "vlffn_start_layer_index": 5}
    command = arguments(tmp_path, synthetic, stage, BF16, retrieval=None, model=model)[1:]
    output = run_ranks([str(tmp_path / "memory.py"), *command], 2)
    rows = [line.split()[1:] for line in output.splitlines() if line.startswith("MEMORY")]
    assert len(rows) == 3
    baseline = int(rows[0][0])
    weights = (tmp_path / "run/checkpoints/joint/final/model.safetensors").stat().st_size
    for _, after in rows:
        assert int(after) - baseline < weights / 2, rows


@pytest.mark.parametrize("launcher", ["python", "deepspeed", pytest.param("torchrun", marks=pytest.mark.long)])
def test_every_launcher_starts_the_same_program(tmp_path, synthetic, launcher):
    command = arguments(tmp_path, synthetic, 1, BF16, retrieval=None)
    binaries = os.path.dirname(sys.executable)
    start = {
        "python": [sys.executable],
        "torchrun": [f"{binaries}/torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())],
        "deepspeed": [f"{binaries}/deepspeed", "--num_gpus", "2", "--master_port", str(free_port())],
    }[launcher]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "PATH": f"{binaries}:{os.environ['PATH']}"
    }
    done = subprocess.run(
        [*start, *command, "--stages", "image"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "checkpoints" / "image" / "final" / "model.safetensors").exists()


def test_initial_weights_in_several_files(tmp_path):
    one, two = {"a.weight": torch.ones(2)}, {"b.weight": torch.zeros(3)}
    torch.save(one, tmp_path / "one.pt")
    torch.save({"model": two}, tmp_path / "two.pt")
    recipe = tiny_recipe(ROOT)
    files = [str(tmp_path / name) for name in ("one.pt", "two.pt")]
    recipe["stages"][0]["init"] = {"weights": files}
    run = Run(parse_recipe(recipe, "test"), {}, tmp_path, None, None, None, None, {})
    found, origins = run.initial_weights(run.recipe.stages[0])
    assert found.keys() == {"a.weight", "b.weight"} and [str(file) for file in origins] == files
    torch.save({**two, **one}, tmp_path / "two.pt")
    with pytest.raises(RecipeError, match="two.pt has a.weight, as a file before it in the list"):
        run.initial_weights(run.recipe.stages[0])
