"""VQA's accuracy, NLVR2's consistency, zero-shot classes: hand-made cases, and the same numbers on 1, 2 and 4 ranks."""

import json
import os
import random

import pytest
import torch
from conftest import run_ranks
from data.files import jpeg, write_tar
from families.vlmo.tiny import tiny_model

from vlmo_ds.config import EvaluationConfig, RecipeError, RetrievalConfig, VQAConfig
from vlmo_ds.data.storage import DataError
from vlmo_ds.data.tokenizer import train_tokenizer
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import nlvr2, vqa, zero_shot

WORDS = train_tokenizer([f"is {i} a word" for i in range(30)], 50)
ANSWERS = ["yes", "no", "2", "red car"]


@pytest.mark.parametrize(
    "predicted, answers, expected",
    [
        ("yes", ["yes"] * 10, 1.0),
        ("no", ["yes"] * 10, 0.0),
        ("2", ["2"] * 4 + ["3"] * 6, 1.0),
        ("2", ["2"] * 3 + ["3"] * 7, 0.9),
        ("2", ["2"] * 2 + ["3"] * 8, 0.6),
        ("2", ["2"] * 1 + ["3"] * 9, 0.3),
        ("Two.", ["2", "two", " two\n", "3"] + ["4"] * 6, 0.9),  # number words, case, punctuation
        ("a red-car", ["the red car"] * 5 + ["blue"] * 5, 1.0),  # articles, hyphens
        ("dont", ["don't"] * 5 + ["do"] * 5, 1.0),  # contractions
        ("1,000", ["1000"] * 5 + ["many"] * 5, 1.0),
        ("Yes", ["yes"] * 10, 0.0),  # nothing is normalised where all annotators agree: the rule's own oddity
    ],
)
def test_accuracy_is_the_official_one(predicted, answers, expected):
    assert vqa.accuracy(predicted, answers) == pytest.approx(expected)


def test_accuracy_equals_leaving_every_annotator_out():
    draw = random.Random(0)
    for _ in range(200):
        answers = [draw.choice("abc") for _ in range(10)]
        expected = []
        for left_out in range(10):
            others = answers[:left_out] + answers[left_out + 1 :]
            expected.append(min(1, others.count("b") / 3))
        assert vqa.accuracy("b", answers) == pytest.approx(sum(expected) / 10)


def test_accuracy_by_type_and_the_submission():
    rows = [
        {"question_id": 7, "answer": "yes", "accuracy": 1.0, "answer_type": "yes/no"},
        {"question_id": 9, "answer": "2", "accuracy": 0.3, "answer_type": "number"},
        {"question_id": 11, "answer": "no", "accuracy": 0.0, "answer_type": "yes/no"},
    ]
    found = vqa.overall(rows)
    assert found["accuracy"] == pytest.approx(130 / 3) and found["accuracy/yes/no"] == 50 and found["questions"] == 3
    assert json.loads(vqa.submission(rows))[1] == {"question_id": 9, "answer": "2"}
    assert vqa.table(vqa.overall([{"question_id": 1, "answer": "no"}])) == "vqa: 1 questions, no known answers"


def test_a_sentence_is_consistent_when_all_of_its_examples_are_right():
    def row(identifier, right, **more):
        return {"identifier": identifier, "label": True, "predicted": right, **more}

    rows = [
        row("dev-10-0-0", True),
        row("dev-10-1-0", True),  # the same sentence with another pair of images
        row("dev-10-0-1", True),  # another sentence about the first pair
        row("dev-10-2-1", False),
        row("dev-11-0-0", True),
    ]
    found = nlvr2.scores(rows)
    assert found["accuracy"] == 80 and found["sentences"] == 3
    assert found["consistency"] == pytest.approx(200 / 3)
    together = [row("a-1-0-0", True, sentence_id="s"), row("a-1-1-5", False, sentence_id="s")]
    assert nlvr2.scores(together)["consistency"] == 0


def write_sets(root) -> None:
    asked, pairs, labelled = {}, {}, {}
    for i in range(11):
        picture = {"jpg": jpeg((32, 32), (i * 20, 99, 255 - i * 20))}
        questions = [
            {
                "question": f"is {i} a {k}",
                "question_id": 100 * i + k,
                "answers": [ANSWERS[(i + k) % 4]] * 10,
                "answer_type": "t",
            }
            for k in range(1 + i % 3)
        ]
        sentences = [
            {"sentence": f"is {i} a {k}", "label": str(k == 0), "identifier": f"dev-{i // 2}-{i % 2}-{k}"}
            for k in range(2)
        ]
        asked |= {f"{i:02d}.jpg": picture["jpg"], f"{i:02d}.json": json.dumps({"questions": questions}).encode()}
        pairs |= {f"{i:02d}.0.jpg": picture["jpg"], f"{i:02d}.1.jpg": jpeg((32, 32), (0, i * 20, 0))}
        pairs[f"{i:02d}.json"] = json.dumps({"sentences": sentences}).encode()
        labelled |= {f"{i:02d}.jpg": picture["jpg"], f"{i:02d}.json": json.dumps({"label": i % 3}).encode()}
    for name, members in (("asked", asked), ("pairs", pairs), ("labelled", labelled)):
        write_tar(root / f"{name}.tar", members)


def evaluated(root) -> list:
    collector, seen = Collector(), {}
    common = torch.load(f"{root}/common.pt") if os.path.exists(f"{root}/common.pt") else None

    def config(name, kind=EvaluationConfig):
        return kind(shards=[f"{root}/{name}.tar"], batch_size=4)

    def model(task, **changes):
        """Its answers differ: what all inputs have in common is taken off, as far as the file knows it."""
        made = tiny_model({task: 1.0}, torch.float32, **changes)
        if task != "irtr":
            last = getattr(made, f"{task}_classifier")[3]
            last.register_forward_hook(lambda *args: seen.setdefault(task, []).append(args[2]))
            with torch.no_grad():
                last.bias.sub_(common[task] if common else 0)
        return made

    answered = vqa.evaluate(model("vqa", vqav2_label_size=4), config("asked", VQAConfig), ANSWERS, WORDS, collector)
    judged = nlvr2.evaluate(model("nlvr2"), config("pairs"), WORDS, collector)
    named = ["is a", "word", "is word"], ["a {} is", "{}"]
    classes = zero_shot.evaluate(model("irtr"), config("labelled"), *named, WORDS, collector)
    if common is None:
        torch.save({task: torch.cat(logits).mean(0) for task, logits in seen.items()}, f"{root}/common.pt")
    return [answered, judged, classes]


def worker(root: str) -> None:
    torch.distributed.init_process_group("gloo")
    found = evaluated(root)
    if torch.distributed.get_rank() == 0:
        with open(f"{root}/found.json", "w") as file:
            json.dump(found, file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ranks_do_not_change_any_prediction(tmp_path):
    write_sets(tmp_path)
    evaluated(tmp_path)
    alone = json.loads(json.dumps(evaluated(tmp_path)))
    answered, judged, classes = alone
    assert len(answered) == 21 and len({row["answer"] for row in answered}) > 1
    assert {row["predicted"] for row in judged} == {True, False}
    assert len(judged) == 22 and classes["images"] == 11 and classes["top-1"] <= classes["top-5"] == 100
    for ranks in (2, 4):
        run_ranks(["-c", f"from evaluation.test_answers import worker; worker({str(tmp_path)!r})"], ranks)
        assert json.loads((tmp_path / "found.json").read_text()) == alone


def test_zero_shot_averages_over_templates_and_scores_by_hand():
    model = tiny_model({"irtr": 1.0}, torch.float32).eval()
    found = zero_shot.class_features(model, ["is", "word"], ["a {}", "{} is"], WORDS, 3, Collector())
    ids = WORDS(["a word", "word is"], padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        both = model({"text_ids": ids, "text_masks": (ids != 0).long()}, "encode_text")["text"]
    expected = torch.nn.functional.normalize(both.mean(0), dim=0)
    assert torch.allclose(found[1], expected, atol=1e-5)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(RecipeError, match="--shards is missing, and the run's recipe has no 'vqa'"):
        EvaluationConfig.of(None, "vqa", shards=None)
    with pytest.raises(RecipeError, match="--shards is missing, and the run's recipe has no 'retrieval'"):
        RetrievalConfig.of(None, "retrieval", rerank=4)
    assert RetrievalConfig.of(RetrievalConfig(shards=["a"], rerank=4), "retrieval", shards=["b"]).rerank == 4
    write_tar(tmp_path / "x.tar", {"0.jpg": jpeg(), "0.json": b'{"label": 7}'})
    config = EvaluationConfig(shards=[str(tmp_path / "x.tar")])
    with pytest.raises(DataError, match="has label 7 and class None; accepted: a label from 0 to 1"):
        zero_shot.evaluate(tiny_model({"irtr": 1.0}, torch.float32), config, ["a", "b"], ["{}"], WORDS, Collector())


def test_a_batch_size_of_zero_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["zero_shot", "run", "--shards", "x", "--classes", "y", "--batch_size", "0"])
    with pytest.raises(SystemExit):
        zero_shot.main()
    assert "found '0', accepted: a whole number above 0" in capsys.readouterr().err
