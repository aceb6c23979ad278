"""Runs on mixtures of sources: the same at any number of ranks, bad samples counted by source, or the run stops."""

import json
import time

import pytest
from conftest import run_ranks, start_ranks, tiny_recipe, write_yaml
from data.files import write_pairs


def mixed_recipe(synthetic, other, **data) -> dict:
    """The three stages; pairs come from the synthetic world and from `other`, texts from two places as well."""
    recipe = tiny_recipe(synthetic)
    for stage, folder in zip(recipe["stages"], ("train", "text", "train"), strict=True):
        sources = {"scenes": {"shards": [str(synthetic / folder)], "weight": 3}}
        sources["pictures"] = {"shards": [str(other)], "weight": 1, "transform": "crop_flip"}
        stage["data"] = {"sources": sources, "transform": "square_transform", "lanes": 8, **data}
        stage["global_batch_size"] = 16
    recipe["tokenizer"]["vocab_size"] = 120
    return recipe


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def command(folder, recipe, *overrides):
    file = write_yaml(folder / "recipe.yaml", recipe)
    config = folder / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}, "steps_per_print": 10**9}))
    return ["train_ds.py", "--recipe", str(file), "--deepspeed_config", str(config), *overrides]


@pytest.mark.long
def test_three_stages_on_a_mixture_at_one_and_two_ranks(tmp_path, synthetic):
    other = tmp_path / "other"
    other.mkdir()
    write_pairs(other / "a.tar", 30, "x", s004_jpg=b"", s004_txt=b"")
    recipe = mixed_recipe(synthetic, other, mixing="exact", length_bucketing=3, max_bad_fraction=0.2)
    for ranks, workers in ((1, 0), (2, 1)):
        run = ["--output_dir", str(tmp_path / str(ranks)), f"stages.*.data.workers={workers}", "stages.*.steps=8"]
        run_ranks(command(tmp_path, recipe, *run), ranks)
    one, two = records(tmp_path / "1"), records(tmp_path / "2")
    assert len(one) == 24
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert all(a[k] == b[k] for k in a if k.startswith("data/"))
    last = one[-1]
    assert last["data/epoch/scenes"] == 8 * 12 / 96 and last["data/epoch/pictures"] == 8 * 4 / 30
    found = {s: sum(r["data/replaced/pictures"] for r in one if r["stage"] == s) for s in ("image", "text", "joint")}
    assert all(1 <= count <= 2 for count in found.values()), found  # once an epoch, and 32 of 30 are read
    assert sum(r["data/replaced/scenes"] for r in one) == 0


def test_a_run_stops_when_a_source_goes_bad(tmp_path, synthetic):
    """A shard of one source disappears after the check at the start; the run ends with the reason, on all ranks."""
    other = tmp_path / "other"
    other.mkdir()
    for i in range(6):
        write_pairs(other / f"{i}.tar", 100, "uvwxyz"[i])
    recipe = mixed_recipe(synthetic, other, max_bad_fraction=0.05)
    recipe["stages"] = [recipe["stages"][0] | {"steps": 2000, "tasks": {"itc": None}, "trainable": "all"}]
    recipe.pop("retrieval")
    started = start_ranks(command(tmp_path, recipe, "--output_dir", str(tmp_path / "run")), 2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        while all(p.poll() is None for p in started) and not (metrics.exists() and metrics.stat().st_size > 1000):
            time.sleep(0.02)
        (other / "0.tar").unlink()
        outputs = [p.communicate(timeout=180)[0] for p in started]
    finally:
        for process in started:
            process.kill()
    assert [p.returncode for p in started] == [2, 2], outputs[0][-3000:]
    assert (
        "samples of source 'pictures' could not be used and were replaced, more than max_bad_fraction 0.05"
        in outputs[0]
    )
    assert outputs[0].count("0.tar cannot be read: No such file") == 1  # named once
