"""BLIP's runs on real processes: the same losses, queue and teacher on any ranks and under any ZeRO stage; killed runs go on."""

import json
import random
import sys

import pytest
import torch
from conftest import run_ranks, start_ranks, write_yaml
from families.blip.tiny import tiny_blip
from faults.runs import killed_at
from safetensors.torch import load_file

from vlmo_ds.training.checkpoint import Reader

QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr")


def arguments(folder, recipe, zero: int, **config) -> list[str]:
    folder.mkdir(exist_ok=True)
    file = write_yaml(folder / "recipe.yaml", recipe)
    spread = {
        "stage": zero,
        **({"stage3_param_persistence_threshold": 200} if zero == 3 else {}),
    }  # some weights stay, some go
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": spread, "steps_per_print": 10**9, **config}))
    command = ["train_ds.py", "--recipe", str(file), "--deepspeed_config", str(folder / "ds.json")]
    return [*command, "--output_dir", str(folder / "run")]


def recipe_of(data, steps: int, **stage) -> dict:
    recipe = tiny_blip(data, retrieval=None, captioning=None)
    for one in recipe["stages"]:
        one |= {"steps": steps, **stage}
        one["optimizer"] |= {"lr": 1e-4, "eps": 1e-6}  # gradients that are nothing but rounding move nothing
    return recipe


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def run(folder, recipe, ranks: int, zero: int, **config) -> tuple[list[dict], dict]:
    """(metrics, final weights)."""
    run_ranks(arguments(folder, recipe, zero, **config), ranks)
    return result_of(folder)


def result_of(folder) -> tuple[list[dict], dict]:
    return rows_of(folder), load_file(folder / "run" / "checkpoints" / "all" / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, synthetic):
    return run(tmp_path_factory.mktemp("blip"), recipe_of(synthetic, 15), 1, 0)


SHORT = ((2, 2), (2, 3))  # of all; the others are their neighbours


@pytest.mark.parametrize("ranks, zero", [
    pytest.param(r, z, marks=() if (r, z) in SHORT else pytest.mark.long)
    for r in (1, 2, 4) for z in (0, 1, 2, 3) if (r, z) != (1, 0)
])  # fmt: skip
def test_losses_queue_and_teacher_do_not_depend_on_ranks_or_zero(tmp_path, synthetic, reference, ranks, zero):
    """30 steps, a queue of 20 with batches of 8."""
    rows, final = run(tmp_path, recipe_of(synthetic, 15), ranks, zero)
    same(rows, final, *reference)


def same(rows, final, expected_rows, expected_final, tasks=("itc", "itm", "lm")) -> None:
    assert len(rows) == len(expected_rows)
    for ours, theirs in zip(rows, expected_rows, strict=True):
        for task in tasks:
            if f"loss/{task}" in theirs:
                assert ours[f"loss/{task}"] == pytest.approx(theirs[f"loss/{task}"], rel=1e-5), (ours["step"], task)
    assert final.keys() == expected_final.keys()
    for name, value in expected_final.items():
        if name in ("idx_queue", "queue_ptr"):
            assert torch.equal(final[name], value)
        elif name in QUEUES or "_m." in name:
            torch.testing.assert_close(final[name], value, rtol=1e-4, atol=2e-5)


def neighbours(arguments: list[str]) -> None:
    """train_ds.py, in which the wrong image and the wrong text of a pair are those of its neighbour."""
    from vlmo_ds.families.blip.model import BLIP
    from vlmo_ds.objectives.itm import Negatives
    from vlmo_ds.training.run import main

    def beside(self, batch, image, text):
        rows = torch.arange(len(text)) ^ 1
        return Negatives(rows, rows)

    BLIP.drawn = beside
    sys.exit(main(arguments))


def test_accumulation_does_not_change_contrast_and_matching(tmp_path, synthetic):
    """One micro-batch or two: the teacher's keys of both are there for either. Wrong pairs are given: they are drawn among those of
    a micro-batch."""
    found = []
    for micro in (8, 4):
        recipe = recipe_of(synthetic, 8, micro_batch_size=micro)
        recipe["stages"][0]["tasks"] = {"itc": None}
        recipe["stages"][1] |= {"tasks": {"itc": None, "itm": None}, "init": {"fresh": ["itm_head.*"]}}
        given = arguments(tmp_path / str(micro), recipe, 2)[1:]
        run_ranks(["-c", f"from families.blip.test_runs import neighbours; neighbours({given!r})"], 1)
        found.append(result_of(tmp_path / str(micro)))
    assert "loss/itm" in found[0][0][-1]
    same(*found[1], *found[0], ("itc", "itm"))


@pytest.mark.parametrize("zero, half", [
    pytest.param(0, False, marks=pytest.mark.long), (2, True), (3, False), pytest.param(3, True, marks=pytest.mark.long),
])  # fmt: skip
def test_the_result_holds_the_averaged_teacher(tmp_path, synthetic, zero, half):
    """Recomputed from the weights before every step."""
    recipe = recipe_of(synthetic, 6, checkpoint_every=1) | {"keep_checkpoints": 20}
    recipe["model"]["momentum"] = 0.9
    config = {"bf16": {"enabled": True}} if half else {}
    _, final = run(tmp_path, recipe, 2, zero, **config)
    stages = tmp_path / "run" / "checkpoints"
    weights = load_file(stages / "contrast" / "final" / "model.safetensors")
    teacher = {name: value.double() for name, value in weights.items() if "_m." in name}
    assert len(teacher) > 50
    for step in range(6):
        if step:
            weights = Reader(stages / "all" / f"step-{step:08d}").weights()
        for name, value in teacher.items():
            student = weights[name.replace("_m.", ".")]
            student = student.bfloat16() if half else student
            teacher[name] = 0.9 * value + 0.1 * student.double()
    moved = 0
    for name, value in teacher.items():
        torch.testing.assert_close(final[name].double(), value, rtol=1e-5, atol=1e-6)
        moved += not torch.equal(final[name], weights[name.replace("_m.", ".")])
    assert moved > 50  # of a teacher that is its student nothing could be told
    assert final["image_queue"].dtype == final["text_queue"].dtype == torch.float32
    norms = final["image_queue"].norm(dim=0)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-5, atol=1e-5)  # bfloat16 would leave 4e-3


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.long)])
def test_a_killed_run_goes_on_to_the_last_digit(tmp_path, synthetic, kills):
    """Killed at moments of its own choice, up to 0.3 s after one of its 30 steps."""
    recipe = recipe_of(synthetic, 15, checkpoint_every=4)
    run_ranks(arguments(tmp_path / "whole", recipe, 3), 2)
    command = arguments(tmp_path / "killed", recipe, 3)
    metrics = tmp_path / "killed" / "run" / "metrics.jsonl"
    moments = random.Random(kills)
    for number in range(kills):
        killed_at(command, 2, metrics, 8 + 20 * number // kills, 0.3 * moments.random())
    run_ranks(command, 2)
    whole, killed = rows_of(tmp_path / "whole"), rows_of(tmp_path / "killed")
    assert whole == killed


@pytest.mark.parametrize("most", [2, pytest.param(4, marks=pytest.mark.long)])
def test_another_number_of_ranks_goes_on_with_the_queue_and_the_teacher(tmp_path, synthetic, reference, most):
    """2 -> 1 -> 2 or 4 ranks, ZeRO 2 -> 3 -> 1."""
    constant = {"name": "constant", "warmup_steps": 0}
    recipe = recipe_of(synthetic, 15, checkpoint_every=5, schedule=constant)
    for steps, ranks, zero in ((5, 2, 2), (10, 1, 3), (15, most, 1)):
        recipe["stages"][1]["steps"] = steps
        rows, final = run(tmp_path / "moving", recipe, ranks, zero)
    expected = run(tmp_path / "still", recipe, 1, 0)
    same(rows, final, *expected)


def poisoned(steps: list[int], arguments: list[str]) -> None:
    """train_ds.py, in which the teacher's features are not finite in some steps, counted by their data."""
    from vlmo_ds.families.blip.model import BLIP
    from vlmo_ds.training.run import main

    keys = BLIP.keys

    def changed(self, batch):
        found = keys(self, batch)
        if int(batch["negative_seed"]) % 1_000_003 in steps:
            found["image"] = found["image"] * float("nan")
        return found

    BLIP.keys = changed
    sys.exit(main(arguments))


def test_a_step_that_is_left_out_leaves_no_trace_in_queue_and_teacher(tmp_path, synthetic):
    recipe = recipe_of(synthetic, 8, checkpoint_every=1) | {"keep_checkpoints": 20}
    recipe["stages"], recipe["model"]["momentum"] = recipe["stages"][:1], 0.9
    given = arguments(tmp_path, recipe, 2)[1:]
    code = f"from families.blip.test_runs import poisoned; poisoned([3], {given!r})"
    processes = start_ranks(["-c", code], 2)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:]
    assert [row["skipped_steps"] for row in rows_of(tmp_path)] == [0] * 3 + [1] * 5
    folder = tmp_path / "run" / "checkpoints" / "contrast"
    final = load_file(folder / "final" / "model.safetensors")
    assert int(final["queue_ptr"]) == 7 * 8 % 20 and bool(final["image_queue"].isfinite().all())
    teacher = {name: value.double() for name, value in final.items() if "_m." in name}
    before = Reader(folder / "step-00000001").weights()  # its learning rate is 0: as the run began
    expected = {name: before[name].double() for name in teacher}
    for step in range(1, 8):
        if step == 4:  # the student has not moved in the step before
            continue
        weights = Reader(folder / f"step-{step:08d}").weights()
        expected = {
            name: 0.9 * value + 0.1 * weights[name.replace("_m.", ".")].double() for name, value in expected.items()
        }
    torch.testing.assert_close(teacher, expected, rtol=1e-5, atol=1e-6)


HALF = """
import sys, torch
from families.blip.tiny import ALL, tiny_batch, tiny_model
from vlmo_ds.config import DataConfig
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.families.blip import FAMILY
from vlmo_ds.training.averages import Averages
from vlmo_ds.training.ds_config import merge
from vlmo_ds.training.engine import build_engine, start_distributed
from vlmo_ds.training.optim import set_trainable

start_distributed()
ranks = Collector().world_size
stage = FAMILY.stage(
    name="a", tasks=ALL, data=DataConfig(shards=["-"]), global_batch_size=5 * ranks, steps=9, schedule={"name": "constant"}
)
SECOND_COPY = {"zero_hpz_partition_size": 2}  # ZeRO++: of weights, within a machine
for zero, also in ((1, {}), (2, {}), (3, {}), (3, SECOND_COPY)):
    for recompute in ("cheap", "blocks"):
        model = tiny_model(dtype=torch.float32, recompute=recompute)
        set_trainable(model, stage)
        averages = Averages(model)
        spread = {"stage": zero, "stage3_param_persistence_threshold": 200, **also}
        config = {"bf16": {"enabled": True}, "zero_optimization": spread}
        engine = build_engine(model, stage, merge(config, stage, ranks))
        averages.attach(engine)
        engine.train()
        batch, found = tiny_batch(dtype=torch.float32, seed=Collector().rank), []
        for step in range(3):
            averages.follow(0.5)
            with torch.no_grad():
                found.append(engine(batch, "keys"))
            out = engine({**batch, **engine.module.keys_of_step([found[-1]])})
            engine.backward(out.loss)
            engine.step()
        parameters = dict(engine.module.named_parameters())
        for name, held in averages.held.items():
            start, live = averages.layout.live(parameters[name])
            if live.numel():
                assert start == held.start and live.dtype == torch.bfloat16 and held.values.dtype == torch.float32
                worst = ((live.float() - held.values).abs() / held.values.abs().clamp(min=1e-30)).max()
                assert float(worst) < 4e-3, (zero, name, float(worst))
            assert parameters[name].data_ptr() != parameters[averages.followed[name]].data_ptr() or zero == 3
        for one, other in zip(found, found[1:]):  # what computes the keys has moved
            assert not torch.equal(one["image"], other["image"]) and not torch.equal(one["text"], other["text"])
        assert engine.module.image_queue.dtype == torch.float32 and found[0]["image"].dtype == torch.float32
print("DONE")
"""


def test_a_teacher_in_half_precision_follows_its_float32_average(tmp_path):
    (tmp_path / "worker.py").write_text(HALF)
    assert "DONE" in run_ranks([str(tmp_path / "worker.py")], 2)
