"""Losses and gradients that are not finite, and losses that jump."""

import json
import math

import pytest
import torch
from conftest import start_ranks, tiny_recipe, write_yaml
from safetensors.torch import load_file

from vlmo_ds.config import SpikeConfig
from vlmo_ds.families import FAMILIES
from vlmo_ds.training.guard import Guessing, Spike, SpikeGuard

STEPS = 12


def poisoned(factor: float, passes: list[int], rank: int, arguments: list[str]) -> None:
    """train_ds.py, in which some forward passes, counted by their data, give a loss times `factor` on one rank."""
    import os
    import sys

    from vlmo_ds.families.vlmo.model import VLMo
    from vlmo_ds.training.run import main

    step = VLMo.step

    def changed(self, batch):
        out = step(self, batch)
        if int(batch["negative_seed"]) % 1_000_003 in passes and int(os.environ["RANK"]) in (rank, -rank):
            name, loss = next(iter(out.losses.items()))
            out.losses[name] = loss * factor
            return out._replace(loss=sum(out.losses.values()))
        return out

    VLMo.step = changed
    sys.exit(main(arguments))


def run(folder, data, factor, passes, zero=2, half=False, rank=1, **changes):
    recipe = tiny_recipe(data, retrieval=None, **changes)
    for stage in recipe["stages"]:
        stage |= {"steps": STEPS, "checkpoint_every": 2}
    file = write_yaml(folder / "recipe.yaml", recipe)
    config = {"zero_optimization": {"stage": zero}, "steps_per_print": 10**9}
    if half:
        config["bf16"] = {"enabled": True}
    (folder / "ds.json").write_text(json.dumps(config))
    arguments = ["--recipe", str(file), "--deepspeed_config", str(folder / "ds.json"), "--stages", "image"]
    arguments += ["--output_dir", str(folder / "run")]
    code = f"from faults.test_guard import poisoned; poisoned(float({str(factor)!r}), {passes}, {rank}, {arguments!r})"
    processes = start_ranks(["-c", code], 2)
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    return [p.returncode for p in processes], outputs[0]


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "zero, half",
    [
        (0, False),
        pytest.param(0, True, marks=pytest.mark.long),
        pytest.param(1, False, marks=pytest.mark.long),
        (2, True),
        pytest.param(3, False, marks=pytest.mark.long),
        (3, True),
    ],
)
def test_steps_that_are_not_finite_are_left_out_and_written_down(tmp_path, synthetic, zero, half):
    codes, output = run(tmp_path, synthetic, math.nan, [0, 5], zero, half)
    assert codes == [0, 0], output[-3000:]
    rows = metrics_of(tmp_path)
    assert [row["step"] for row in rows if row["loss"] is None] == [1, 6]
    assert [row["skipped_steps"] for row in rows] == [1] * 5 + [2] * 7
    weights = load_file(tmp_path / "run/checkpoints/image/final/model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert rows[-1]["loss"] < rows[1]["loss"]
    files = sorted((tmp_path / "run/nonfinite").iterdir())
    assert [f.name for f in files] == ["image-step-00000001.json", "image-step-00000006.json"]
    ranks = json.loads(files[1].read_text())["ranks"]
    assert [entry["finite"] for entry in ranks] == [True, False] and ranks[1]["losses"] == [{"mim": "nan"}]
    assert all(len(set(entry["sample_id"])) == 4 for entry in ranks)
    assert f"step 6 left out, the loss of ranks [1] is not finite; its samples are in {files[1]}" in output


def test_too_many_in_a_row_end_the_run(tmp_path, synthetic):
    codes, output = run(tmp_path, synthetic, math.inf, [2, 3, 4, 5, 6], max_nonfinite_steps=2)
    assert codes == [3, 3], output[-3000:]
    assert "of 3 steps in a row are not finite, max_nonfinite_steps is 2" in output
    assert len(metrics_of(tmp_path)) == 5


SPIKE = {"window": 4, "factor": 3.0, "patience": 2, "max_rollbacks": 2}


def test_a_jump_of_the_loss_is_rolled_back_and_its_data_skipped(tmp_path, synthetic):
    codes, output = run(tmp_path, synthetic, 50, [6, 7], rank=0, loss_spike=SPIKE)
    assert codes == [0, 0], output[-3000:]
    message = "the loss has jumped from step 7 to 8: back to step 6, and on with the data that follows step 8"
    assert message in output and "image: resumed at step 6 from" in output
    rows = metrics_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    epochs = [round(row["data/epoch"] * 96 / 8) for row in rows]  # batches of 8 of 96 samples
    assert epochs == [1, 2, 3, 4, 5, 6, *range(9, 15)]
    assert max(row["loss"] for row in rows) < 3 * min(row["loss"] for row in rows)


def test_jumps_without_end_end_the_run(tmp_path, synthetic):
    codes, output = run(tmp_path, synthetic, 50, list(range(6, 40)), rank=0, loss_spike=SPIKE)
    assert codes == [3, 3], output[-3000:]
    assert "3 times back, loss_spike.max_rollbacks is 2" in output


def test_the_guard_needs_a_full_window_and_patience():
    guard = SpikeGuard(SpikeConfig(window=3, factor=2.0, patience=2, max_rollbacks=1))
    losses = [9.0, 1.0, 1.0, 3.0, 1.0, 5.0, math.nan, 5.0]
    found = [guard.look(step, loss) for step, loss in enumerate(losses, 1)]
    assert found == [None] * 7 + [Spike(7, 8)]
    again = SpikeGuard(guard.config, json.loads(json.dumps(guard.memory)))
    assert again.memory == guard.memory == {"losses": [1.0, 1.0, 1.0], "high": 2}


def test_a_task_that_keeps_guessing_is_named_once():
    family = FAMILIES["vlmo"]
    stage = family.stage(
        name="joint", tasks={"itc": 1.0, "itm": 1.0}, data={"shards": ["a"]}, global_batch_size=2, steps=9
    )
    guessing = Guessing(stage)
    said = [guessing.look(step, {"loss/itc": 3.0, "loss/itm": 0.6365 + 0.004 * (-1) ** step}) for step in range(600)]
    assert [step for step, lines in enumerate(said) if lines] == [499]
    assert "joint, step 499: the loss of itm has been 0.637 for 500 steps" in said[499][0]
    assert not any(
        guessing.look(step, {"loss/itc": 3.0, "loss/itm": loss}) for loss in (0.2, 0.6365) for step in range(600)
    )
    half = Guessing(stage)
    assert not any(half.look(step, {"loss/itc": 3.0, "loss/itm": 0.6365}) for step in range(300))
    again = Guessing(stage, json.loads(json.dumps(half.memory)))  # a run that goes on
    assert [step for step in range(300, 600) if again.look(step, {"loss/itc": 3.0, "loss/itm": 0.6365})] == [499]
    guessing = Guessing(stage)
    for step in range(1200):  # it leaves now and then
        assert not guessing.look(step, {"loss/itc": 3.0, "loss/itm": 0.62 if step % 400 == 0 else 0.6365})
