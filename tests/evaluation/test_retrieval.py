import html
import json
import re
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_ranks
from families.vlmo.tiny import tiny_model

from vlmo_ds import ledger
from vlmo_ds.config import RetrievalConfig
from vlmo_ds.data.loader import collate
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import circumstances
from vlmo_ds.evaluation.drawing import curve, thin
from vlmo_ds.evaluation.report import duration, write_report
from vlmo_ds.evaluation.retrieval import RetrievalSet, evaluate, recalls, rerank
from vlmo_ds.evaluation.runs import Texts


def small_set(images=11, per_image=2) -> RetrievalSet:
    g = torch.Generator().manual_seed(3)
    texts = images * per_image
    tokens = [
        {"text_ids": np.asarray([2, *torch.randint(5, 50, (3 + i % 5,), generator=g).tolist(), 3])}
        for i in range(texts)
    ]
    batch = collate(tokens, 24)
    return RetrievalSet(
        torch.randint(0, 256, (images, 3, 32, 32), generator=g).to(torch.uint8),
        [b"\xff\xd8"] * images,
        [f"<caption {i}>" for i in range(texts)],
        Texts(batch["text_ids"], batch["text_masks"].sum(1)),
        torch.arange(images).repeat_interleave(per_image),
    )


@pytest.mark.parametrize("levels", [3, 10**6])  # with many ties, and with none
def test_recall_equals_a_straightforward_count(levels):
    g = torch.Generator().manual_seed(0)
    score = torch.randint(0, levels, (30, 40), generator=g).float()
    correct = torch.rand(30, 40, generator=g) < 0.1
    correct[:, 0] |= ~correct.any(1)
    for k in (1, 5, 10):
        hits = 0
        for row, right in zip(score.tolist(), correct.tolist(), strict=True):
            best = sorted(range(40), key=lambda i: (-row[i], i))[:k]
            hits += any(right[i] for i in best)
        assert recalls(score, correct)[f"R@{k}"] == pytest.approx(100 * hits / 30)


def test_reranking_moves_only_the_best_candidates():
    model, data = tiny_model(dtype=torch.float32).eval(), small_set()
    g = torch.Generator().manual_seed(0)
    logits = 50 + 2.0**-17 * torch.randint(0, 8, (22, 11), generator=g)  # neighbours of each other, and ties
    again = rerank(model, data, logits, True, 4, 8, Collector())
    for before, after in zip(logits.tolist(), again.tolist(), strict=True):
        order_before, order_after = (sorted(range(11), key=lambda i: (-row[i], i)) for row in (before, after))
        assert set(order_before[:4]) == set(order_after[:4])
        assert order_before[4:] == order_after[4:]
    pair = {"image": data.images[3:4], **data.texts.batch(torch.tensor([5]))}
    top = logits[5].argmax()
    expected = logits[5, top] + model({**pair, "image": data.images[top][None]}, "match")[0]
    assert float(again[5, top]) == pytest.approx(float(expected), abs=1e-4)


def worker(output: str) -> None:
    torch.distributed.init_process_group("gloo")
    result = evaluate(
        tiny_model(dtype=torch.float32), small_set(), RetrievalConfig(shards=["x"], rerank=3, batch_size=4), Collector()
    )
    if torch.distributed.get_rank() == 0:
        with open(output, "w") as file:
            json.dump([result.metrics, result.text_to_image.tolist()], file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ranks_do_not_change_the_result(tmp_path):
    found = []
    for ranks in (1, 2, 4):
        run_ranks(["-c", f"from evaluation.test_retrieval import worker; worker({str(tmp_path / 'out')!r})"], ranks)
        found.append(json.loads((tmp_path / "out").read_text()))
    assert found[0][0] == found[1][0] == found[2][0]
    assert torch.allclose(torch.tensor(found[0][1]), torch.tensor(found[2][1]), atol=1e-3)


def test_report_is_self_contained_and_marks_the_right_answers(tmp_path):
    model, data = tiny_model(dtype=torch.float32), small_set()
    result = evaluate(model, data, RetrievalConfig(shards=["x"], rerank=0), Collector())
    result.text_to_image.copy_(torch.nn.functional.one_hot(data.image_of_text, 11).float())
    records = [
        {"stage": "joint", "step": i + 1, "loss/itc": 1.0 / (i + 1), "itc/i2t_accuracy": 0.5} for i in range(500)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    page = write_report(tmp_path, "a <name>", data, result, 4).read_text()
    assert "&lt;caption 0&gt;" in page and "<caption" not in page and "a &lt;name&gt;" in page
    assert len(re.findall(r'<img class="hit"', page)) == 4  # the right image of each of the four queries
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_what_lets_others_in_is_not_on_the_page(tmp_path):
    shards = ["https://me:secret@host/a.tar?signature=secret&b=1", "hf://datasets/a/b/c.tar", "/data/what?.tar"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(shards))
    page = html.unescape(write_report(tmp_path, "a", None, None, 0).read_text())
    assert "secret" not in page and json.dumps(["https://...@host/a.tar?...", *shards[1:]]) in page


def test_the_commit_is_that_of_a_clone_that_keeps_the_file(tmp_path, monkeypatch):
    code = tmp_path / "code.py"
    code.write_text("1")
    assert circumstances.commit_of(code) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "other").write_text("")
    subprocess.run([*git, "add", "other"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    assert circumstances.commit_of(code) == ""
    subprocess.run([*git, "add", "code.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    assert re.fullmatch("[0-9a-f]{7,}", circumstances.commit_of(code))
    code.write_text("2")
    assert re.fullmatch(r"[0-9a-f]{7,} \+ changes", circumstances.commit_of(code))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert circumstances.commit_of(code) == ""


def test_the_time_of_a_stage_is_summed_over_starts_and_damage_is_harmless(tmp_path):
    for _ in range(2):
        clock = ledger.StageClock(tmp_path, "joint")
        clock.started -= 100
        clock.note(20, 10)
    assert ledger.read(tmp_path)["joint"] == (pytest.approx(200, abs=5), 20, 10)
    ledger.StageClock(tmp_path, "other").note(1, 1)
    assert list(ledger.read(tmp_path)) == ["joint", "other"]
    fine = {"seconds": 1, "parameters": 2, "trained": 1}
    for damaged in ("", "[1]", "{", json.dumps({"a": fine, "b": {**fine, "seconds": "x"}, "c": 1, "d": None})):
        (tmp_path / ledger.FILE).write_text(damaged)
        assert ledger.read(tmp_path) == ({"a": (1, 2, 1)} if '"a"' in damaged else {})
    ledger.StageClock(tmp_path / "nowhere", "joint").note(1, 1)


def test_durations_are_read_at_a_glance():
    assert [duration(s) for s in (1.25, 59.6, 3599, 3600, 90061)] == [
        "1.2 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 00 min",
        "25 h 01 min",
    ]


def test_curves_are_thinned_and_drawn():
    values = [(i, float(i % 2)) for i in range(1, 1001)]
    assert len(thin(values)) <= 200 and all(v == pytest.approx(0.5, abs=0.2) for _, v in thin(values))
    svg = curve("title", {"one": values})
    assert svg.count("<polyline") == 1 and "title" in svg


def test_parts_are_evaluated_alone_and_averaged():
    """As COCO's 1k protocol, against a straightforward computation with five captions an image and ties."""
    g = torch.Generator().manual_seed(1)
    data = small_set(images=12, per_image=5)
    features = {k: torch.randint(-1, 2, (n, 4), generator=g).float() for k, n in (("image", 12), ("text", 60))}
    model = tiny_model(dtype=torch.float32)
    model.forward = lambda batch, call: pick(batch, call, data, features)
    config = RetrievalConfig(shards=["x"], rerank=0, batch_size=7, folds=3)
    metrics = evaluate(model, data, config, Collector()).metrics
    scores = [[float(t @ i) for i in features["image"]] for t in features["text"]]
    owner = data.image_of_text.tolist()
    expected = {"text_to_image": [], "image_to_text": []}
    for part in range(3):
        images = range(4 * part, 4 * part + 4)
        texts = [t for t in range(60) if owner[t] in images]
        for t in texts:
            best = min(images, key=lambda i: (-scores[t][i], i))
            expected["text_to_image"].append((part, owner[t] == best))
        for i in images:
            best = min(texts, key=lambda t: (-scores[t][i], t))
            expected["image_to_text"].append((part, owner[best] == i))
    for direction, found in expected.items():
        means = [np.mean([hit for where, hit in found if where == part]) for part in range(3)]
        assert metrics[direction]["itc, mean of 3 parts"]["R@1"] == pytest.approx(100 * np.mean(means))


def test_parts_are_reranked_among_their_own_candidates():
    model, data = tiny_model(dtype=torch.float32), small_set(images=12, per_image=5)
    g = torch.Generator().manual_seed(2)
    project = {"image": torch.randn(3 * 32 * 32, 8, generator=g), "text": torch.randn(50, 8, generator=g)}

    def scattered(batch, call):
        """Stands for a model: features and matches as good as random, but the same for the same inputs."""
        found = {}
        if "image" in batch:
            found["image"] = torch.sin(batch["image"].flatten(1).float() @ project["image"])
        if "text_ids" in batch:
            found["text"] = torch.sin(F.one_hot(batch["text_ids"], 50)[..., 1:].sum(1).float() @ project["text"][1:])
        return 9 * (found["image"] * found["text"].flip(1)).sum(1) if call == "match" else found

    model.forward = scattered
    config = {"shards": ["x"], "rerank": 2, "batch_size": 7}
    whole = evaluate(model, data, RetrievalConfig(**config, folds=2), Collector()).metrics
    halves = []
    for first in (0, 6):
        texts = slice(5 * first, 5 * first + 30)
        half = RetrievalSet(
            data.images[first : first + 6], [], [], data.texts.part(texts), data.image_of_text[texts] - first
        )
        halves.append(evaluate(model, half, RetrievalConfig(**config), Collector()).metrics)
    for direction in whole:
        for k in ("R@1", "R@5"):
            mean = np.mean([half[direction]["itc+itm"][k] for half in halves])
            assert whole[direction]["itc+itm, mean of 2 parts"][k] == pytest.approx(mean)


def pick(batch, call, data, features):
    """Stands for a model: the features of the rows whose inputs these are."""
    if call == "encode_image":
        rows = [next(i for i in range(12) if torch.equal(data.images[i], image)) for image in batch["image"]]
        return {"image": features["image"][rows]}
    length = batch["text_ids"].shape[1]
    same = [
        (data.texts.ids[:, :length] == ids).all(1) & (data.texts.ids[:, length:] == 0).all(1)
        for ids in batch["text_ids"]
    ]
    return {"text": features["text"][[int(row.nonzero()[0, 0]) for row in same]]}
