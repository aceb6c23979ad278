"""A run whose number of ranks and ZeRO stage change in the middle of every stage goes on as if they had not."""

import json
import os
import signal
import sys

import pytest
import torch
from conftest import start_ranks, tiny_recipe, write_yaml
from safetensors.torch import load_file

from vlmo_ds.families.interface import matches
from vlmo_ds.families.vlmo.config import TRAINABLE

LAYOUTS = ((2, 2), (1, 2), (4, 3), (2, 1))  # (ranks, ZeRO stage)
STEPS = 8


def worker(stop_at: int | None, arguments: list[str]) -> None:
    """train_ds.py, stopped by SIGTERM at the end of a given step of the run."""
    from vlmo_ds.training import monitor
    from vlmo_ds.training.run import main

    log = monitor.Monitor.log

    def logged(self, step, *rest):
        log(self, step, *rest)
        if self.offset + step + 1 == stop_at:  # the ranks agree on it in the step that follows
            os.kill(os.getpid(), signal.SIGTERM)

    monitor.Monitor.log = logged
    sys.exit(main(arguments))


def start(folder, data, ranks, zero, stop_at, *more):
    recipe = tiny_recipe(data, retrieval=None)
    for stage in recipe["stages"]:
        stage |= {"steps": STEPS}
    file = write_yaml(folder / "recipe.yaml", recipe)
    config = folder / f"zero{zero}.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": zero}, "steps_per_print": 10**9}))
    arguments = ["--recipe", str(file), "--deepspeed_config", str(config), "--output_dir", str(folder / "run"), *more]
    processes = start_ranks(["-c", f"from faults.test_elastic import worker; worker({stop_at}, {arguments!r})"], ranks)
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    return [p.returncode for p in processes], outputs[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, synthetic):
    folder = tmp_path_factory.mktemp("uninterrupted")
    codes, output = start(folder, synthetic, 1, 0, None)
    assert codes == [0], output[-3000:]
    return folder / "run"


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def final(run, stage):
    return load_file(run / "checkpoints" / stage / "final" / "model.safetensors")


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param([4, 12, 20], id="once"),
        pytest.param([2, 4, 6, 9, 11, 13, 15, 17, 19, 21, 23], id="all", marks=pytest.mark.long),
    ],
)
def test_ranks_and_zero_stage_change_in_the_middle_of_every_stage(tmp_path, synthetic, uninterrupted, stops):
    """Stopped after these steps of the run: once in each stage, or in each stage between every two layouts."""
    stops = [*stops, None]
    for launch, stop in enumerate(stops):
        ranks, zero = LAYOUTS[launch % 4]
        codes, output = start(tmp_path, synthetic, ranks, zero, stop)
        assert codes == [75 if stop else 0] * ranks, output[-3000:]
        if launch:
            assert f": resumed at step {(stops[launch - 1] - 1) % STEPS + 1} from" in output
    ours, theirs = metrics_of(tmp_path / "run"), metrics_of(uninterrupted)
    assert [(r["stage"], r["step"]) for r in ours] == [(r["stage"], r["step"]) for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["lr"] == b["lr"] and a["data/epoch"] == b["data/epoch"]
        for key in b:
            if key.startswith("loss"):
                assert a[key] == pytest.approx(b[key], rel=1e-5), (a["stage"], a["step"], key)
    for stage, before in (("text", "image"), ("joint", "text")):
        after, earlier = final(tmp_path / "run", stage), final(tmp_path / "run", before)
        frozen = [k for k in after if k in earlier and not matches(k, TRAINABLE["text_only"])]
        assert len(frozen) > 20
        if stage == "text":
            assert all(torch.equal(after[k], earlier[k]) for k in frozen)


def test_a_checkpoint_of_another_recipe_is_refused_with_the_difference(tmp_path, synthetic, uninterrupted):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    codes, _ = start(tmp_path / "first", synthetic, 1, 2, 3)
    assert codes == [75]
    path = tmp_path / "first/run/checkpoints/image/step-00000003"
    settings = ["stages.image.optimizer.lr=0.5", "model.mlp_ratio=2.0", "stages.image.checkpoint_every=7"]
    codes, output = start(tmp_path / "second", synthetic, 1, 2, None, "--resume", str(path), *settings)
    assert codes == [2]
    assert f"{path} was written by another recipe" in output
    assert "stages.image.optimizer.lr: was 0.001, is 0.5" in output and "model.mlp_ratio: was 4.0, is 2.0" in output
    assert "checkpoint_every" not in output
    codes, output = start(tmp_path / "second", synthetic, 2, 3, None, "--resume", str(path), "--stages", "image")
    assert codes == [0, 0], output[-3000:]
    assert f"image: resumed at step 3 from {path}" in output
    assert [r["step"] for r in metrics_of(tmp_path / "second/run")] == [4, 5, 6, 7, 8]
