"""BEiT-3's runs on real processes: the same losses on any ranks and under any ZeRO stage, with stochastic depth and without."""

import json

import pytest
from conftest import run_ranks, write_yaml
from families.beit3.tiny import tiny_beit3


def run(folder, recipe: dict, ranks: int, zero: int):
    """The run's folder."""
    folder.mkdir(exist_ok=True)
    file = write_yaml(folder / "recipe.yaml", recipe)
    spread = {"stage": zero, **({"stage3_param_persistence_threshold": 200} if zero == 3 else {})}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": spread, "steps_per_print": 10**9}))
    command = ["train_ds.py", "--recipe", str(file), "--deepspeed_config", str(folder / "ds.json")]
    run_ranks([*command, "--output_dir", str(folder / "run")], ranks)
    return folder / "run"


def losses(run) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name.startswith("loss/")} for row in rows]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, synthetic):
    return run(tmp_path_factory.mktemp("beit3"), tiny_beit3(synthetic), 1, 0)


def test_a_run_of_two_stages_and_what_is_measured_after_it(reference):
    found = losses(reference)
    assert [sorted(row) for row in found] == [["loss/itc", "loss/itm"]] * 4 + [["loss/captioning"]] * 4
    assert json.loads((reference / "captioning.json").read_text())
    recipe = (reference / "recipe.yaml").read_text()
    assert "mask_word: 4" in recipe  # the tokenizer's


@pytest.mark.parametrize("ranks, zero", [(2, 3), pytest.param(2, 2, marks=pytest.mark.long)])
def test_losses_do_not_depend_on_ranks_or_zero(tmp_path, synthetic, reference, ranks, zero):
    recipe = tiny_beit3(synthetic, captioning=None)
    for ours, theirs in zip(losses(run(tmp_path, recipe, ranks, zero)), losses(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_stochastic_depth_that_leaves_experts_without_sequences_stops_no_rank(tmp_path, synthetic):
    recipe = tiny_beit3(synthetic, captioning=None)
    recipe["model"]["drop_path_rate"] = 0.9
    assert len(losses(run(tmp_path, recipe, 2, 3))) == 8
