"""What limits a run is named rightly: a slow rank, a slow loader, a slow disk, and none where nothing is slow."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from conftest import run_ranks, tiny_recipe, write_yaml

from vlmo_ds.families import FAMILIES
from vlmo_ds.training.pace import Pace, Rank, Seconds, advice, flops_of, rate_of_device, spreads, summary, tokens_of

STEPS = 12


def worker(what: str, arguments: list[str]) -> None:
    """train_ds.py with windows of four steps, of which one rank is slow in some way."""
    import os
    import sys

    from vlmo_ds.data.loader import BatchDataset
    from vlmo_ds.families.vlmo.model import VLMo
    from vlmo_ds.training import checkpoint, loop, run

    loop.WINDOW = 4
    slow = os.environ["RANK"] == "1"

    def slowed(function, seconds: float):
        def call(*args, **kwargs):
            if slow:
                time.sleep(seconds)
            return function(*args, **kwargs)

        return call

    if what == "rank":
        VLMo.step = slowed(VLMo.step, 0.8)
    elif what == "loader":
        BatchDataset.__getitem__ = slowed(BatchDataset.__getitem__, 0.8)
    elif what == "disk":
        checkpoint.save_file = slowed(checkpoint.save_file, 0.8)
    sys.exit(run.main(arguments))


def told(folder: Path, data: Path, what: str) -> tuple[str, list[dict]]:
    recipe = tiny_recipe(data, retrieval=None, background_checkpoints=what != "disk")
    recipe["stages"] = recipe["stages"][-1:]
    every = 2 if what == "disk" else 0
    recipe["stages"][0] |= {"steps": STEPS, "checkpoint_every": every, "init": {"weights": "fresh"}}
    file = write_yaml(folder / "recipe.yaml", recipe)
    arguments = ["--recipe", str(file), "--output_dir", str(folder / "run")]
    code = f"from training.test_pace import worker; worker({what!r}, {arguments!r})"
    output = run_ranks(["-c", code], 2)
    records = [json.loads(line) for line in (folder / "run" / "pace.jsonl").read_text().splitlines()]
    return output, records


@pytest.mark.parametrize(
    "what, words, number",
    [
        ("rank", r"rank 1 on \S+ computes [\d.]+ times as long as the others .* which wait for it", "computing"),
        (
            "loader",
            r"1 of 2 ranks wait up to \d\d% of the time for data \(rank 1 on \S+\): data.workers 0 -> 2",
            "data",
        ),
        (
            "disk",
            r"writing checkpoints takes \d\d% of the time \(rank 1 on \S+\): checkpoint_every 2 -> \d+, or a faster disk",
            "writing",
        ),
    ],
)
def test_what_is_slow_is_named(tmp_path, synthetic, what, words, number):
    output, records = told(tmp_path, synthetic, what)
    assert len(re.findall(words, output)) == 1, output  # once, not every window
    for kind, of in {"rank": "times as long", "loader": "time for data", "disk": "writing checkpoints takes"}.items():
        assert (of in output) == (kind == what), (kind, output)
    assert [record["step"] for record in records] == [4, 8, 12]
    for record in records[1:]:
        assert record["world_size"] == 2 and record[number]["who"].startswith("rank 1 on ")
        assert record["seconds"]["least"] >= 0.2 and record[number]["most"] > record[number]["least"]


def test_metrics_are_the_same_however_slow(tmp_path, synthetic):
    """No time is among them."""
    found = []
    for what in ("nothing", "rank"):
        (tmp_path / what).mkdir()
        told(tmp_path / what, synthetic, what)
        found.append((tmp_path / what / "run" / "metrics.jsonl").read_bytes())
    assert found[0] == found[1]


def rank(number: int, total: float, data: float = 0.0, ranks: float = 0.0, writing: float = 0.0) -> Rank:
    return Rank(f"node{number}", number, Seconds(total, data, ranks, writing), 1e9 * (number + 1))


def stage(**changes):
    data = {"shards": ["-"], "workers": changes.pop("workers", 0)}
    return FAMILIES["vlmo"].stage(
        name="a", tasks={"itc": None}, data=data, global_batch_size=8, steps=10, checkpoint_every=100, **changes
    )


def test_healthy_ranks_are_told_nothing():
    ranks = [rank(0, 1.0, 0.02, 0.1), rank(1, 1.0, 0.03, 0.12, 0.05), rank(2, 1.0, 0.01, 0.2)]
    assert advice(ranks, stage(), Path("x")) == {}
    line = summary(spreads(ranks), 3)
    assert line.startswith("a step computes for 0.79 to 0.88 s, median 0.8 (slowest: rank 0 on node0)")
    assert "waiting for data 1% to 3%;" in line and "in collectives 10% to 20% (rank 2 on node2)" in line
    assert "at most 3.0 GB (rank 2 on node2)" in line
    assert summary(spreads([rank(0, 1.0, 0.5)]), 1) == (
        "a step computes for 0.5 s; waiting for data 50%; in collectives 0%; writing checkpoints 0%; 1.0 GB"
    )


def test_advice_names_what_to_change():
    words = advice([rank(0, 1.0, 0.4), rank(1, 1.0, 0.38)], stage(workers=1), Path("x"))
    assert words == {"data": "2 of 2 ranks wait up to 40% of the time for data (rank 0 on node0): data.workers 1 -> 2"}
    words = advice([rank(0, 1.0, 0.4), rank(1, 1.0, 0.38)], stage(workers=512), Path("x"))
    assert "cores here are what limits it" in words["data"]
    words = advice([rank(0, 1.0, 0, 0.5), rank(1, 1.0), rank(2, 1.0, 0, 0.5)], stage(), Path("x"))
    assert words.keys() == {"slow"} and words["slow"].startswith(
        "rank 1 on node1 computes 2.0 times as long as the others (1 s"
    )
    words = advice([rank(0, 1.0, 0, 0, 0.3)], stage(), Path("runs/x"))
    assert words == {
        "writing": "writing checkpoints takes 30% of the time (rank 0 on node0): checkpoint_every 100 -> 600, or a faster disk for runs/x"
    }


def test_speed_is_of_the_steps_alone():
    pace = Pace(flops=4e12, half=False, ranks=2, rank=0)
    pace.begin()
    with pace.left_out():
        time.sleep(0.3)
    for _ in range(3):
        with pace.part("waiting for data"):
            time.sleep(0.05)
        time.sleep(0.05)
        pace.tokens += 60
        pace.step({name: 2 * value for name, value in pace.told().items()})
    found = pace.scalars(samples=8)
    assert found["throughput/seconds_per_step"] == pytest.approx(0.1, rel=0.25)
    assert found["throughput/samples_per_second"] == pytest.approx(80, rel=0.25)
    assert found["throughput/tokens_per_second"] == pytest.approx(1200, rel=0.25)
    assert found["throughput/tflops_per_device"] == pytest.approx(20, rel=0.25)
    assert found["throughput/share_data"] == pytest.approx(0.5, abs=0.1)
    assert 0.01 < found["throughput/peak_memory_gb"] < 100
    line = pace.line(found, left=36_000)
    assert re.search(r"s/step \(data \d\d%, ranks 0%, writing 0%\)  .* samples/s  1\.\d+k tokens/s", line), line
    assert re.search(r"0:00:00 gone  (1:|0:5)\d:\d\d left$|0:00:00 gone  1:\d\d:\d\d left$", line), line
    assert pace.of_window().seconds.total == pytest.approx(0.1, rel=0.25)


def test_useful_work_and_tokens_are_counted():
    texts = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert tokens_of({"image": torch.zeros(2, 3, 4, 4), "text_masks": texts}, patches=9) == 25
    assert tokens_of({"image_0": texts, "image_1": texts, "text_masks": texts}, patches=1) == 13
    config = FAMILIES["vlmo"].config(vocab_size=100)
    one, two = (flops_of(config, stage().model_copy(update={"global_batch_size": size})) for size in (8, 16))
    assert two == pytest.approx(2 * one) and one > 1e9


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Tesla T4", 65),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A10G", None),
    ],
)
def test_a_gpus_rate_is_known_by_words_of_its_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert rate_of_device(half=True) == (tflops and tflops * 1e12) and rate_of_device(half=False) is None
