"""BLIP for questions and for pairs of images: losses beside plain ones, ranking, weights of other layouts, export, runs."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import call, run_ranks, write_yaml
from data.files import red_or_green
from families.blip.tiny import ALL, SETTINGS, tiny_batch, tiny_model
from transformers import BlipForQuestionAnswering

from vlmo_ds.config import DecodingConfig, InitConfig, RecipeError
from vlmo_ds.data.tokenizer import train_tokenizer
from vlmo_ds.families.blip.base import begun_with
from vlmo_ds.families.blip.huggingface import exported
from vlmo_ds.families.blip.text import Look
from vlmo_ds.families.blip.weights import official
from vlmo_ds.families.handing_over import hand_over
from vlmo_ds.generation.decoding import written

ONE_WIDTH = {"vision_width": 32, "vision_heads": 2}  # images as wide as texts
ANSWERS = [[1, 5, 2, 0], [1, 6, 7, 2], [1, 5, 8, 2], [1, 9, 2, 0]]  # begin, words, end
LENGTHS = [3, 4, 4, 3]


def questions(model, seed: int = 0) -> dict:
    """tiny_batch as questions: the first has three answers, the others one."""
    batch = tiny_batch(seed=seed)
    batch["text_ids"] = batch["text_ids"] % (model.config.vocab_size - 2)
    ids, lengths = torch.zeros(5, 3, 4, dtype=torch.long), torch.zeros(5, 3, dtype=torch.long)
    weights = torch.zeros(5, 3)
    for question, given in enumerate(([0, 1, 2], [1], [3], [2], [0])):
        for place, answer in enumerate(given):
            ids[question, place], lengths[question, place] = torch.tensor(ANSWERS[answer]), LENGTHS[answer]
            weights[question, place] = 1 / len(given)
    weights[0] = torch.tensor([0.6, 0.3, 0.1])
    return batch | {"answer_ids": ids, "answer_lengths": lengths, "answer_weights": weights}


def alone(batch: dict, row: int) -> dict:
    """One question without the padding that its neighbours gave it."""
    length = int(batch["text_masks"][row].sum())
    one = {name: value[row : row + 1] for name, value in batch.items() if value.dim()}
    return one | {"text_ids": one["text_ids"][:, :length], "text_masks": one["text_masks"][:, :length]}


def plain_scores(model, batch: dict, row: int, answer: int) -> torch.Tensor:
    """Logits of the words of an answer to a question, computed alone and without padding."""
    one, length = alone(batch, row), LENGTHS[answer]
    states, valid = model.states(one)
    assert valid.all()
    ids = begun_with(model.config.decode_word, torch.tensor([ANSWERS[answer][:length]]))
    decoder = model.text_decoder
    return decoder.words(decoder.hidden(ids, torch.tensor([length - 1]), states, Look(0, 1)))


def test_the_loss_of_answers_is_the_plain_one():
    """Each answer alone, each question without its padding: smoothed word losses summed, by the annotators' shares."""
    model = tiny_model({"vqa": 1.0})
    batch, total = questions(model), 0.0
    for row, given in enumerate(([0, 1, 2], [1], [3], [2], [0])):
        for place, answer in enumerate(given):
            following = torch.tensor(ANSWERS[answer][1 : LENGTHS[answer]])
            logits = plain_scores(model, batch, row, answer)
            loss = F.cross_entropy(logits, following, reduction="sum", label_smoothing=0.1)
            total = total + batch["answer_weights"][row, place] * loss
    torch.testing.assert_close(model(batch).loss, total / 5, rtol=1e-9, atol=0)
    names = [name for name, _ in model.named_parameters()]
    ours = torch.autograd.grad(model(batch).loss, list(model.parameters()))
    for name, mine, plain in zip(names, ours, torch.autograd.grad(total / 5, list(model.parameters())), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-10, msg=name)


def test_questions_of_one_image_cost_it_once():
    model = tiny_model({"vqa": 1.0})
    batch, seen = questions(model), []
    model.visual_encoder.register_forward_hook(lambda _, __, out: seen.append(len(out)))
    rows = torch.tensor([0, 0, 1, 2, 2])
    once = model({**batch, "image": batch["image"][:3], "question_image": rows}).loss
    torch.testing.assert_close(once, model({**batch, "image": batch["image"][rows]}).loss, rtol=1e-12, atol=0)
    assert seen == [3, 5]


@pytest.mark.parametrize("candidates", [1, 2, 9])
def test_answers_are_ranked_by_all_their_words(candidates, monkeypatch):
    monkeypatch.setattr("vlmo_ds.families.blip.downstream.RANKED_WORDS", 9)
    model = tiny_model({"vqa": 1.0}).eval()
    batch = questions(model)
    listed = {"listed_ids": torch.tensor(ANSWERS), "listed_lengths": torch.tensor(LENGTHS), "candidates": candidates}
    with torch.no_grad():
        found = model({**batch, **listed}, "answer")
        for row in range(5):
            first = plain_scores(model, batch, row, 0)[0].log_softmax(0)
            words = torch.tensor([answer[1] for answer in ANSWERS])
            kept = first[words].topk(min(candidates, 4)).indices.tolist()
            assert (found[row] > -torch.inf).sum() == len(kept)
            for answer in kept:
                scores = plain_scores(model, batch, row, answer).log_softmax(1)
                following = torch.tensor(ANSWERS[answer][1 : LENGTHS[answer]])
                likelihood = scores.gather(1, following[:, None]).sum()
                torch.testing.assert_close(found[row, answer], likelihood, rtol=1e-9, atol=0)


@pytest.mark.parametrize("beams", [1, 3])
def test_written_answers_do_not_depend_on_neighbours(beams):
    model = tiny_model({"vqa": 1.0}).eval()
    batch = questions(model)
    config = DecodingConfig(method="beam", beams=beams, max_length=8)
    calls = ("read_question", "answer_step")
    with torch.no_grad():
        together = written(model, batch, [1], 2, config, calls=calls)
        apart = [written(model, alone(batch, row), [1], 2, config, calls=calls)[0] for row in range(5)]
    assert together == apart


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_recomputed_layers_give_the_same_gradients(task):
    def gradients(recompute: str) -> dict:
        model = tiny_model({task: 1.0}, recompute=recompute)
        model(of_task(task, model)).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients("none")
    for name, found in (*gradients("cheap").items(), *gradients("blocks").items()):
        assert found is not None and found.abs().max() > 0, name  # of key.bias rounding, as softmax does not see it
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-10, msg=name)


def of_task(task: str, model) -> dict:
    batch = questions(model)
    if task == "nlvr2":
        other = tiny_batch(seed=1)["image"]
        batch |= {"image_0": batch["image"], "image_1": other, "answers": torch.tensor([0, 1, 1, 0, 1])}
    return batch


def test_two_images_that_are_one_are_seen_as_one():
    """With both cross-attentions as a pretrained model's one, and a layer above that takes their mean."""
    pretrained = tiny_model(ALL)
    model = tiny_model({"nlvr2": 1.0})
    init = InitConfig(
        fresh=["*.merge_layer.*", "cls_head.*"], drop=["text_decoder.*", "itm_head.*", "*_proj.*", "temp"]
    )
    report = hand_over(model, pretrained.state_dict(), init, "pretrained")
    assert "both cross-attentions of a layer begin as the source's one (32 tensors)" in report["converted"]
    merged = model.text_encoder.encoder.layer[1].crossattention.output.merge_layer
    assert model.text_encoder.encoder.layer[0].crossattention.output.merge_layer is None
    with torch.no_grad():
        merged.weight.copy_(torch.cat((torch.eye(32), torch.eye(32)), dim=1) / 2)
        merged.bias.zero_()
    batch = of_task("nlvr2", model) | {"image_1": tiny_batch()["image"]}
    image = model.visual_encoder(model.pixels(batch["image"]))
    x_ND, fold = pretrained.text_encoder(*pretrained.read(batch), image, [Look(0, 1)])
    expected = model.cls_head(pretrained.text_encoder.first_tokens(x_ND, fold))
    torch.testing.assert_close(model.compare(batch), expected, rtol=1e-9, atol=1e-12)
    swapped = model.compare(of_task("nlvr2", model)) - model.compare(
        of_task("nlvr2", model) | {"image_0": batch["image"]}
    )
    assert swapped.abs().max() == 0
    other = of_task("nlvr2", model)
    assert (model.compare(other) - model.compare(batch)).abs().max() > 1e-4


def test_a_pretrained_model_answers_with_a_decoder_of_its_own():
    """The decoder begins as what it shared; where images are wider than texts, its keys and values of images start fresh."""
    pretrained, model = tiny_model(ALL), tiny_model({"vqa": 1.0})
    init = InitConfig(drop=["itm_head.*", "*_proj.*", "temp"])
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    report = hand_over(model, pretrained.state_dict(), init, "pretrained")
    assert any("of the decoder start fresh: it looks at texts" in line for line in report["converted"])
    found, source = model.state_dict(), pretrained.state_dict()
    key = "text_decoder.bert.encoder.layer.1.crossattention.self.key.weight"
    assert torch.equal(found[key], fresh[key])
    for name, theirs in {
        "text_decoder.bert.embeddings.word_embeddings.weight": "text_encoder.embeddings.word_embeddings.weight",
        "text_decoder.bert.encoder.layer.0.output.dense.weight": "text_encoder.encoder.layer.0.output.dense.weight",
        "text_decoder.bert.encoder.layer.0.attention.self.key.bias": "text_decoder.bert.encoder.layer.0.attention.self.key.bias",
    }.items():
        assert torch.equal(found[name], source[theirs]), name


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_the_references_layout_there_and_back(task):
    model = tiny_model({task: 1.0})
    (found,) = official(model.state_dict()).values()
    if task == "vqa":
        table = found["text_decoder.bert.embeddings.word_embeddings.weight"]
        assert torch.equal(found["text_decoder.cls.predictions.decoder.weight"], table)
        assert not torch.equal(found["text_encoder.embeddings.word_embeddings.weight"], table)
        assert "text_decoder.bert.embeddings.position_ids" in found
    again = tiny_model({task: 1.0})
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    hand_over(again, found, InitConfig(), "a file")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_export_to_transformers(tmp_path):
    words = ["a red ball lies on a small box", "two green stones beside a wall", "no large thing is here"]
    tokenizer = train_tokenizer(words, 60)
    model = tiny_model({"vqa": 1.0}, vocab_size=len(tokenizer) + 2, **ONE_WIDTH).eval()
    exported(model.state_dict(), model.config, ["vqa"], tokenizer, None, tmp_path / "m")
    theirs = BlipForQuestionAnswering.from_pretrained(tmp_path / "m").double().eval()
    batch = questions(model)
    start, *_, end = tokenizer("")["input_ids"]
    unwritten = [model.config.decode_word, model.config.encode_word]
    config = DecodingConfig(method="beam", max_length=10)
    for row in range(5):
        one = alone(batch, row)
        ids, masks = one["text_ids"], one["text_masks"]
        asked = {"pixel_values": one["image"], "input_ids": begun_with(model.config.encode_word, ids)}
        answer = torch.tensor([[model.config.decode_word, 7, 9, end]])
        given = {
            "answer_ids": answer[:, None], "answer_lengths": torch.tensor([[4]]), "answer_weights": torch.ones(1, 1),
        }  # fmt: skip
        with torch.no_grad():
            out = theirs(**asked, attention_mask=masks, labels=answer)
            written_there = theirs.generate(
                **asked, num_beams=3, do_sample=False, max_length=10, suppress_tokens=unwritten, use_cache=False
            )
            ours = written(model, one, [start], end, config, calls=("read_question", "answer_step"))[0][0]
        torch.testing.assert_close(model({**one, **given}).loss / 3, out.loss, rtol=1e-6, atol=1e-6)
        assert ours[1:] == written_there[0, 1 : len(ours)].tolist()
    with pytest.raises(RecipeError, match="vision_width is 48, text_width 32; accepted: --official"):
        wide = tiny_model({"vqa": 1.0}, vocab_size=len(tokenizer) + 2)
        exported(wide.state_dict(), wide.config, ["vqa"], tokenizer, None, tmp_path / "n")
    with pytest.raises(RecipeError, match="no BLIP for pairs of images"):
        exported({}, model.config, ["nlvr2"], tokenizer, None, tmp_path / "n")


# ---- runs ----


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return red_or_green(tmp_path_factory.mktemp("asked"))


def run(folder, shards, task: str, ranks: int, zero: int, steps: int = 4) -> list[dict]:
    """Metrics of a run of one stage in folder/run."""
    folder.mkdir()
    held_out = {"shards": [str(shards / task)], "batch_size": 8}
    recipe = {
        "name": "tiny",
        "model": {**SETTINGS, "init_std": 0.15},
        "tokenizer": {"name": "train", "vocab_size": 80},
        "stages": [{
            "name": task, "tasks": {task: None}, "data": {"shards": [str(shards / task)], "transform": "square_transform"},
            "global_batch_size": 16, "steps": steps, "optimizer": {"lr": 3e-3}, "log_images_every": 0,
        }],
        task: held_out,
    }  # fmt: skip
    spread = {"zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 200}, "steps_per_print": 10**9}
    (folder / "ds.json").write_text(json.dumps(spread))
    command = ["train_ds.py", "--recipe", str(write_yaml(folder / "r.yaml", recipe)), "--output_dir"]
    run_ranks([*command, str(folder / "run"), "--deepspeed_config", str(folder / "ds.json")], ranks)
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task, ranks, zero", [
    ("vqa", 2, 3), ("nlvr2", 2, 2),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (("vqa", 4, 1), ("vqa", 2, 2), ("nlvr2", 4, 3))),
])  # fmt: skip
def test_losses_do_not_depend_on_ranks_or_zero(tmp_path, asked, task, ranks, zero):
    rows = run(tmp_path / "one", asked, task, 1, 0)
    others = run(tmp_path / "many", asked, task, ranks, zero)
    for ours, theirs in zip(others, rows, strict=True):
        assert ours[f"loss/{task}"] == pytest.approx(theirs[f"loss/{task}"], rel=1e-5)
    names = (f"one/run/{task}.json", f"many/run/{task}.json")
    assert len({(tmp_path / name).read_text() for name in names}) == 1


def test_learns_to_answer_in_both_ways(tmp_path, asked):
    run(tmp_path / "x", asked, "vqa", 1, 0, steps=60)
    folder = tmp_path / "x/run"
    for method in ("list", "generate"):
        done = call("vlmo_ds.evaluation.vqa", folder, "--method", method, "--submission", tmp_path / f"{method}.json")
        assert "vqa: 48 questions, accuracy 100.00" in done.stdout
        assert {"question_id": 3, "answer": "yes"} in json.loads((tmp_path / f"{method}.json").read_text())
