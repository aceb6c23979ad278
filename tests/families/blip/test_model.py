"""BLIP's model: recorded numbers, padding, what each task reaches, the queue, the teacher."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from families.blip.tiny import ALL, tiny_batch, tiny_blip, tiny_model
from transformers import BertConfig, BertForMaskedLM

from vlmo_ds.blocks.fold import Fold
from vlmo_ds.blocks.vit import Block
from vlmo_ds.config import InitConfig, RecipeError
from vlmo_ds.families import FAMILIES
from vlmo_ds.families.blip.model import EMPTY
from vlmo_ds.families.blip.parity import build, compare
from vlmo_ds.families.blip.weights import official
from vlmo_ds.families.handing_over import hand_over
from vlmo_ds.families.interface import matches
from vlmo_ds.objectives.captioning import word_losses
from vlmo_ds.recipe_file import parse_recipe
from vlmo_ds.training.averages import refuse
from vlmo_ds.weights_file import read_weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recorded_numbers(dtype):
    recorded = torch.load(golden("blip_A.pt"), weights_only=True)
    found = list(compare(recorded, dtype))
    assert len(found) > 400
    assert not [(name, difference) for name, difference, bar in found if difference > bar]
    names = {name for name, _, _ in found}
    assert {
        "after_step.image_queue",
        "after_step.queue_ptr",
        "after_step.text_encoder_m.embeddings.LayerNorm.weight",
    } <= names


@pytest.mark.parametrize("arch, millions", [("blip_ViT-B-16", 252.4), ("blip_ViT-L-16", 474.7)])
def test_sizes(arch, millions):
    """Without the teacher: the image tower, BERT with cross-attention, the decoder's self-attention and head."""
    family = FAMILIES["blip"]
    with torch.device("meta"):
        model = family.build(family.config(arch=arch, vocab_size=30524), ALL, None)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6 == pytest.approx(millions, abs=0.05)


def test_texts_of_a_batch_do_not_see_each_other_nor_padding():
    model = tiny_model()
    batch = tiny_batch()
    lengths, images = batch["text_masks"].sum(1), model.visual_encoder(batch["image"])
    together = {
        "text": model.encode_text(batch)["text"],
        "match": model.match(batch),
        "words": model.written(batch["text_ids"], lengths, images),
    }
    ends = [0, *(lengths - 1).cumsum(0).tolist()]
    for row, length in enumerate(lengths.tolist()):
        alone = {name: value[row : row + 1] for name, value in batch.items() if value.dim()}
        alone["text_ids"], alone["text_masks"] = alone["text_ids"][:, :length], alone["text_masks"][:, :length]
        words = model.written(alone["text_ids"], lengths[row : row + 1], images[row : row + 1])
        for ours, theirs in (
            (model.encode_text(alone)["text"][0], together["text"][row]),
            (model.match(alone)[0], together["match"][row]),
            (words, together["words"][ends[row] : ends[row + 1]]),
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rate", [0.5, 0.99])  # with the second one no image is left
def test_what_stochastic_depth_leaves_out_of_the_image_tower_is_not_computed(monkeypatch, rate):
    images, found, computed = tiny_batch(batch=12)["image"], [], []

    def with_zeros(self, x_BLD, branch):
        keep_B = torch.rand(len(x_BLD)) >= self.drop_path_rate if self.drop_path_rate else torch.ones(len(x_BLD))
        return x_BLD + keep_B[:, None, None] / (1 - self.drop_path_rate) * branch(x_BLD)

    for added in (Block.added, with_zeros):
        monkeypatch.setattr(Block, "added", added)
        tower = tiny_model(drop_path_rate=rate).visual_encoder.train()
        tower.blocks[1].attn.register_forward_hook(lambda module, args, out: computed.append(len(args[0])))
        torch.manual_seed(7)
        out = tower(images)
        out.square().sum().backward()
        found.append({"out": out} | {name: p.grad for name, p in tower.named_parameters()})
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-10, atol=1e-10)
    assert computed[1] == 12 and (computed[0] < 12) == (rate == 0.5)


def test_one_walk_is_as_good_as_four():
    """itm and lm of the step, from one walk, against the same of walks of each kind."""
    model, batch = tiny_model(label_smoothing=0.0), tiny_batch()
    batch |= {
        "negative_image_index": torch.tensor([1, 0, 0, 0, 2]),
        "negative_text_index": torch.tensor([4, 4, 3, 1, 0]),
    }
    losses = model(batch).losses
    lengths, images = batch["text_masks"].sum(1), model.visual_encoder(batch["image"])
    ids = torch.cat((torch.full((5, 1), 49), batch["text_ids"][:, 1:]), 1)
    wrong = batch["negative_text_index"]
    logits = [
        model.matched(ids, lengths, images),
        model.matched(ids, lengths, images[batch["negative_image_index"]]),
        model.matched(ids[wrong], lengths[wrong], images),
    ]
    torch.testing.assert_close(losses["itm"], F.cross_entropy(torch.cat(logits), torch.tensor([1] * 5 + [0] * 10)))
    labels = batch["text_ids"][:, 1:][batch["text_masks"][:, 1:].bool()]
    words = model.written(batch["text_ids"], lengths, images)
    torch.testing.assert_close(losses["lm"], F.cross_entropy(words, labels))


@pytest.mark.parametrize("tasks", [{"itc": 1.0}, {"itc": 1.0, "itm": 1.0}, {"lm": 1.0}, ALL])
def test_tasks_reach_what_they_say(tasks):
    model = tiny_model(tasks)
    model(tiny_batch()).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.ne(0).any())}
    trained = {name for name, p in model.named_parameters() if p.requires_grad and not matches(name, model.idle())}
    still = {name for name in trained if name.endswith("key.bias")}  # their gradient is zero but for rounding
    assert trained - still <= reached <= trained


@pytest.mark.parametrize("recompute", ["cheap", "blocks", 2])
def test_recomputed_layers_give_the_same_gradients(recompute):
    found = []
    for setting in ("none", recompute):
        model = tiny_model(recompute=setting).train()
        model(tiny_batch()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_the_teacher_stays_in_evaluation_mode_and_is_not_the_student():
    model = tiny_model(text_dropout=0.5, recompute="blocks").train()
    assert model.text_encoder.training and not model.text_encoder_m.training
    batch = tiny_batch()
    torch.testing.assert_close(model.keys(batch), model.keys(batch), rtol=0, atol=0)
    storages = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert not storages & {model.get_parameter(name).data_ptr() for name in model.followed()}
    assert set(model.followed().values()) <= {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_queue_in_the_order_of_samples_whatever_its_size():
    model = tiny_model(queue_size=7)
    assert bool((model.idx_queue == EMPTY).all())
    ids = []
    for step in range(4):
        batch = tiny_batch(seed=step)
        batch["image_id"] = batch["image_id"] + 10 * step
        keys = model.keys_of_step([model.keys(batch)])
        order = torch.randperm(5, generator=torch.Generator().manual_seed(step))
        shuffled = {name: value[:, order] for name, value in keys.items()}
        model.push(shuffled)
        ids += batch["image_id"].tolist()
    assert int(model.queue_ptr) == 20 % 7
    held = dict(enumerate(model.idx_queue[0].tolist()))
    assert held == {i % 7: image for i, image in enumerate(ids)}
    assert model.image_queue[:, (int(model.queue_ptr) - 1) % 7].equal(
        keys["keys_image"][0, -1].to(model.image_queue.dtype)
    )


def test_what_is_not_finite_is_never_pushed():
    model = tiny_model(queue_size=7)
    keys = model.keys_of_step([model.keys(tiny_batch())])
    keys["keys_text"][0, 2, 0] = float("nan")
    model.push(keys)
    assert int(model.queue_ptr) == 4 and 102 not in model.idx_queue[0].tolist()
    assert bool(model.text_queue.isfinite().all())


def test_an_empty_queue_changes_nothing_and_a_copy_in_it_is_a_positive():
    batch = tiny_batch()
    losses = [tiny_model({"itc": 1.0}, queue_size=size)(batch).loss for size in (5, 50)]
    torch.testing.assert_close(*losses)
    model = tiny_model({"itc": 1.0}, alpha=0.0)
    alone = model(batch).loss
    model.push(model.keys_of_step([model.keys(batch)]))  # every key twice: half of the target each
    torch.testing.assert_close(model(batch).loss, alone + torch.log(torch.tensor(2.0, dtype=torch.float64)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_word_losses_with_bias_and_smoothing(smoothing, monkeypatch):
    monkeypatch.setattr("vlmo_ds.objectives.captioning.CHUNK", 4)
    g = torch.Generator().manual_seed(0)
    hidden, head, bias = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((11, 6), (9, 6), (9,)))
    labels = torch.randint(0, 9, (11,), generator=g)
    found = []
    for plain in (True, False):
        inputs = [value.clone().requires_grad_() for value in (hidden, head, bias)]
        if plain:
            loss = F.cross_entropy(
                inputs[0] @ inputs[1].t() + inputs[2], labels, reduction="sum", label_smoothing=smoothing
            )
        else:
            loss = word_losses(inputs[0], inputs[1].t(), labels, inputs[2], smoothing)[0]
        found.append([loss, *torch.autograd.grad(3 * loss, inputs)])
    torch.testing.assert_close(*found)


def test_first_tokens():
    model, lengths = tiny_model({"lm": 1.0}), torch.tensor([3, 1, 2])
    fold = Fold(lengths, 3)
    assert model.text_encoder.first_tokens(torch.arange(6.0)[:, None], fold).flatten().tolist() == [0, 3, 4]


def from_file(tmp_path, state, tasks=ALL, init=None, **changes):
    """(a model that has taken a file of the reference's names, what became of the weights)."""
    recorded = torch.load(golden("blip_A.pt"), weights_only=True)
    config = build(recorded, torch.float32).config.model_copy(update=changes)
    model = FAMILIES["blip"].build(config, tasks, None)
    torch.save({"model": state}, tmp_path / "model_base.pth")
    return model, hand_over(model, read_weights(tmp_path / "model_base.pth"), init or InitConfig(), "model_base.pth")


def test_a_file_of_the_reference_at_two_resolutions(tmp_path):
    state = torch.load(golden("blip_A.pt"), weights_only=True)["state_dict"]
    same, _ = from_file(tmp_path, state)
    larger, report = from_file(tmp_path, state, image_size=48)
    for model in (same, larger):
        own = model.state_dict()
        for name, value in own.items():
            if "queue" not in name and (model is same or "pos_embed" not in name):
                assert torch.equal(value, state[name]), name
    assert larger.visual_encoder.pos_embed.shape == (1, 37, 64)
    assert any(
        line.startswith("visual_encoder.pos_embed [1, 17, 64] -> [1, 37, 64]: bicubic") for line in report["converted"]
    )


def test_a_teacher_that_a_file_lacks_begins_as_the_student(tmp_path):
    state = torch.load(golden("blip_A.pt"), weights_only=True)["state_dict"]
    alone = {name: value for name, value in state.items() if "_m." not in name and "queue" not in name}
    model, report = from_file(tmp_path, alone)
    assert all(torch.equal(model.get_parameter(t), model.get_parameter(s)) for t, s in model.followed().items())
    assert "the queue begins anew" in report["converted"]


def test_captioning_alone_from_a_whole_file(tmp_path):
    state = torch.load(golden("blip_A.pt"), weights_only=True)["state_dict"]
    drop = ["itm_head.*", "vision_proj.*", "text_proj.*", "temp"]
    model, report = from_file(tmp_path, state, {"lm": 1.0}, InitConfig(drop=drop))
    assert not model.followed() and any("the teacher and its queue" in line for line in report["converted"])


def test_the_references_layout_there_and_back(tmp_path):
    state = torch.load(golden("blip_A.pt"), weights_only=True)["state_dict"]
    model, _ = from_file(tmp_path, state)
    (found,) = official(model.state_dict()).values()
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert "queue" in name or torch.equal(found[name], value), name
    alone, _ = from_file(
        tmp_path, found, {"lm": 1.0}, InitConfig(drop=["itm_head.*", "vision_proj.*", "text_proj.*", "temp"])
    )
    assert not [name for name in official(alone.state_dict())["model"] if "_m." in name or "queue" in name]


def test_it_begins_as_a_vit_and_bert(tmp_path):
    """The text stack reads as BERT does, its first token type included."""
    config = BertConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, type_vocab_size=2,
        max_position_embeddings=60, hidden_act="gelu",
    )  # fmt: skip
    torch.manual_seed(5)
    bert = BertForMaskedLM(config).double().eval()
    tower = tiny_model().visual_encoder.state_dict()
    vit = {**tower, "head.weight": torch.zeros(3, 48), "head.bias": torch.zeros(3)}
    source = {
        **vit,
        **{name.replace("LayerNorm.weight", "LayerNorm.gamma"): v for name, v in bert.state_dict().items()},
    }
    model = tiny_model()
    init = InitConfig(fresh=["*.crossattention.*", "*_proj.*", "temp", "itm_head.*"])
    report = hand_over(model, source, init, "files")
    assert any("2 words of the vocabulary start fresh" in line for line in report["converted"])
    assert all(torch.equal(model.visual_encoder.state_dict()[name], value) for name, value in tower.items())
    batch = tiny_batch()
    x_ND, fold = model.text_encoder(batch["text_ids"], batch["text_masks"].sum(1))
    with torch.no_grad():
        theirs = bert.bert(batch["text_ids"], batch["text_masks"]).last_hidden_state
    torch.testing.assert_close(fold.padded(x_ND), theirs * batch["text_masks"][:, :, None], rtol=1e-9, atol=1e-9)
    head = model.text_decoder.predictions
    words = head(x_ND, model.text_encoder.embeddings.word_embeddings)[:, :48]
    torch.testing.assert_close(words, bert.cls(theirs)[batch["text_masks"].bool()], rtol=1e-9, atol=1e-9)
    for name, teacher in model.text_encoder_m.named_parameters():
        assert "crossattention" in name or torch.equal(teacher, model.text_encoder.get_parameter(name)), name


def test_second_names_have_to_agree(tmp_path):
    state = dict(torch.load(golden("blip_A.pt"), weights_only=True)["state_dict"])
    name = "text_decoder.bert.embeddings.LayerNorm.weight"
    state[name] = state[name] + 1
    with pytest.raises(RecipeError, match=f"{name} and text_encoder.embeddings.LayerNorm.weight are one tensor"):
        from_file(tmp_path, state)


@pytest.mark.parametrize("change, message", [
    ({"queue_size": 4}, "queue_size is 4, and stages.contrast.global_batch_size 8"),
    ({"alpha": 1.5}, "alpha"),
    ({"momentum": -0.1}, "momentum"),
    ({"text_heads": 5}, "text_heads is 5, which does not divide text_width 32"),
    ({"position_init": "sincos", "vision_width": 30, "vision_heads": 2}, "vision_width 30 is not a multiple of 4"),
    ({"max_text_len": 60}, "max_text_len is 60, above the 48 rows of positions"),
])  # fmt: skip
def test_bad_settings(change, message):
    recipe = tiny_blip(Path("data"))
    recipe["model"] |= change
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe, "test")


def test_matching_needs_contrast():
    recipe = tiny_blip(Path("data"))
    recipe["stages"][1]["tasks"] = {"itm": 1.0}
    with pytest.raises(RecipeError, match="itc"):
        parse_recipe(recipe, "test")


@pytest.mark.parametrize("zero, message", [
    ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights = true, which keeps a teacher"),
    ({"offload_param": {"device": "nvme"}}, "offload_param.device = 'nvme', where a teacher cannot move"),
])  # fmt: skip
def test_settings_under_which_a_teacher_would_stay(zero, message):
    with pytest.raises(RecipeError, match=message):
        refuse(SimpleNamespace(config={"zero_optimization": zero}))


def test_the_words_of_a_prompt_are_not_learned():
    model, batch = tiny_model(), tiny_batch()
    prompt_B, lengths = torch.tensor([1, 2, 3, 4, 9]), batch["text_masks"].sum(1)
    logits_N = model.written(batch["text_ids"], lengths, model.visual_encoder(batch["image"]))
    labels = torch.cat([ids[1:length] for ids, length in zip(batch["text_ids"], lengths, strict=True)])
    kept = torch.cat([torch.arange(1, length) >= prompt for length, prompt in zip(lengths, prompt_B, strict=True)])
    expected = F.cross_entropy(logits_N[kept], labels[kept], label_smoothing=0.1)
    found = model({**batch, "prompt_words": prompt_B}).values["loss/lm"]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=0)


def test_contrast_does_not_look_at_the_queue_before_it_has_warmed_up():
    model, plain = tiny_model({"itc": 1.0}, queue_warmup_steps=3), tiny_model({"itc": 1.0})
    batch = {**tiny_batch(), "part": torch.tensor(0)}
    for one in (model, plain):
        one.push(one.keys_of_step([one.keys(tiny_batch(seed=1) | {"image_id": torch.arange(5)})]))
    empty = tiny_model({"itc": 1.0})
    torch.testing.assert_close(model(batch | {"step": torch.tensor(2)}).loss, empty(batch).loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(model(batch | {"step": torch.tensor(3)}).loss, plain(batch).loss, rtol=1e-12, atol=0)
    assert (plain(batch).loss - empty(batch).loss).abs() > 1e-3
