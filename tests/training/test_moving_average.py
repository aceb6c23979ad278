"""The moving average of the weights is what a dense float64 average of the weights of every step is, however a run is spread."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_ranks, tiny_recipe, write_yaml
from safetensors.torch import load_file, save_file

from vlmo_ds.training.checkpoint import Reader, list_checkpoints, main

DECAY, EVERY = 0.9, 2


def worker(folder: str, arguments: list[str]) -> None:
    """train_ds.py, with the weights after every step, and those before the first, written down."""
    from vlmo_ds.training import run
    from vlmo_ds.training.moving_average import MovingAverage
    from vlmo_ds.training.state import layout_of

    def note(engine, step: int) -> None:
        layout = layout_of(engine)
        found = {name: layout.full(p).float().cpu().flatten().clone() for name, p in layout.parameters.items()}
        if engine.global_rank == 0:
            save_file(found, f"{folder}/{step}.safetensors")

    begin, follow = MovingAverage.__init__, MovingAverage.follow

    def begun(self, engine, config, reader=None):
        begin(self, engine, config, reader)
        if reader is None:
            note(engine, 0)

    def followed(self, step):
        note(self.engine, step)
        follow(self, step)

    MovingAverage.__init__, MovingAverage.follow = begun, followed
    sys.exit(run.main(arguments))


def train(folder: Path, data: Path, ranks: int, zero: int, steps: int, warmup: bool) -> Path:
    recipe = tiny_recipe(data, retrieval=None)
    recipe["stages"] = recipe["stages"][-1:]
    recipe["stages"][0] |= {"steps": steps, "checkpoint_every": 3, "init": {"weights": "fresh"}}
    recipe["stages"][0]["ema"] = {"decay": DECAY, "every": EVERY, "warmup": warmup}
    recipe_file = write_yaml(folder / "recipe.yaml", recipe)
    spread = {"stage": zero} | ({"stage3_param_persistence_threshold": 0} if zero == 3 else {})
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": spread, "steps_per_print": 10**9}))
    arguments = ["--recipe", str(recipe_file), "--deepspeed_config", str(folder / "ds.json")]
    arguments += ["--output_dir", str(folder / "run")]
    code = f"from training.test_moving_average import worker; worker({str(folder)!r}, {arguments!r})"
    run_ranks(["-c", code], ranks)
    return folder / "run" / "checkpoints" / recipe["stages"][0]["name"]


def dense(folder: Path, steps: int, warmup: bool) -> dict[str, torch.Tensor]:
    """The average in float64."""
    found = {name: value.double() for name, value in load_file(folder / "0.safetensors").items()}
    for step in range(EVERY, steps + 1, EVERY):
        keep = (min(DECAY, (1 + step) / (10 + step)) if warmup else DECAY) ** EVERY
        for name, value in load_file(folder / f"{step}.safetensors").items():
            found[name] = keep * found[name] + (1 - keep) * value.double()
    return found


def check(found: dict[str, torch.Tensor], folder: Path, steps: int, warmup: bool) -> None:
    wanted, last = dense(folder, steps, warmup), load_file(folder / f"{steps}.safetensors")
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name].flatten().double(), value, rtol=1e-6, atol=1e-6 * float(value.abs().max())
        )
    moved = [name for name in wanted if not torch.allclose(wanted[name].float(), last[name], rtol=1e-3, atol=1e-5)]
    assert len(moved) > len(wanted) / 2, "the average is the last weights"


SHORT = (((2, 2), (1, 3)), ((1, 0), (2, 1)))
ALL = [((ranks, zero), (4 // ranks, 3 - zero)) for ranks in (1, 2, 4) for zero in (0, 1, 2, 3)]


@pytest.mark.parametrize(
    "first, second", [*SHORT, *(pytest.param(*pair, marks=pytest.mark.long) for pair in ALL if pair not in SHORT)]
)
def test_it_is_a_dense_average_through_a_resume_at_another_rank_count(tmp_path, synthetic, first, second):
    warmup = first[1] != 2
    stage = train(tmp_path, synthetic, *first, steps=4, warmup=warmup)
    check(load_file(stage / "ema" / "model.safetensors"), tmp_path, 4, warmup)
    stage = train(tmp_path, synthetic, *second, steps=8, warmup=warmup)
    assert load_file(tmp_path / "8.safetensors").keys() == load_file(tmp_path / "4.safetensors").keys()
    check(load_file(stage / "ema" / "model.safetensors"), tmp_path, 8, warmup)
    final, ema = (load_file(stage / name / "model.safetensors") for name in ("final", "ema"))
    assert final.keys() == ema.keys()
    newest = list_checkpoints(stage)[-1]
    assert Reader(newest).state["step"] == 8
    check(Reader(newest).weights(average=True), tmp_path, 8, warmup)
    assert main(["consolidate", str(newest), "--weights", "ema", "--output", str(tmp_path / "one.safetensors")]) == 0
    torch.testing.assert_close(load_file(tmp_path / "one.safetensors"), ema, rtol=0, atol=0)
